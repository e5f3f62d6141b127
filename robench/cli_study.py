"""The command `robench run STUDY.toml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import typer

from robench.cli_options import print_json
from robench.files import as_place


@dataclass(frozen=True)
class StudyOptions:
    """The options of the command as given."""

    out: str | None
    workers: int | None
    runner: str
    ray: str | None
    device: str | None
    data_dir: Path | None
    dry_run: bool
    as_json: bool


def run_study_file(path: Path, options: StudyOptions) -> None:
    """Does a study and prints what became of it; the exit status is 1 where something failed."""
    from robench.report.study import print_study, study_json
    from robench.study_run import StudySettings, do_study

    settings = StudySettings(
        as_place(options.out or f"runs/{path.stem}"),
        options.workers,
        "ray" if options.ray is not None else options.runner,
        options.ray,
        options.device or "auto",
        options.data_dir,
        options.dry_run,
    )
    result = do_study(path, settings)
    if options.as_json:
        print_json(study_json(result, dry=options.dry_run))
    else:
        print_study(result, dry=options.dry_run)
    if result.failures:
        raise typer.Exit(1)
