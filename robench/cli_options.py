"""What several commands of the command line share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

DataDir = Annotated[Path | None, typer.Option(help="Folder of <name>/{train,test}-*.parquet; default ROBENCH_DATA.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run the code of a defense that is not one of robench's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")]


def print_json(content: dict[str, Any]) -> None:
    """Prints one JSON object on standard output."""
    sys.stdout.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
