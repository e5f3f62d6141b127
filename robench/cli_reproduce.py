"""The command `robench reproduce`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from robench.cli_options import DataDir, Device, Json, print_json


def reproduce(  # noqa: PLR0913 - each parameter is an option of the command line
    name: Annotated[str, typer.Argument(help="A defense whose paper has tables: shortrun, fortified, jem.")],
    table: Annotated[
        list[str] | None,
        typer.Option(help="Only tables whose name holds this; if none does, it is several: 2.1,2.5. May be repeated."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="Only rows whose heading holds this, commas and all: 'JEM-0, pgd'; if none does, it is several: "
            "JEM-0,JEM-1. May be repeated."
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(help="Likewise only these columns: 'linf 0.1'. With --row, a single cell. May be repeated."),
    ] = None,
    dataset: Annotated[str, typer.Option(help="Only what is measured on this dataset.")] = "",
    n: Annotated[
        int | None,
        typer.Option(
            help="Images behind each figure; default 128, fewer where it is slow. The clean accuracy of a net that "
            "--train trained is that of its card: 2,000 images, one answer each."
        ),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Also measured in each cell's threat model; none for none.")
    ] = "standard",
    protocol_n: Annotated[int | None, typer.Option(help="Images under the protocol; default as --n.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the draw and all randomness.")] = 0,
    train: Annotated[
        bool, typer.Option("--train", help="Also train what no shipped weights are of; goes on where it stopped.")
    ] = False,
    scale: Annotated[float, typer.Option(help="Multiplies the iterations of --train; 0.01 is a smoke test.")] = 1.0,
    device: Device = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the attacks: float32, or bfloat16, which is faster; the judge stays float32.")
    ] = "float32",
    unit_size: Annotated[
        int, typer.Option(help="Images of one work unit. Ctrl-C loses the attack at work on one unit, no more.")
    ] = 128,
    workers: Annotated[int, typer.Option(help="Processes that share the units of a run.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; what is finished there is not repeated.")
    ] = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Measure the tables of a defense's paper again, cell by cell, and print them beside the paper's."""
    from robench.report.reproduced import finish_outcomes, print_outcomes, write_outcomes
    from robench.reproduce import ReproduceRequest, reproduce_all

    request = ReproduceRequest(
        name,
        out or Path("runs") / f"reproduce-{name}",
        tables=tuple(table or ()),
        rows=tuple(row or ()),
        columns=tuple(column or ()),
        dataset=dataset,
        n=n,
        protocol="" if protocol == "none" else protocol,
        protocol_n=protocol_n,
        seed=seed,
        device=device,
        precision=precision,
        unit_size=unit_size,
        workers=workers,
        data_dir=data_dir,
        train=train,
        scale=scale,
    )
    outcomes = reproduce_all(request, keep=lambda done: write_outcomes(done, request))
    files = finish_outcomes(outcomes, request)
    if as_json:
        print_json({"cells": [outcome.to_json() for outcome in outcomes], "folder": str(request.folder)})
    else:
        print_outcomes(outcomes, request.protocol)
        sys.stdout.write("".join(f"{request.folder / name}\n" for name in files))
    if any(outcome.problem for outcome in outcomes):
        raise typer.Exit(1)
