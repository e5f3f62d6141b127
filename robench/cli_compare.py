"""The command `robench compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from robench.cli_options import Json, print_json
from robench.files import as_place


def compare(
    first: Annotated[str, typer.Argument(metavar="RUN|EVIDENCE", help="A run folder, or a row's evidence.")],
    second: Annotated[str, typer.Argument(metavar="RUN|EVIDENCE", help="Another one, on the same images.")],
    as_json: Json = False,
) -> None:
    """Ask whether one defense keeps more than another: the difference of two runs image by image, with its interval."""
    from robench.paired import compare_places
    from robench.report.paired import print_comparison

    comparison = compare_places(as_place(first), as_place(second))
    if as_json:
        print_json(comparison.to_json())
    else:
        print_comparison(comparison)
