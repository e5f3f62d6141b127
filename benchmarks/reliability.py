"""What a study survives, and what that costs: one figure a row in benchmarks/reliability.csv.

    python benchmarks/reliability.py kills --runner local --kills 100
    python benchmarks/reliability.py kills --runner ray --kills 100
    python benchmarks/reliability.py flips --places 1000
    python benchmarks/reliability.py throughput
    python benchmarks/reliability.py overhead
    python benchmarks/reliability.py memory
    python benchmarks/reliability.py listing

Each part replaces its own rows. Speeds are ratios within one interleaved run.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CSV = Path(__file__).with_suffix(".csv")
COLUMNS = ("part", "subject", "figure", "value", "bar", "of")
HERE = Path(__file__).resolve()
LIFE_S = {"local": (0.5, 14.0), "ray": (3.0, 25.0), "worker": (0.5, 4.0)}
"""How long a driver of each runner, or a worker, is left alone before it is killed, at least and at most."""
STUDY = """
defenses = ["convnet(width=16)", "{toys}:Noisy"]
threats = ["linf 0.05", "l2 0.5"]
attacks = ["{toys}:Marked(steps=40)"]
seeds = [0, 1]
n = 64
[settings]
unit_size = 8
judge_repeats = 5
eot = 2
"""


def record(part: str, subject: str, rows: dict[str, tuple[Any, str, str]]) -> None:
    """Replaces the rows of a part and subject; `rows` has value, bar and count behind each figure."""
    old = []
    if CSV.exists():
        with CSV.open(newline="") as file:
            old = [row for row in csv.DictReader(file) if (row["part"], row["subject"]) != (part, subject)]
    for figure, (value, bar, of) in rows.items():
        old.append(dict(zip(COLUMNS, (part, subject, figure, value, bar, of), strict=True)))
        print(f"{part} {subject}: {figure} {value} (bar {bar or 'none'}; {of})", flush=True)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(old, key=lambda row: (row["part"], row["subject"], row["figure"])))


# kills


def command(study: Path, out: Path, runner: str) -> list[str]:
    """The command that does the study."""
    return [
        *(sys.executable, "-m", "robench", "run", str(study), "--out", str(out)),
        *("--runner", runner, "--workers", "2"),
    ]


def start(study: Path, out: Path, runner: str, trace: Path) -> subprocess.Popen[bytes]:
    """Starts it."""
    environment = {**os.environ, "ROBENCH_TRACE": str(trace)}
    with (out.parent / "driver.log").open("ab") as log:
        return subprocess.Popen(command(study, out, runner), stdout=log, stderr=log, env=environment)


def workers_of(driver: int) -> list[int]:
    """Processes that do units: children of the driver, or of Ray's node on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if ("spawn_main" in line and parent == driver) or line.startswith("ray::_perform"):
                found.append(int(folder.name))
    return found


@dataclass
class Killer:
    """Kills a study's processes at random times until it has killed enough, and counts."""

    wanted: int
    runner: str
    counts: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0})
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def is_done(self) -> bool:
        """Whether it has killed enough."""
        return sum(self.counts.values()) >= self.wanted

    def disturb(self, driver: subprocess.Popen[bytes]) -> bool:
        """Kills workers until it kills the driver (True) or the driver ends (False)."""
        while not self.is_done:
            kind = self.chance.choice(["driver", "worker"])
            wake = time.monotonic() + self.chance.uniform(*LIFE_S[self.runner if kind == "driver" else kind])
            while time.monotonic() < wake or (kind == "worker" and not workers_of(driver.pid)):
                time.sleep(0.02)
                if driver.poll() is not None:
                    return False
            victims = [driver.pid] if kind == "driver" else workers_of(driver.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(victims or [driver.pid]), signal.SIGKILL)
                self.counts[kind if victims else "driver"] += 1
            if kind == "driver":
                return True
        return False

    def finish(self, study: Path, out: Path, trace: Path) -> None:
        """Starts the study again and again until it is done."""
        while True:
            driver = start(study, out, self.runner, trace)
            killed = self.disturb(driver)
            if driver.wait() == 0:
                return
            if not killed:
                sys.exit((out.parent / "driver.log").read_text()[-3000:])


def kills(runner: str, wanted: int) -> None:
    """SIGKILLs at random times, of the driver and of its workers, over as many studies as it takes."""
    base = Path(tempfile.mkdtemp())
    study = base / "study.toml"
    study.write_text(STUDY.format(toys=HERE.with_name("reliability_toys.py")))
    trace, out = base / "trace", base / "undisturbed"
    if start(study, out, runner, trace).wait() != 0:
        sys.exit((base / "driver.log").read_text())
    expected, units = (out / "study.csv").read_bytes(), len(list(out.rglob("units/*.parquet")))
    begun = len(trace.read_text().split())
    killer, studies, equal, again = Killer(wanted, runner), 0, 0, 0
    while not killer.is_done:
        studies += 1
        out, trace = base / f"killed{studies}", base / f"trace{studies}"
        killer.finish(study, out, trace)
        equal += (out / "study.csv").read_bytes() == expected
        again += len(trace.read_text().split()) - begun
        print(f"study {studies}: {killer.counts}, equal {equal}, {again} units begun again", flush=True)
        shutil.rmtree(out)
    of_driver, of_workers = killer.counts.values()
    told = f"{of_driver} kills of the driver and {of_workers} of workers, 2 workers; {studies} studies of {units} units"
    lost = round(again / (of_driver + of_workers), 2)
    figures = {
        "final CSV byte-equal, of studies": (f"{equal} of {studies}", "all", told),
        "units begun again for each kill": (lost, "1", told),
    }
    record("kills", runner, figures)
    shutil.rmtree(base)


# flips


def outcome_of(call: Callable[[], Any], expected: Any) -> str:
    """`detected`, `harmless`, or `silent` where a figure changed without an error."""
    from robench.errors import RobenchError

    try:
        found = call()
    except RobenchError:
        return "detected"
    return "harmless" if found == expected else "silent"


def flips(places: int, only: str = "") -> None:
    """One bit flipped at random places of each kind of file, and what reading it then says."""
    from robench.bundle import read_bundle
    from robench.defense import weights_digest
    from robench.leaderboard import read_rows
    from robench.registry import load_defense
    from robench.result import Evaluation

    chance, root = random.Random(0), HERE.parents[1]
    base = Path(tempfile.mkdtemp())
    toys = HERE.with_name("reliability_toys.py")
    study = base / "study.toml"
    study.write_text(STUDY.format(toys=toys).replace("seeds = [0, 1]", "seeds = 0"))
    subprocess.run([*command(study, base / "out", "local")], check=True, capture_output=True)
    run = next(path.parent for path in sorted((base / "out").glob("convnet*/run.json")))
    published = next((root / "leaderboards" / "evidence").iterdir())
    bundle = Path(shutil.copytree(published, base / published.name))
    weights = [Path(shutil.copy(path, base)) for path in (root / "defenses/convnet/weights").glob("*width16*")]
    board = Path(shutil.copy(next((root / "leaderboards").glob("*.csv")), base))

    def figures() -> Any:
        result = Evaluation.load(run)
        return result.to_json(), result.created, result.images("worst").tobytes()

    def loaded() -> Any:
        return weights_digest(load_defense("convnet(width=16)", "fashion_mnist", weights=str(base / weights[0].name)))

    weights.sort(key=lambda path: path.suffix, reverse=True)  # the tensors first
    subjects: dict[str, tuple[list[Path], Callable[[], Any]]] = {
        "unit of a run": (sorted(run.glob("units/*")), figures),
        "run.json": ([run / "run.json"], figures),
        "timings.json": ([run / "timings.json"], figures),
        "result.json, row.csv": ([run / "result.json", run / "row.csv"], figures),
        "weights": ([weights[0]], loaded),
        "model card": ([weights[1]], loaded),
        "evidence bundle": (sorted(bundle.iterdir()), lambda: read_bundle(bundle).row()),
        "leaderboard": ([board], lambda: [_checked(row, root) for row in _ranked(read_rows(board))]),
    }
    for subject, (files, look) in subjects.items():
        if only not in subject:
            continue
        expected, counts = look(), {"detected": 0, "harmless": 0, "silent": 0}
        for _ in range(places):
            path = chance.choice(files)
            intact = path.read_bytes()
            content = bytearray(intact)
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
            counts[outcome_of(look, expected)] += 1
            path.write_bytes(intact)
        told = f"{places} places; {counts['detected']} detected, {counts['harmless']} harmless"
        record("flips", subject, {"figures changed silently": (counts["silent"], "0", told)})
    shutil.rmtree(base)


def _ranked(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    from robench.errors import DataError
    from robench.leaderboard import rank_rows

    if rank_rows(rows) != rows:
        raise DataError("the ranks are not those of the figures")
    return rows


def _checked(row: dict[str, str], root: Path) -> Any:
    """A published row, held against its evidence as `robench leaderboard verify` does before it judges images."""
    from robench.bundle import read_bundle
    from robench.errors import DataError

    folder = root / "leaderboards" / "evidence" / row["evidence"]
    if not folder.is_dir():
        raise DataError("no such evidence")
    published = read_bundle(folder).row()
    if any(row.get(key, "") != value for key, value in published.items() if key != "rank"):
        raise DataError("the row is not that of the evidence")
    return row


# speed and memory

SPEED = """
defenses = ["convnet(width=16)"]
threats = ["linf 0.1"]
attacks = ["pgd(steps=20)"]
n = {n}
[settings]
unit_size = 16
"""


def timed_study(n: int, *words: str) -> float:
    """Units a second of a study, from the first unit stored to the last."""
    with tempfile.TemporaryDirectory() as folder:
        study, out = Path(folder) / "study.toml", Path(folder) / "out"
        study.write_text(SPEED.format(n=n))
        words = (sys.executable, "-m", "robench", "run", str(study), "--out", str(out), *words)
        subprocess.run(words, check=True, capture_output=True)
        times = sorted(path.stat().st_mtime for path in out.rglob("units/*.parquet"))
        return (len(times) - 1) / (times[-1] - times[0])


def throughput(rounds: int = 2, n: int = 4800) -> None:
    """Units a second of two workers against one process with one thread, in turn."""
    ways = {
        "one process": ("--workers", "1"),
        "two local workers": ("--workers", "2"),
        "Ray, two workers": ("--runner", "ray", "--workers", "2"),
    }
    seen: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, words in ways.items():
            seen[name].append(timed_study(n, *words))
            print(number, name, f"{seen[name][-1]:.2f} units/s", flush=True)
    for name in list(ways)[1:]:
        ratios = [mine / alone for mine, alone in zip(seen[name], seen["one process"], strict=True)]
        told = f"{rounds} rounds of {n // 16} units, {min(ratios):.2f} to {max(ratios):.2f}"
        ratio = round(statistics.median(ratios), 2)
        record("throughput", name, {"times one process": (ratio, "1.7" if "Ray" in name else "", told)})


def overhead(rounds: int = 5) -> None:
    """What the local runner adds to the units themselves: both are timed within the same run, so noise hits both."""
    import importlib

    import torch

    from robench import ThreatModel, evaluate, load_defense

    torch.set_num_threads(1)
    main_path: Any = importlib.import_module("robench.evaluate")
    spent = {"run_unit": 0.0, "_run": 0.0}

    def timed(name: str) -> None:
        inner = getattr(main_path, name)

        def call(*given: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*given)
            finally:
                spent[name] += time.perf_counter() - started

        setattr(main_path, name, call)

    for name in spent:
        timed(name)
    defense, ratios = load_defense("convnet(width=16)", "fashion_mnist"), []
    for _ in range(rounds):
        spent.update(run_unit=0.0, _run=0.0)
        with tempfile.TemporaryDirectory() as folder:
            out = f"{folder}/run"
            evaluate(defense, "pgd(steps=20)", ThreatModel("linf", 0.1), "fashion_mnist", n=1024, out=out)
        ratios.append(spent["_run"] / spent["run_unit"] - 1)
        print(
            f"{spent['run_unit']:.2f} s of units, {100 * ratios[-1]:.2f} % more with the runner and its store",
            flush=True,
        )
    told = f"{rounds} rounds of 8 units of 128 images, {100 * min(ratios):.2f} to {100 * max(ratios):.2f}"
    more = round(100 * statistics.median(ratios), 2)
    record("overhead", "local runner", {"beyond a bare loop, %": (more, "2", told)})


def memory() -> None:
    """Peak memory of a run over 1,000 images and over 10,000."""
    peaks = {}
    for n in (1000, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, "-m", "robench", "run", "--defense", "convnet(width=16)", "--n", str(n)]
            words += ["--attack", "fgsm,pgd(steps=2)", "--out", f"{folder}/run"]
            subprocess.run(words, check=True, capture_output=True)
            peaks[n] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3  # the largest child so far
    more = 100 * (peaks[10_000] / peaks[1000] - 1)
    told = f"{peaks[1000]:.0f} MB and {peaks[10_000]:.0f} MB; convnet(width=16), fgsm and pgd(steps=2)"
    record("memory", "10,000 images against 1,000", {"more, %": (round(more, 1), "10", told)})


def listing(count: int = 100_000) -> None:
    """Time to list the finished units of a run folder."""
    from robench import ThreatModel, evaluate, load_defense
    from robench.store import RunStore

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        defense = load_defense("convnet(width=16)", "fashion_mnist")
        evaluate(defense, "fgsm", ThreatModel("linf", 0.1), "fashion_mnist", n=2, out=out)
        for number in range(1, count):
            (out / "units" / f"{number:05d}-{number:064x}.parquet").touch()
        store, times = RunStore.open(out), []
        for _ in range(5):
            started = time.perf_counter()
            found = len(store.finished())
            times.append(time.perf_counter() - started)
    record("listing", f"{found} units", {"seconds": (round(statistics.median(times), 2), "2", "median of 5")})


def main() -> None:
    """Does one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["kills", "flips", "throughput", "overhead", "memory", "listing"])
    parser.add_argument("--runner", default="local")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--only", default="", help="kinds of files whose name holds this")
    given = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "kills": lambda: kills(given.runner, given.kills),
        "flips": lambda: flips(given.places, given.only),
        "throughput": throughput,
        "overhead": overhead,
        "memory": memory,
        "listing": listing,
    }
    parts[given.part]()


if __name__ == "__main__":
    main()
