"""Merges tables that `robench reproduce` measured into a published page: docs/reproduced/STEM.csv and .md.

    python tools/merge_reproduced.py jem-curves runs/a/tables.csv runs/b/tables.csv [--only-protocol]

Figures of the files given stand in for those of the same cells, and new cells are added; one under the protocol stands
beside all attacks on the same defense at the same bound. What the page says above its tables is kept; tables, remarks
and pictures are written anew. Without files the page is only written anew.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image

from robench.paper import Cell, Outcome
from robench.report.paper_curves import draw_curves
from robench.report.reproduced import as_csv, as_tables, from_csv
from robench.reproduce import load_tables

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "reproduced"
PICTURES = FOLDER.parent / "pictures"


def main() -> None:
    """Merges, and writes the page, its CSV file and its pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stem", help="of the page, such as jem-curves; begins with the defense")
    parser.add_argument("files", nargs="*", type=Path, help="tables.csv of runs")
    parser.add_argument("--only-protocol", action="store_true", help="take no figure of an attack by itself")
    asked = parser.parse_intermixed_args()
    cells = load_tables(asked.stem.partition("-")[0])
    path = FOLDER / f"{asked.stem}.csv"
    outcomes, protocol = from_csv(path.read_text(encoding="utf-8"), cells)
    for file in asked.files:
        found, its_protocol = from_csv(file.read_text(encoding="utf-8"), cells)
        protocol = protocol or its_protocol
        for new in found:
            if not asked.only_protocol and all(new.cell != old.cell for old in outcomes):
                outcomes.append(new)
            outcomes = [merge(old, new, only_protocol=asked.only_protocol) for old in outcomes]
    known = {victim(outcome.cell): outcome.worst for outcome in outcomes if outcome.worst}
    outcomes = [replace(outcome, worst=known.get(victim(outcome.cell))) for outcome in outcomes]
    outcomes.sort(key=lambda outcome: cells.index(outcome.cell))
    path.write_text(as_csv(outcomes, protocol), encoding="utf-8")
    write_page(path, outcomes, protocol)


def merge(old: Outcome, new: Outcome, *, only_protocol: bool) -> Outcome:
    """A published cell, with what another one found out about it."""
    if new.cell == old.cell and new.ours and not only_protocol:
        old = replace(old, ours=new.ours, trained=new.trained, problem="")
    return replace(old, worst=new.worst) if new.worst and victim(new.cell) == victim(old.cell) else old


def victim(cell: Cell) -> tuple[object, ...]:
    """What a figure under the protocol is of."""
    return cell.table, cell.defense, cell.dataset, cell.norm, cell.eps, cell.recipe


def write_page(path: Path, outcomes: list[Outcome], protocol: str) -> None:
    """Writes the page beside a CSV file, below its head, and its pictures."""
    drawn = draw_curves(outcomes, protocol, PICTURES, f"{path.stem}-")
    for name in drawn.values():
        Image.open(PICTURES / name).quantize(64).save(PICTURES / name, optimize=True)
    page = path.with_suffix(".md")
    head = page.read_text(encoding="utf-8").partition("\n## ")[0]
    shown = {table: f"../{PICTURES.name}/{name}" for table, name in drawn.items()}
    page.write_text(head + as_tables(outcomes, protocol, shown), encoding="utf-8")


if __name__ == "__main__":
    main()
