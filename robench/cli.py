"""The command line: parse, call, print. Nothing is computed here, and torch is imported only by what needs it."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

import robench
from robench.cli_compare import compare
from robench.cli_leaderboard import leaderboard_app
from robench.cli_options import DataDir, Device, Json, Trust, end_with_report, print_json
from robench.cli_reproduce import reproduce
from robench.cli_study import StudyOptions, run_study_file
from robench.errors import Interrupted, RobenchError, UsageError
from robench.files import as_place
from robench.memory import keep_memory
from robench.shell import find_command, join_words

app = typer.Typer(
    name="robench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(leaderboard_app, name="leaderboard")


def _print_version(wanted: bool) -> bool:
    if wanted:
        sys.stdout.write(f"robench {robench.__version__}\n")
        raise typer.Exit
    return wanted


@app.callback()
def robench_command(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Adversarial robustness of image classifiers, as numbers that can be re-checked."""


def main() -> None:
    """Runs the command line and turns errors into one line and an exit status.

    0 done; 1 done but something failed; 2 the user can fix it; 130 interrupted.
    """
    # Threads that spin while they wait stall each other where another program holds a core (505 s against 72 seen).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported
    # Attacks pass batches of many sizes, and oneDNN keeps code and memory for a thousand of them (40 MB seen).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    keep_memory()
    try:
        status = app(standalone_mode=False)  # typer returns the status of an Exit, and 130 for a KeyboardInterrupt
        if status == 130:
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort, Interrupted) as stop:
        _say(f"robench: {stop}" if str(stop) else "robench: interrupted")
        raise SystemExit(130) from None
    except RobenchError as error:
        _say(f"robench: {error}")
        raise SystemExit(2) from None
    except Exception as error:
        message = getattr(error, "format_message", None)  # what the parser raises for a wrong option
        if message is None:
            raise
        text = message()
        if text.startswith("Usage:"):  # the help, of a group of commands where none was named
            sys.stdout.write(f"{text}\n")
        else:
            _say(f"robench: {_plain(text)} See '{find_command(error)} --help'")
        raise SystemExit(2) from None
    raise SystemExit(status if isinstance(status, int) else 0)


def _plain(text: str) -> str:
    """What the parser says of an option's value, in fewer words and with the value: `--n takes a whole number; got`."""
    found = re.match(r"Invalid value for '(--[\w-]+)': Input should be a valid (integer|number)", text)
    if found is None:
        return text
    option, kind = found[1], {"integer": "a whole number", "number": "a number"}[found[2]]
    values = dict(itertools.pairwise(part for word in sys.argv[1:] for part in word.split("=", 1)))
    return f"{option} takes {kind}; got {values.get(option, 'something else')}."


def _say(text: str) -> None:
    sys.stderr.write(f"{' '.join(text.split())}\n")


@app.command("list")
def list_names(
    kind: Annotated[
        str, typer.Argument(help="defenses, attacks, datasets, protocols, checks; recipes, weights.")
    ] = "all",
    norm: Annotated[str | None, typer.Option(help="Only attacks that support this norm (imports them).")] = None,
    as_json: Json = False,
) -> None:
    """Names that --defense, --attack, --dataset and --protocol take."""
    from robench.listing import list_all, tell_entry

    content = list_all(kind, norm)
    if as_json:
        print_json({"names": content})
        return
    for heading, entries in content.items():
        sys.stdout.write(f"{heading}:\n" + "".join(f"  {tell_entry(heading, entry)}\n" for entry in entries))


@app.command()
def run(  # noqa: PLR0913 - each parameter is an option of the command line
    study: Annotated[
        Path | None, typer.Argument(metavar="[STUDY.toml]", help="A file of many runs, instead of --defense.")
    ] = None,
    defense: Annotated[str | None, typer.Option(help="A name, shortrun(n_chains=20), file.py:NAME.")] = None,
    attack: Annotated[str | None, typer.Option(help="One or several: fgsm,pgd(steps=100).")] = None,
    protocol: Annotated[str | None, typer.Option(help="A named list of attacks instead of --attack.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Dataset name, hf:org/name, or a Parquet file; default fashion_mnist.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf (the default), l2, l1 or l0.")] = None,
    eps: Annotated[
        str | None, typer.Option(help="Bound, or several: 0.05,0.1 or 8/255; default as robench list datasets says.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(help="Images, a class-stratified draw; default 256, fewer at first where the defense is slow."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seeds the draw and all randomness; default 0.")] = None,
    eot: Annotated[
        int | None,
        typer.Option(help="Draws averaged in each gradient of a randomized defense; default 10, fewer as for n."),
    ] = None,
    judge_repeats: Annotated[
        int | None,
        typer.Option(
            help="Fresh answers behind each verdict on a randomized defense; default 20, fewer as for n, and 100 in "
            "standard, thorough and blackbox."
        ),
    ] = None,
    unit_size: Annotated[int | None, typer.Option(help="Images of one work unit; default 128.")] = None,
    query_budget: Annotated[int | None, typer.Option(help="Most passes per image of one attack at one bound.")] = None,
    access: Annotated[str | None, typer.Option(help="Most that attacks may ask: gradient, scores, decisions.")] = None,
    goal: Annotated[str | None, typer.Option(help="Only attacks of this goal: budget or minimal.")] = None,
    cascade: Annotated[
        bool | None, typer.Option(help="Each attack sees only what those before it left; default as the protocol says.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Of the attacks' gradients: float32 (default) or bfloat16.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto (cuda where there is one; the default), cpu or cuda.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights file to read instead of the shipped one.")] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the work; default 1, of a study all cores or GPUs.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder or URL; default runs/<date>-<defense>-...")] = None,
    resume: Annotated[str | None, typer.Option(help="Finish the run in this folder.")] = None,
    audit: Annotated[
        bool | None, typer.Option("--audit", help="Then ask whether the figure can be believed; see robench audit.")
    ] = None,
    runner: Annotated[str, typer.Option(help="Of a study: local or ray.")] = "local",
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, for a study.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Of a study: only plan, and guess the time.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Attack a defense and measure its worst-case accuracy; or do a study of many runs."""
    if study is not None:
        _refuse_beside_study(locals())
        how = StudyOptions(out, workers, runner, ray, device, data_dir, dry_run, as_json)
        run_study_file(study, how)
        return
    if runner != "local" or ray is not None or dry_run:
        raise UsageError("--runner, --ray and --dry-run go with a study: robench run STUDY.toml --runner ray")
    from robench.command import RunRequest, run_command
    from robench.command_audit import audit_run
    from robench.report.terminal import print_run

    request = RunRequest(
        defense=defense,
        attack=attack,
        protocol=protocol,
        dataset=dataset,
        norm=norm,
        eps=eps,
        n=n,
        seed=seed,
        eot=eot,
        judge_repeats=judge_repeats,
        unit_size=unit_size,
        query_budget=query_budget,
        access=access,
        goal=goal,
        cascade=cascade,
        precision=precision,
        device=device,
        weights=weights,
        workers=1 if workers is None else workers,
        out=None if out is None else as_place(out),
        resume=None if resume is None else as_place(resume),
        data_dir=data_dir,
        audit=bool(audit),
    )
    result = run_command(request)
    audits = audit_run(result, data_dir) if request.audit else {}
    if as_json:
        content = {"failures": {}, **result.to_json(), "run": str(result.folder), "seconds": result.seconds}
        if audits:
            content["audits"] = [{**one.to_json(), "folder": str(folder)} for folder, one in audits.items()]
        print_json(content)
    else:
        print_run(result, request, audits)
    if not result.complete:
        _say(f"robench: an attack failed; the worst case is incomplete. See {result.folder}/failures")
        raise typer.Exit(1)


def _refuse_beside_study(options: dict[str, object]) -> None:
    """Refuses options that a study's file has to hold."""
    of_command = {"study", "workers", "out", "runner", "ray", "dry_run", "device", "data_dir", "as_json"}
    given = [name for name, value in options.items() if name not in of_command and value is not None]
    if given:
        option = given[0].replace("_", "-")
        raise UsageError(f"--{option} cannot stand beside a study's file; write it into the file")


@app.command()
def plot(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path("curve.png"),
    as_json: Json = False,
) -> None:
    """Draw accuracy against eps for every defense in the runs given."""
    from robench.report.curve import plot_runs

    drawn = plot_runs([as_place(one) for one in runs], out)
    if as_json:
        print_json({"plot": str(out), "curves": drawn})
    else:
        sys.stdout.write(f"{out}\n")


@app.command()
def audit(  # noqa: PLR0913 - each parameter is an option of the command line
    defense: Annotated[str, typer.Option(help="A name, shortrun(n_chains=20), file.py:NAME.")],
    dataset: Annotated[str, typer.Option(help="Dataset name, hf:org/name, or a Parquet file.")] = "fashion_mnist",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    eps: Annotated[str | None, typer.Option(help="Bound of the claim, for example 8/255.")] = None,
    n: Annotated[int | None, typer.Option(help="Images; default 128, fewer where the defense is slow.")] = None,
    checks: Annotated[str | None, typer.Option(help="Only these: zero_gradients,square.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the draw and all randomness.")] = 0,
    eot: Annotated[int | None, typer.Option(help="Draws averaged in each gradient of a randomized defense.")] = None,
    device: Device = "auto",
    weights: Annotated[Path | None, typer.Option(help="Weights file to read instead of the shipped one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of runs and report; what is there is taken up.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Ask whether a defense's robustness can be believed: the published checks for gradient masking."""
    from robench.command_audit import AuditRequest, audit_command
    from robench.report.audit import print_audit

    request = AuditRequest(defense, dataset, norm, eps, n, checks, seed, eot, device, weights, out, data_dir)
    folder, result = audit_command(request)
    if as_json:
        print_json({**result.to_json(), "folder": str(folder)})
    else:
        print_audit(result, folder)


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(metavar="RUN|EVIDENCE", help="A run folder, or a row's evidence.")],
    device: Device = "auto",
    data_dir: DataDir = None,
    trust: Trust = False,
    seed: Annotated[int | None, typer.Option(help="Draws the fresh answers; default those everybody gets.")] = None,
    images: Annotated[int | None, typer.Option(help="Judge so many again, drawn by --seed; default all.")] = None,
    as_json: Json = False,
) -> None:
    """Re-judge saved adversarial images under fresh randomness: does the claim still hold?"""
    from robench.verify import verify as verify_folder

    place = as_place(folder)
    end_with_report(
        lambda: verify_folder(place, device=device, data_dir=data_dir, trust=trust, seed=seed, images=images), as_json
    )


app.command()(compare)


@app.command()
def train(  # noqa: PLR0913 - each parameter is an option of the command line
    defense: Annotated[str, typer.Option(help="A defense with a training recipe; see robench list recipes.")],
    dataset: Annotated[str, typer.Option(help="Dataset name.")] = "fashion_mnist",
    recipe: Annotated[str | None, typer.Option(help="The recipe; default: see robench list recipes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of checkpoint and weights.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds everything.")] = 0,
    scale: Annotated[float, typer.Option(help="Multiplies the iterations; 0.01 is a smoke test.")] = 1.0,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log losses and figures into --out.")] = False,
    init: Annotated[Path | None, typer.Option(help="Weights to start from, instead of random ones.")] = None,
    first_stage: Annotated[str, typer.Option(help="The recipe's stage to begin with; default the first.")] = "",
    precision: Annotated[
        str, typer.Option(help="auto takes bfloat16 where the device has it; float32 does not.")
    ] = "auto",
    lr_scale: Annotated[float, typer.Option(help="Multiplies the learning rate of every stage.")] = 1.0,
    split: Annotated[str, typer.Option(help="What to train on; of SVHN also extra, or both: train+extra.")] = "train",
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Train a defense and write its weights with a model card."""
    from robench.command import TrainRequest, data_words, train_command, trained_words

    request = TrainRequest(
        defense,
        dataset,
        recipe,
        out,
        seed,
        scale,
        device,
        resume,
        data_dir,
        tensorboard,
        init,
        first_stage,
        precision,
        split,
        lr_scale,
    )
    path, card = train_command(request)
    if as_json:
        print_json({"weights": str(path), "card": card})
        return
    test = card["test"]
    again = ["robench", "run", "--defense", defense, "--dataset", dataset, "--weights", str(path), "--attack", "pgd"]
    again += [*trained_words(card["options"]), *data_words(data_dir)]
    sys.stdout.write(
        f"clean accuracy {100 * test['clean_accuracy']:.1f} % [{100 * test['clean_low']:.1f}, "
        f"{100 * test['clean_high']:.1f}] on {test['images']} test images\nweights {path}\n"
        f"next: {join_words(again)}\n"
    )


app.command()(reproduce)


@app.command()
def show(  # noqa: PLR0913 - each parameter is an option of the command line
    defense: Annotated[str, typer.Option(help="A name, shortrun(n_chains=20), file.py:NAME.")],
    dataset: Annotated[str, typer.Option(help="Dataset name, hf:org/name, or a Parquet file.")] = "fashion_mnist",
    against: Annotated[
        str | None, typer.Option(help="To be told from the first by its scores: another dataset, or interpolation.")
    ] = None,
    n: Annotated[int, typer.Option(help="Images behind the figures.")] = 256,
    seed: Annotated[int, typer.Option(help="Seeds the draw and all randomness.")] = 0,
    device: Device = "auto",
    weights: Annotated[Path | None, typer.Option(help="Weights file to read instead of the shipped one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Draw how a defense sees images, how well its confidence is calibrated, and what its detection scores tell."""
    from robench.report.exhibit import print_exhibit
    from robench.show import ShowRequest, show_defense

    folder = out or Path("runs") / f"show-{re.sub(r'[^A-Za-z0-9]+', '-', defense).strip('-')}-{dataset}"
    exhibit = show_defense(ShowRequest(defense, dataset, folder, against, n, seed, device, weights, data_dir))
    if as_json:
        print_json(exhibit.to_json())
    else:
        print_exhibit(exhibit)


@app.command()
def new(
    kind: Annotated[str, typer.Argument(help="defense or attack.")],
    name: Annotated[str, typer.Argument(help="Small letters, digits, underscores.")],
    folder: Annotated[Path, typer.Option(help="Where to write it.")] = Path(),
) -> None:
    """Write a working plugin in one file, with its contract test beside it."""
    from robench.scaffold import class_name, write_plugin

    plugin, test = write_plugin(kind, name, folder)
    other = "--attack pgd" if kind == "defense" else "--defense convnet"
    sys.stdout.write(
        f"{plugin}\n{test}\nnext: robench run --{kind} {plugin}:{class_name(name)} {other}\n      pytest {test}\n"
    )
