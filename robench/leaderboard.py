"""Leaderboards: one CSV row per defense and protocol; made from run folders, ordered, written."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.data_names import KNOWN
from robench.errors import DataError, UsageError
from robench.files import write_atomic
from robench.shares import in_percent, write_share
from robench.threat import format_eps
from robench.unit_table import WORST

if TYPE_CHECKING:
    from robench.estimate import Estimate
    from robench.result import Evaluation

HEAD: Final = (
    "rank",
    "defense",
    "protocol",
    "weights_digest",
    "randomized",
    "clean_acc",
    "clean_low",
    "clean_high",
    "robust_acc",
    "robust_low",
    "robust_high",
    "majority_acc",
    "worst_attack",
)
TAIL: Final = (
    "audit_verdict",
    "audit_failed_checks",
    "n",
    "eot",
    "judge_repeats",
    "seed",
    "forwards_per_example",
    "backwards_per_example",
    "device",
    "precision",
    "robench_version",
    "torch_version",
    "data_digest",
    "evidence",
    "date",
)
"""The columns before and after those of the attacks, which are named by their keys."""

_SHARES: Final = (
    "clean_acc",
    "clean_low",
    "clean_high",
    "robust_acc",
    "robust_low",
    "robust_high",
    "majority_acc",
)
_WHOLE: Final = ("n", "eot", "judge_repeats", "seed")
_NUMBERS: Final = (*_SHARES, *_WHOLE, "forwards_per_example", "backwards_per_example")

_DEFUSED: Final = ("=", "+", "-", "@", "\t", "\r", "'")
"""What a spreadsheet takes for the start of a formula, and the apostrophe that says it is none."""

Row = dict[str, str]
"""A row as it stands in the CSV; the attacks' columns lie between HEAD and TAIL."""


def make_row(
    result: Evaluation, eps: float, audit: Mapping[str, Any] | None = None, evidence: str | None = None
) -> Row:
    """The row of a run at one of its bounds. A number that is not known is empty, and then the row gets no rank.

    Args:
        result: the run.
        eps: the bound.
        audit: the findings, as `Audit.to_json` gives them; None: there was no audit.
        evidence: the digest of the row's bundle; None: that of the run's spec.
    """
    spec = result.spec
    robust = result.robust_at(eps) if result.complete else None
    majority = result.answers(WORST, eps)
    attacks = result.attacks_at(eps)
    queries = result.queries(eps)
    return {
        "rank": "",
        "defense": spec.defense_name + _options(spec.defense),
        "protocol": spec.protocol,
        "weights_digest": spec.weights_digest[:16],
        "randomized": "yes" if spec.randomized else "no",
        **estimate_cells("clean", result.clean_accuracy),
        **estimate_cells("robust", robust),
        "majority_acc": _number(majority.majority().value if majority and result.complete else None),
        "worst_attack": result.worst_attack(eps),
        **{key: _number(estimate.value if estimate else None) for key, estimate in attacks.items()},
        "audit_verdict": "not run" if audit is None else str(audit["verdict"]),
        "audit_failed_checks": "" if audit is None else " ".join(audit["failed"]),
        "n": str(spec.n),
        "eot": str(spec.eot),
        "judge_repeats": str(spec.judge_repeats),
        "seed": str(spec.seed),
        "forwards_per_example": f"{queries['forwards']:.1f}",
        "backwards_per_example": f"{queries['backwards']:.1f}",
        "device": spec.device,
        "precision": spec.precision,
        "robench_version": spec.robench_version,
        "torch_version": spec.torch_version,
        "data_digest": spec.data_digest[:16],
        "evidence": spec.digest()[:16] if evidence is None else evidence,
        "date": result.created,
    }


def _options(defense: str) -> str:
    """The options as written in a defense's spec, also of one from a file: `(sigma=2.0)`; "" where there are none."""
    _, parenthesis, rest = defense.partition("(")
    return parenthesis + rest


def _number(value: float | None) -> str:
    return "" if value is None else write_share(value)


def estimate_cells(kind: str, estimate: Estimate | None) -> Row:
    """The cells of an accuracy and its interval; empty where there is none."""
    values = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
    return {f"{kind}_{end}": _number(value) for end, value in zip(("acc", "low", "high"), values, strict=True)}


def attack_columns(rows: Sequence[Row]) -> list[str]:
    """The attacks' columns of a set of rows, in order of their names; one that is empty in all of them is none."""
    return sorted({key for row in rows for key, cell in row.items() if cell} - {*HEAD, *TAIL})


def is_complete(row: Row) -> bool:
    """True if no number of the row is missing: neither a general one nor one of its own attacks."""
    return all(row.get(name, "") for name in _NUMBERS) and all(row[key] for key in row if key not in (*HEAD, *TAIL))


def find_changed(row: Row, made: Row) -> list[str]:
    """The columns but the rank in which a row differs from the one that its evidence makes; no cell is an empty one."""
    return [key for key in {**made, **row} if key != "rank" and row.get(key, "") != made.get(key, "")]


def is_masked(row: Row) -> bool:
    """True if the audit says that the row's robustness cannot be believed."""
    return row["audit_verdict"] == "masked"


def _place(row: Row) -> tuple[bool, float]:
    return is_masked(row), float(row["robust_low"])


def rank_rows(rows: Sequence[Row]) -> list[Row]:
    """Orders rows by the lower end of the robust interval and ranks them; equal ends share a rank.

    Each protocol has its own ranks, since a weaker one leaves more accuracy standing; the protocols come in reverse
    order of their names (thorough, standard, quick, blackbox, free lists). Rows whose audit says `masked` rank below
    all others of their protocol. Rows that miss a number come last and have no rank. The order depends on the rows
    alone, not on how they came.
    """
    complete = sorted(
        (row for row in rows if is_complete(row)),
        key=lambda row: (is_masked(row), -float(row["robust_low"]), _order(row)),
    )
    complete.sort(key=lambda row: row["protocol"], reverse=True)  # stable: the order within a protocol stays
    partial = sorted((row for row in rows if not is_complete(row)), key=_order)
    places: dict[str, list[tuple[bool, float]]] = {}
    for row in complete:
        places.setdefault(row["protocol"], []).append(_place(row))
    ranked = [{**row, "rank": str(places[row["protocol"]].index(_place(row)) + 1)} for row in complete]
    return [*ranked, *({**row, "rank": ""} for row in partial)]


def _order(row: Row) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    named = row["defense"], row["protocol"], row["weights_digest"], row["evidence"]
    return named, sorted((key, cell) for key, cell in row.items() if key != "rank")


def rows_csv(rows: Sequence[Row], attacks: Sequence[str] | None = None) -> str:
    """Rows as CSV text. A cell that a spreadsheet would take for a formula gets a leading apostrophe.

    Args:
        rows: in order.
        attacks: the columns of attacks; None: those of `attack_columns`.
    """
    columns = [*HEAD, *(attack_columns(rows) if attacks is None else attacks), *TAIL]
    return "".join([csv_line(columns), *(csv_line([row.get(name, "") for name in columns]) for row in rows)])


def csv_line(cells: Sequence[str]) -> str:
    """A line of CSV, in which no cell is a formula to a spreadsheet."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\r\n").writerow([_defuse(cell) for cell in cells])
    return f"{buffer.getvalue()[:-2]}\n"  # Python 3.11 quotes a cell with \r only where \r ends the lines


def _defuse(cell: str) -> str:
    return f"'{cell}" if cell[:1] in _DEFUSED and not _is_number(cell) else cell


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def row_csv(row: Row) -> str:
    """One row with its header, in which an attack that failed has an empty cell."""
    return rows_csv([row], sorted(row.keys() - {*HEAD, *TAIL}))


def read_rows(path: Path) -> list[Row]:
    """Reads a leaderboard; a cell of an attack that the row's protocol does not have is left out of the row.

    What spreadsheets add is passed over: a mark of UTF-8 at the start, blank lines at the end.

    Raises:
        DataError: columns are missing, a row has another number of cells, or a cell is not what its column holds: a
            number, whole or a share where the column is one of such, and no interval that is upside down.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # read_text would turn a \r inside a cell into \n
        if text.partition("\n")[0].count(";") >= len((*HEAD, *TAIL)) - 1:
            raise DataError(f'leaderboard {path} must have "," between its cells; it has ";". Save it with commas')
        lines = list(csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"leaderboard {path} cannot be read: {error}") from None
    columns = [_restore(name) for name in lines[0]] if lines else []
    if not {*HEAD, *TAIL} <= set(columns) or len(set(columns)) < len(columns):
        raise DataError(f"leaderboard {path} must have, each once, the columns {', '.join((*HEAD, *TAIL))}")
    rows = []
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(columns):
            raise DataError(f"leaderboard {path}, line {number}: expected {len(columns)} cells, got {len(cells)}")
        row = dict(zip(columns, (_restore(cell) for cell in cells), strict=True))
        if misfit := _find_misfit(row):
            raise DataError(f"leaderboard {path}, line {number}: {misfit}")
        rows.append({key: cell for key, cell in row.items() if cell or key in (*HEAD, *TAIL)})
    return rows


def _find_misfit(row: Row) -> str:
    """What is wrong with the first cell that cannot be of its column; "" if nothing is. An empty cell can."""
    attacks = [key for key in row if key not in (*HEAD, *TAIL)]
    for key in (*_NUMBERS, *attacks):
        cell = row[key]
        if cell and not _is_number(cell):
            return f'{key} must be a number; got "{cell}"'
        if cell and key in _WHOLE and not re.fullmatch("-?[0-9]{1,18}", cell):
            return f'{key} must be a whole number; got "{cell}"'
        if cell and key in (*_SHARES, *attacks) and not 0 <= float(cell) <= 1:
            return f'{key} must be a share between 0 and 1; got "{cell}"'
    for kind in ("clean", "robust"):
        low, high = row[f"{kind}_low"], row[f"{kind}_high"]
        if low and high and float(low) > float(high):
            return f'{kind}_low must not be above {kind}_high; got "{low}" and "{high}"'
    return ""


def _restore(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:2] in _DEFUSED else cell


def board_name(dataset: str, norm: str, eps: float) -> str:
    """The file of a threat model's leaderboard: `fashion_mnist-linf-0.1.csv`, `cifar10-linf-8_255.csv`.

    What has no place in a file name, as in `hf:org/name` or a path, becomes an underscore.

    Raises:
        UsageError: such a dataset would get the board of one that robench knows, as a file `fashion/mnist` would.
    """
    cleaned = _file_name(dataset)
    if cleaned != dataset and cleaned in KNOWN:
        raise UsageError(f'the leaderboard of "{dataset}" would be that of {cleaned}; give the dataset another name')
    return f"{cleaned}-{norm}-{_file_name(format_eps(eps, norm))}.csv"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)


def identity(row: Row) -> tuple[str, ...]:
    """What a board has one row of: defense, protocol and weights; without a protocol also the attacks.

    A free list in which an attack failed stands beside those that are whole: its column does not say which one failed.
    """
    of_run = row["defense"], row["protocol"], row["weights_digest"]
    if row["protocol"]:
        return of_run
    return *of_run, "whole" if is_complete(row) else "partial", *attack_columns([row])


def find_replaced(row: Row, rows: Sequence[Row], *, replace: bool = False, whose: str = "a row") -> list[Row]:
    """The rows of a board whose place a row takes: those of the same identity.

    Args:
        row: the new one.
        rows: the board.
        replace: also where an old row is better evidenced.
        whose: names the new row in the message.

    Raises:
        UsageError: the new row is not at least as well evidenced as one whose place it would take.
    """
    replaced = [old for old in rows if identity(old) == identity(row)]
    for old in replaced:
        if not replace and (reason := _find_lack(row, old)):
            raise UsageError(f"{name_clash(row, old, whose, reason)}. Leave it out, or pass --replace")
    return replaced


def name_clash(row: Row, old: Row, whose: str, reason: str) -> str:
    """Says that a row would take the place of an old one, and why it should not."""
    return (
        f"{whose} ({row_name(row)}, {describe(row)}) would replace the row of evidence {old['evidence'] or 'unknown'} "
        f"({describe(old)}): {reason}"
    )


def protocol_name(row: Row) -> str:
    """The protocol of a row, for readers."""
    return row["protocol"] or "free list"


def row_name(row: Row) -> str:
    """What a row is of, for readers: `jem, standard-1`."""
    return f"{row['defense']}, {protocol_name(row)}"


def percent(row: Row, kind: str) -> tuple[float, float, float] | None:
    """The `clean` or `robust` accuracy of a row with its interval, in percent; None where a number is missing."""
    cells = [row[f"{kind}_{end}"] for end in ("acc", "low", "high")]
    if not all(cells):
        return None
    value, low, high = (in_percent(float(cell)) for cell in cells)
    return value, low, high


def describe(row: Row) -> str:
    """A row's images and seed: `n=128 seed=0`."""
    return f"n={row['n']} seed={row['seed']}"


def tell_evidence(row: Row) -> str:
    """What a row is of, its evidence, and whether it is incomplete, for readers."""
    partial = "" if is_complete(row) else "; incomplete: a number is missing, so it gets no rank"
    return f"{row_name(row)}, evidence {row['evidence']}{partial}"


def _find_lack(row: Row, old: Row) -> str:
    """In what a row is less well evidenced than an old one, or else not the same run again; "" if in nothing."""

    def less(name: str) -> bool:
        return float(row[name] or 0) < float(old[name] or 0)

    audits = [one["audit_verdict"] not in ("", "not run") for one in (row, old)]
    reasons = {
        "it misses a number": is_complete(old) and not is_complete(row),
        "it has fewer images": less("n"),
        "it has another seed and no more images": row["n"] == old["n"] and row["seed"] != old["seed"],
        "it has fewer draws for a gradient or a verdict": less("eot") or less("judge_repeats"),
        "it comes without an audit": audits == [False, True],
    }
    return next((reason for reason, lacks in reasons.items() if lacks), "")


def add_row(row: Row, path: Path, *, replace: bool = False) -> list[Row]:
    """Adds a row to the leaderboard at `path`, which need not be there; returns the rows that it replaced.

    A row of the same identity is replaced if the new one is at least as well evidenced, so that adding twice changes
    nothing.

    Raises:
        UsageError: a row of the same identity is better evidenced (`replace` goes over that), or the folder cannot be
            written.
        DataError: the leaderboard is damaged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    rows = read_rows(path) if path.exists() else []
    replaced = find_replaced(row, rows, replace=replace)
    write_atomic(path, rows_csv(rank_rows([*(old for old in rows if old not in replaced), row])).encode())
    return replaced
