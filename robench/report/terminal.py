"""What a run says on the terminal: a table, where the run folder is, and what to do next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from robench.protocol import find_protocol
from robench.shell import join_words
from robench.threat import format_eps

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from robench.audit import Audit
    from robench.command import RunRequest
    from robench.estimate import Estimate
    from robench.result import Evaluation

NO_ESTIMATE = "failed"


def print_run(result: Evaluation, request: RunRequest, audits: Mapping[Path, Audit] | None = None) -> None:
    """Prints a finished run, and its audits by folder, on standard output."""
    from robench.command import data_words

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(summary_table(result))
    if len(result.spec.eps) > 1:
        console.print(curve_table(result))
    for key, reason in result.reasons.items():
        console.print(f"failed  {key}: {reason}")
    for folder, audit in (audits or {}).items():
        _print_audit(console, audit, folder)
    if result.spec.protocol.startswith("blackbox"):
        console.print(
            "No attack asked for a gradient: where the defense has one, its robust accuracy may be far below this. "
            "See --protocol standard"
        )
    full = request.full_command(result)
    if full:
        protocol = find_protocol(result.spec.protocol)
        cheap = "few images" if protocol is not None and protocol.full else "few images, steps and draws"
        console.print(f"This is a first look: {cheap}. The full protocol, which wants a GPU:\n  {full}")
    console.print(f"run folder: {result.folder}")
    if not result.complete:
        console.print(f"next: mend what failed; tracebacks are in {result.folder}/failures. A row of this has no rank")
        return
    words = join_words([str(result.folder), *data_words(request.data_dir)])
    console.print(f"next: robench leaderboard add {words}   (or: robench verify {words})")


def _print_audit(console: Console, audit: Audit, folder: Path) -> None:
    """The verdict, and the findings that speak against the figure."""
    from robench.report.audit import report_stem, tell_verdict

    console.print(f"audit of {audit.threat} on {audit.n} images: {tell_verdict(audit)}")
    for finding in audit.findings:
        if finding.verdict in ("fail", "suspect"):
            console.print(f"  {finding.check} ({finding.verdict}): {finding.reason}")
    console.print(f"  report: {folder / report_stem(audit)}.html   (and .json)")


def summary_table(result: Evaluation) -> Table:
    """Dataset, threat model, images, accuracies with intervals, queries and time."""
    spec = result.spec
    table = Table(title=f"{spec.defense_name} on {spec.dataset}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column()
    table.add_row("defense", f"{spec.defense_name} ({'randomized' if spec.randomized else 'deterministic'})")
    if spec.randomized:
        table.add_row("draws", f"{spec.judge_repeats} for each verdict, {spec.eot} for each gradient (EOT)")
    table.add_row("dataset", f"{spec.dataset}, {spec.n} images (seed {spec.seed})")
    table.add_row("threat model", str(result.threat))
    table.add_row("clean accuracy", f"{result.clean_accuracy}")
    word = "after" if spec.cascade else "under"
    distances = result.median_distances()
    for key, estimate in result.per_attack.items():
        median = f", median distance {_distance(distances[key])}" if key in distances else ""
        table.add_row(f"{word} {key}", _cell(estimate) + median)
    table.add_row(
        "robust accuracy", "not known: an attack failed" if not result.complete else _cell(result.robust_accuracy)
    )
    for name, robust, clean in result.other_counts():
        table.add_row(f"  {name}", f"{_cell(robust)}, clean {_cell(clean)}")
    queries = result.queries()
    table.add_row("queries per image", f"{queries['forwards']:.0f} forward, {queries['backwards']:.0f} backward passes")
    if result.seconds is not None:
        faster = "" if spec.precision == "float32" else f", attacks in {spec.precision}"
        table.add_row("time", f"{result.seconds:.0f} s on {spec.device}{faster}")
    table.caption, table.caption_justify = "[low, high]: 95 % interval", "left"
    return table


def curve_table(result: Evaluation) -> Table:
    """Accuracy against eps."""
    table = Table("eps", "robust accuracy", title="accuracy against eps", title_justify="left")
    for eps in result.spec.eps:
        table.add_row(format_eps(eps, result.spec.norm), _cell(result.robust_at(eps)))
    return table


def _distance(median: float | None) -> str:
    return "beyond eps" if median is None else f"{median:.4g}"


def _cell(estimate: Estimate | None) -> str:
    return NO_ESTIMATE if estimate is None else str(estimate)
