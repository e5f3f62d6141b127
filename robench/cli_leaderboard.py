"""The commands `robench leaderboard ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robench.cli_options import DataDir, Device, Json, Trust, end_with_report, print_json
from robench.files import as_place, write_text
from robench.shell import join_words

leaderboard_app = typer.Typer(
    help="Leaderboards: add rows, make the page, check what was published.", no_args_is_help=True
)
Folder = Annotated[Path, typer.Option("--leaderboards", help="Folder of the CSV files.")]


def _tell(line: str) -> None:
    sys.stderr.write(f"robench: {line}\n")


def _print_files(paths: list[Path], as_json: bool) -> None:
    if as_json:
        print_json({"leaderboards": [str(path) for path in paths]})
    else:
        sys.stdout.write("".join(f"{path}\n" for path in paths))


@leaderboard_app.command("add")
def leaderboard_add(
    folders: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Folders of runs, of audits, or of whole studies.")
    ],
    folder: Folder = Path("leaderboards"),
    data_dir: DataDir = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Also replace a row that is better evidenced: more images, an audit.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Add the rows of finished runs, with their audits and evidence, to leaderboards/<dataset>-<norm>-<eps>.csv."""
    from robench.leaderboard import Row, row_name, tell_evidence
    from robench.publish import publish

    lines, rows = list[str](), list[dict[str, str]]()

    def tell_row(path: Path, row: Row) -> None:
        lines.append(f"{path}: {tell_evidence(row)}")
        rows.append({"leaderboard": str(path), "row": row_name(row), "evidence": row["evidence"]})

    written = publish(
        [as_place(one) for one in folders],
        folder,
        data_dir,
        replace=replace,
        device=device,
        tell=_tell,
        tell_row=tell_row,
    )
    if as_json:
        print_json({"leaderboards": [str(path) for path in written], "rows": rows})
        return
    elsewhere = [] if folder == Path("leaderboards") else ["--leaderboards", str(folder)]
    lines.append(f"next: {join_words(['robench', 'leaderboard', 'build', *elsewhere])}")
    sys.stdout.write("".join(f"{line}\n" for line in lines))


@leaderboard_app.command("remove")
def leaderboard_remove(
    rows: Annotated[list[str], typer.Argument(metavar="ROW...", help="Each row's evidence: its digest or folder.")],
    folder: Folder = Path("leaderboards"),
    as_json: Json = False,
) -> None:
    """Take rows off their leaderboards, with their evidence: of weights that are no longer shipped, or by mistake."""
    from robench.publish import withdraw
    from robench.submission import digest_of

    _print_files(withdraw(folder, map(digest_of, rows)), as_json)


@leaderboard_app.command("build")
def leaderboard_build(
    folder: Folder = Path("leaderboards"),
    board: Annotated[list[str] | None, typer.Option(help="Only these: fashion_mnist-linf-0.1; repeatable.")] = None,
    kind: Annotated[str, typer.Option("--format", help="html (a page), or csv, md, latex, json: tables.")] = "html",
    out: Annotated[
        Path | None, typer.Option(help="The file; default index.html in the folder, and tables are printed.")
    ] = None,
    data_dir: DataDir = None,
) -> None:
    """Make the leaderboards' page, or tables."""
    from robench.command_board import build_page, print_tables

    if kind == "html":
        sys.stdout.write(f"{build_page(folder, board or [], out, data_dir)}\n")
        return
    text = print_tables(folder, board or [], kind, others=["html"])
    sys.stdout.write(text if out is None else f"{write_text(out, text)}\n")


@leaderboard_app.command("export")
def leaderboard_export(
    board: Annotated[str, typer.Argument(help="fashion_mnist-linf-0.1.")],
    folder: Folder = Path("leaderboards"),
    kind: Annotated[str, typer.Option("--format", help="robustbench, csv, md, latex or json.")] = "robustbench",
    out: Annotated[
        Path | None, typer.Option(help="The file; of robustbench the folder model_info, with a file for each row.")
    ] = None,
) -> None:
    """Print a leaderboard in the form of another board, or write it."""
    from robench.command_board import load_told, print_tables
    from robench.report.tables import write_robustbench

    if kind == "robustbench" and out is not None:
        _print_files(write_robustbench(load_told(folder, [board])[0], out), as_json=False)
        return
    text = print_tables(folder, [board], kind)
    sys.stdout.write(text if out is None else f"{write_text(out, text)}\n")


@leaderboard_app.command("verify")
def leaderboard_verify(  # noqa: PLR0913 - each parameter is an option of the command line
    folder: Folder = Path("leaderboards"),
    sample: Annotated[int | None, typer.Option(help="Only so many rows, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the draw of rows.")] = 0,
    images: Annotated[int | None, typer.Option(help="Judge so many images of each row; default all.")] = None,
    device: Device = "auto",
    data_dir: DataDir = None,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Judge the adversarial images of published rows again."""
    from robench.publish import pick_rows, verify_boards

    found = []
    for path, row, verdict, why in verify_boards(
        folder, pick_rows(folder, sample, seed), device=device, data_dir=data_dir, trust=trust, images=images
    ):
        found.append({"leaderboard": path.name, "defense": row["defense"], "verdict": verdict, "why": why})
        if not as_json:
            sys.stdout.write(f"{path.stem}  {row['defense']}  {row['protocol']}: {verdict}{why and f' ({why})'}\n")
    if as_json:
        print_json({"rows": found})
    if any(one["verdict"] != "holds" for one in found):
        raise typer.Exit(1)


@leaderboard_app.command("check")
def leaderboard_check(  # noqa: PLR0913 - each parameter is an option of the command line
    row: Annotated[str, typer.Argument(metavar="ROW", help="The row's evidence: its digest or its folder.")],
    folder: Folder = Path("leaderboards"),
    device: Device = "auto",
    data_dir: DataDir = None,
    trust: Trust = False,
    attack: Annotated[int, typer.Option(help="Also attack so many of its images again; 0: none.")] = 0,
    audit: Annotated[bool, typer.Option("--audit", help="Also audit its defense again.")] = False,
    seed: Annotated[int | None, typer.Option(help="Draws the images of both; default one that nobody knows.")] = None,
    as_json: Json = False,
) -> None:
    """Check whether a row may be published: form, size, the images judged again; if asked, attacks and audit too."""
    from robench.submission import Redo, check_submission, digest_of

    redo = Redo(attack, audit, seed)
    digest = digest_of(row)
    end_with_report(
        lambda: check_submission(folder, digest, device=device, data_dir=data_dir, trust=trust, redo=redo), as_json
    )
