"""What a study says at its end: study.csv, a table on the terminal, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from robench.leaderboard import csv_line, estimate_cells
from robench.shares import in_percent
from robench.study import audit_name

if TYPE_CHECKING:
    from robench.study_run import RunState, StudyResult

COLUMNS: Final = (
    *("run", "defense", "dataset", "norm", "eps", "seed", "status", "reason", "n"),
    *("clean_acc", "clean_low", "clean_high", "robust_acc", "robust_low", "robust_high", "worst_attack", "audit"),
)


def study_csv(states: Sequence[RunState], audits: Mapping[str, str]) -> str:
    """One row for each run and bound, in the order of the study: its figures, or why there are none.

    A study gives the same bytes however often it was interrupted.
    """
    rows = [_row(state, eps, audits) for state in states for eps in state.run.eps]
    return "".join(csv_line(cells) for cells in (COLUMNS, *([row[name] for name in COLUMNS] for row in rows)))


def _row(state: RunState, eps: float, audits: Mapping[str, str]) -> dict[str, str]:
    run, found = state.run, state.figures
    row = dict.fromkeys(COLUMNS, "") | {
        "run": run.name,
        "defense": run.defense,
        "dataset": run.dataset,
        "norm": run.norm,
        "eps": f"{eps:g}",
        "seed": str(run.seed),
        "status": state.status,
        "reason": " ".join(state.reason.split()),
    }
    if found is not None:
        row["n"] = str(found.n)
        row |= estimate_cells("clean", found.clean)
        row |= estimate_cells("robust", found.robust[eps])
        row["worst_attack"] = found.worst_attack[eps]
    row["audit"] = " ".join(audits.get(audit_name(run, eps), "").split())
    return row


def print_study(result: StudyResult, *, dry: bool = False) -> None:
    """Prints a study on standard output."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(plan_table(result) if dry else figures_table(result))
    if dry:
        total = sum(_to_do(state) * state.planned.seconds for state in result.runs if state.planned is not None)
        console.print(
            f"at most {duration(total)} of one worker, {duration(total / result.workers)} with {result.workers}: "
            "attacks stop early on images that they have broken"
        )
        return
    for line in result.failures:
        console.print(f"failed  {line}")
    console.print(f"table: {result.folder / 'study.csv'}")
    console.print(f"next: robench leaderboard add {result.folder}")


def plan_table(result: StudyResult) -> Table:
    """Each run with its units, queries and guessed time."""
    table = Table(title="planned", title_justify="left")
    table.add_column("run", overflow="fold", min_width=20)
    for heading in ("units", "stored", "queries", "time"):
        table.add_column(heading, no_wrap=heading != "time")
    for state in result.runs:
        planned = state.planned
        if planned is None:
            table.add_row(state.run.name, "", "", "", f"failed: {state.problem}")
            continue
        stored = len(planned.units) - len(planned.missing)
        share = _to_do(state)
        queries, seconds = f"{planned.queries * share:.3g}", duration(planned.seconds * share)
        table.add_row(state.run.name, str(len(planned.units)), str(stored), queries, seconds)
    return table


def _to_do(state: RunState) -> float:
    """The share of a run's units that is not stored."""
    planned = state.planned
    return len(planned.missing) / len(planned.units) if planned is not None and planned.units else 0.0


def figures_table(result: StudyResult) -> Table:
    """Each run and bound with its figures, or what went wrong."""
    table = Table(title="study", title_justify="left")
    for heading in ("defense", "data", "threat"):
        table.add_column(heading, overflow="fold", min_width=9)
    for heading in ("clean", "robust", "status"):
        table.add_column(heading, no_wrap=True)
    for state in result.runs:
        run, found = state.run, state.figures
        for eps in run.eps:
            clean = f"{in_percent(found.clean.value):.1f} %" if found is not None else ""
            robust = found.robust[eps] if found is not None else None
            seed = f" seed {run.seed}" if run.seed else ""
            cells = (run.defense.rpartition("/")[2], run.dataset + seed, f"{run.norm} {eps:.4g}")
            table.add_row(*cells, clean, str(robust or ""), state.status)
    table.caption, table.caption_justify = "[low, high]: 95 % interval", "left"
    return table


def duration(seconds: float) -> str:
    """Seconds in the unit that a reader wants."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def study_json(result: StudyResult, *, dry: bool = False) -> dict[str, Any]:
    """What `--json` prints."""
    runs = []
    for state in result.runs:
        content: dict[str, Any] = {"run": str(result.folder / state.run.name), "status": state.status}
        if state.reason:
            content["reason"] = state.reason
        if state.planned is not None and dry:
            content |= {
                "units": len(state.planned.units),
                "missing": len(state.planned.missing),
                "queries": round(_to_do(state) * state.planned.queries),
                "seconds": round(_to_do(state) * state.planned.seconds, 1),
            }
        if state.figures is not None:
            content |= state.figures.content
        runs.append(content)
    return {"runs": runs, "audits": result.audits, "folder": str(result.folder), "workers": result.workers}
