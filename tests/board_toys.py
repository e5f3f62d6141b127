"""Leaderboards for the tests of what is made from them: one row with real evidence, some with none, some hostile."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from engine_toys import Prototypes

from robench import ThreatModel
from robench.audit import audit
from robench.bundle import EXAMPLES, IMAGES, MANIFEST
from robench.check_names import QUESTIONS
from robench.defense import Defense
from robench.evaluate import evaluate
from robench.leaderboard import HEAD, TAIL, Row, add_row
from robench.publish import publish
from robench.registry import load_defense

TOY = f"{Path(__file__).with_name('engine_toys.py')}:Prototypes"
EPS, N = 0.03, 24
BOARD = "fashion_mnist-linf-0.03"
HOSTILE = "<script>alert(1)</script>\x07\x1b[31m"
FORMULA = '=HYPERLINK("http://example.org")'


def make_row(defense: str = "toy", low: str = "0.5000", **cells: str) -> Row:
    """A complete row with the attacks' columns given in `cells`."""
    numbers = ("clean_acc", "clean_low", "clean_high", "robust_acc", "majority_acc")
    counts = ("n", "eot", "judge_repeats", "seed", "forwards_per_example", "backwards_per_example")
    known = (
        {"defense": defense, "robust_low": low, "robust_high": max(low, "0.6000")}
        | dict.fromkeys(numbers, "0.6000")
        | dict.fromkeys(counts, "8")
    )
    return {
        **{name: known.get(name, "") for name in HEAD},
        "pgd": "0.6",
        **{name: known.get(name, "") for name in TAIL},
        **cells,
    }


def write_audit(folder: Path, n: int = N, eps: float = EPS, defense: Defense | None = None) -> None:
    """An audit of the toy whose every check found what two of them found; those of another defense all pass."""
    made = ["zero_gradients", "finite_differences"]
    content = audit(defense or Prototypes(), ThreatModel("linf", eps), "fashion_mnist", n=n, checks=made).to_json()
    if defense is not None:
        content |= {"verdict": "pass", "failed": []}
        content["findings"] = [{**finding, "verdict": "pass"} for finding in content["findings"]]
    known = {finding["check"]: finding for finding in content["findings"]}
    content["findings"] = [{**known["finite_differences"], "check": name} | known.get(name, {}) for name in QUESTIONS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(content))


def make_boards(folder: Path) -> Path:
    """Two leaderboards: one row with evidence and audit among hostile, masked, partial and randomized ones."""
    boards = folder / "leaderboards"
    threat = ThreatModel("linf", EPS)
    evaluate(load_defense(TOY), "fgsm,pgd(steps=3)", threat, "fashion_mnist", n=N, out=folder / "run", defense_spec=TOY)
    write_audit(folder / "audit")
    publish([folder / "run", folder / "audit"], boards)
    for row in (
        make_row(HOSTILE, "0.4000", randomized="yes", audit_verdict="suspect", protocol="", robust_acc="0.45"),
        make_row(FORMULA, "0.9000", audit_verdict="masked", audit_failed_checks=HOSTILE, robust_acc="0.9500"),
        make_row("partial $x$", "", audit_verdict="not run", robust_acc="", robust_high=""),
        make_row("_hidden", "0.1000", audit_verdict="not run", robust_acc="0.15", worst_attack="&amp;"),
    ):
        add_row(row, boards / f"{BOARD}.csv")
    add_row(make_row("other", audit_verdict="pass", randomized="no"), boards / "mnist-l2-1.5.csv")
    (boards / "reference").mkdir()
    (boards / "reference" / f"{BOARD}.csv").write_text(
        "defense,clean_acc,robust_acc,attack,source,date,note\n"
        f'"{HOSTILE}",0.9,0.4,PGD-20,"A paper, table 1",2020,not comparable\n'
    )
    return boards


def forge(folder: Path, change: Any) -> Path:
    """A bundle whose digests all fit after a change of its tables or manifest: only judging again finds it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    tables = {name: pq.read_table(folder / name).to_pydict() for name in (EXAMPLES, IMAGES)}
    schemas = {name: pq.read_table(folder / name).schema for name in tables}
    change(manifest, tables[EXAMPLES], tables[IMAGES])
    for name, columns in tables.items():
        pq.write_table(pa.table(columns, schema=schemas[name]), folder / name)
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    content = json.dumps(manifest).encode()
    (folder / MANIFEST).write_bytes(content)
    return folder.rename(folder.with_name(hashlib.sha256(content).hexdigest()[:16]))
