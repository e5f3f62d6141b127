"""The audit's report: a table on the terminal, `audit.json`, and a page with a plot for each check that has one."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.table import Table

from robench.audit import Audit
from robench.audit.effort import read_effort
from robench.audit.finding import Plot
from robench.check_names import FEWEST_AUDITED, QUESTIONS
from robench.errors import UsageError
from robench.files import write_atomic
from robench.report.exhibit import draw_rows
from robench.report.page import load_template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANING: Final = {
    "pass": "No check found a sign of gradient masking. That does not prove that there is none.",
    "suspect": "Some checks found signs that may be noise or have a harmless cause. Look at them before you trust the "
    "robustness figure.",
    "masked": "The usual attacks report too much of this defense: a robustness figure that rests on them cannot be "
    "believed.",
}
ALONE: Final = {
    "contract": "The defense breaks the contract, so that figures of it say little.",
    "retries": "An answer is that of the draw rather than of the image: an attacker who asks again needs no gradient.",
}
"""What `masked` means where that check alone failed."""


def print_audit(audit: Audit, folder: Path | None) -> None:
    """Prints the findings on standard output."""
    console = Console(highlight=False, soft_wrap=True, markup=False)
    title = f"audit of {audit.defense} on {audit.dataset or 'data of the caller'}, {audit.threat}, {audit.n} images"
    table = Table(title=title, title_justify="left")
    for heading in ("check", "verdict", "what was found"):
        table.add_column(heading, overflow="fold")
    for finding in audit.findings:
        table.add_row(finding.check, finding.verdict, finding.reason)
    console.print(table)
    console.print(f"verdict: {tell_verdict(audit)}")
    if (effort := read_effort(audit.facts)) is not None and effort.reduced:
        console.print(f"made with {effort}")
    if audit.failed:
        console.print(f"failed: {', '.join(audit.failed)}")
    if folder is not None:
        console.print(f"report: {folder / report_stem(audit)}.html   (and .json)")


def explain_verdict(audit: Audit) -> str:
    """What the verdict means, by what failed."""
    alone = ALONE.get(audit.failed[0]) if len(audit.failed) == 1 else None
    return alone or MEANING[audit.verdict]


def tell_verdict(audit: Audit) -> str:
    """The verdict, what it means, and whether there were too few images to rely on it."""
    few = f" {audit.n} images show little; take at least {FEWEST_AUDITED}." if audit.n < FEWEST_AUDITED else ""
    notes = "".join(f" But {note}" for note in audit.notes)
    return f"{audit.verdict}. {explain_verdict(audit)}{few}{notes}"


def write_audit(audit: Audit, folder: Path) -> None:
    """Writes `audit.json` and `audit.html` into a folder; some checks alone do not overwrite the report of all.

    Raises:
        UsageError: Jinja2 or matplotlib is missing, or the folder cannot be written.
    """
    stem = report_stem(audit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(audit.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomic(folder / f"{stem}.json", (text + "\n").encode())
        write_atomic(folder / f"{stem}.html", render_audit(audit).encode())
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}. Choose another --out") from None


def report_stem(audit: Audit) -> str:
    """The report's file name without its ending: `audit`, or `audit-partial` where only some checks were asked for."""
    return "audit" if len(audit.findings) == len(QUESTIONS) else "audit-partial"


def render_audit(audit: Audit) -> str:
    """The page: one self-contained file, everything from outside escaped.

    Raises:
        UsageError: Jinja2 or matplotlib is missing.
    """
    page = load_template("audit.html", "the audit's")
    from matplotlib.figure import Figure

    plots = {
        finding.check: _encode(_draw(finding.plot, Figure), "svg")
        for finding in audit.findings
        if finding.plot is not None
    }
    grid = _encode(draw_rows(audit.examples, "", Figure), "png") if audit.examples else ""
    return page.render(
        audit=audit,
        accuracies=audit.shown,
        meaning=explain_verdict(audit),
        plots=plots,
        grid=grid,
        effort=read_effort(audit.facts),
        questions=QUESTIONS,
    )


def _draw(plot: Plot, new: type[Figure]) -> Figure:
    figure = new(figsize=(4.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    for number, curve in enumerate(plot.curves):
        (line,) = axes.plot(curve.x, curve.y, marker="osD^"[number % 4], markersize=4, label=curve.label)
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, alpha=0.15, color=line.get_color(), linewidth=0)
    if plot.log_x:
        axes.set_xscale("log", base=2)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _encode(figure: Figure, kind: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=120)
    return base64.b64encode(buffer.getvalue()).decode()
