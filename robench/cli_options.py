"""What several commands of the command line share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robench.errors import RobenchError

if TYPE_CHECKING:
    from robench.verify import Report

DataDir = Annotated[Path | None, typer.Option(help="Folder of <name>/{train,test}-*.parquet; default ROBENCH_DATA.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code of a defense that is not one of robench's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(content: dict[str, Any]) -> None:
    """Prints one JSON object on standard output."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")


def end_with_report(verify: Callable[[], Report], as_json: bool) -> None:
    """Verifies and prints what was found; the exit status is 1 where a claim fails, 2 where it cannot be checked."""
    try:
        report = verify()
    except RobenchError as error:
        if as_json:
            print_json({"holds": None, "cannot be checked": str(error)})
        raise
    if as_json:
        print_json(report.to_json())
    else:
        sys.stdout.write(f"{report}\n")
    if not report.holds:
        raise typer.Exit(1)
