"""Feeds a million damaged inputs to everything that reads text or files; an error that is not robench's own is a find.

    pip install atheris
    python benchmarks/fuzz.py                       # all readers; figures go to benchmarks/reliability.csv
    python benchmarks/fuzz.py --only eps --runs 1000

Coverage-guided (atheris, on libFuzzer), from a small valid example of each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUNS = {
    "eps": 300_000,
    "plugin names": 300_000,
    "protocol and dataset names": 150_000,
    "study (TOML)": 80_000,
    "run.json": 80_000,
    "model card": 80_000,
    "audit.json": 60_000,
    "manifest of a bundle": 30_000,
    "leaderboard (CSV)": 60_000,
    "timings.json": 40_000,
    "unit (Parquet)": 20_000,
    "dataset (Parquet)": 2_000,
}
"""Inputs of each reader; 1,202,000 in all."""

ROOT = Path(__file__).resolve().parents[1]
STUDY = b"""defenses = ["convnet"]
datasets = ["mnist"]
threats = ["linf 0.1,8/255"]
protocol = "quick"
seeds = [0, 1]
n = 8
[settings]
eot = 2
[limits]
stall_s = 3.0
[[exclude]]
seed = 1
"""


Reader = tuple[bytes, Callable[[bytes], object]]
"""A valid example, and what reads such."""


def text_readers() -> dict[str, Reader]:
    """What reads words of the command line."""
    from robench.protocol import default_eps, get_protocol
    from robench.registry import parse_spec, split_specs
    from robench.threat import parse_eps

    def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
        return lambda data: read(data.decode(errors="replace"))

    def names(written: str) -> object:
        get_protocol(written)
        return default_eps(*written.partition(" ")[::2])

    return {
        "eps": (b"8/255", text(parse_eps)),
        "plugin names": (
            b"pgd(steps=100, loss='dlr'),apgd",
            text(lambda written: [parse_spec(one) for one in split_specs(written)]),
        ),
        "protocol and dataset names": (b"standard-1", text(names)),
    }


def file_readers(folder: Path) -> dict[str, Reader]:
    """What reads single files."""
    import pyarrow.parquet as pq

    from robench.bundle import check_audit
    from robench.data import load_dataset
    from robench.leaderboard import read_rows
    from robench.study import read_study
    from robench.weights import read_card

    def file(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def call(data: bytes) -> object:
            (folder / name).write_bytes(data)
            return read(folder / name)

        return call

    rows = io.BytesIO()
    pq.write_table(pq.read_table(next((ROOT / "robench" / "assets").rglob("*.parquet"))).slice(0, 2), rows)
    card = next((ROOT / "defenses/convnet/weights").glob("*.json"))
    return {
        "study (TOML)": (STUDY, file("study.toml", read_study)),
        "model card": (card.read_bytes(), file("card.json", lambda path: read_card(path.with_suffix(".safetensors")))),
        "audit.json": ((published_bundle() / "audit.json").read_bytes(), lambda data: check_audit(data, folder)),
        "leaderboard (CSV)": (
            next((ROOT / "leaderboards").glob("*.csv")).read_bytes(),
            file("board.csv", read_rows),
        ),
        "dataset (Parquet)": (
            rows.getvalue(),
            file("rows.parquet", lambda path: load_dataset(str(path), "test", 1, 0, None)),
        ),
    }


def published_bundle() -> Path:
    """One of the published bundles."""
    return next(path for path in (ROOT / "leaderboards" / "evidence").iterdir() if (path / "audit.json").exists())


def folder_readers(folder: Path) -> dict[str, Reader]:
    """What reads files of a run's folder and of a bundle; their digests are made to fit the damaged content."""
    from robench import ThreatModel, evaluate, load_defense
    from robench.bundle import read_bundle
    from robench.result import Evaluation
    from robench.store import RunStore

    run = folder / "run"
    defense = load_defense("convnet(width=16)", "fashion_mnist")
    evaluate(defense, "fgsm", ThreatModel("linf", 0.1), "fashion_mnist", n=2, out=run)
    (unit_file,) = (run / "units").iterdir()
    unit = unit_file.read_bytes()
    unit_file.unlink()
    store = RunStore.open(run)
    bundles = [Path(shutil.copytree(published_bundle(), folder / "bundle"))]

    def read_unit(data: bytes) -> object:
        path = run / "units" / f"00000-{hashlib.sha256(data).hexdigest()}.parquet"
        path.write_bytes(data)
        try:
            return Evaluation.load(run).to_json()
        finally:
            path.unlink()

    def read_run(data: bytes) -> object:
        (run / "run.json").write_bytes(data)
        return RunStore.open(run)

    def read_times(data: bytes) -> object:
        (run / "timings.json").write_bytes(data)
        return sum(store.timings().values())

    def read_manifest(data: bytes) -> object:
        target = folder / hashlib.sha256(data).hexdigest()[:16]
        bundles[0] = bundles[0].rename(target)
        (target / "manifest.json").write_bytes(data)
        return read_bundle(target).row()

    return {
        "run.json": ((run / "run.json").read_bytes(), read_run),
        "timings.json": (b'{"0": 1.5}', read_times),
        "unit (Parquet)": (unit, read_unit),
        "manifest of a bundle": ((bundles[0] / "manifest.json").read_bytes(), read_manifest),
    }


def fuzz(name: str, runs: int) -> None:
    """Feeds one reader; does not return."""
    import atheris

    with atheris.instrument_imports(include=["robench"]):
        from robench.errors import RobenchError

        folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        example, read = {**text_readers(), **file_readers(folder), **folder_readers(folder)}[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(example)

    def once(data: bytes) -> None:
        with contextlib.suppress(RobenchError):
            read(data)

    once(example)
    words = [sys.argv[0], str(corpus), f"-runs={runs}", "-seed=1", "-rss_limit_mb=0"]
    words += [f"-max_len={2 * len(example) + 64}", f"-artifact_prefix={folder}/"]
    atheris.Setup(words, once)
    atheris.Fuzz()


def main() -> None:
    """Feeds all readers, each in a process of its own, and records how many inputs there were."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(RUNS))
    parser.add_argument("--runs", type=int)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.here:
        fuzz(given.only, given.runs or RUNS[given.only])
    total, finds = 0, []
    for name in [given.only] if given.only else list(RUNS):
        runs = given.runs or RUNS[name]
        words = [sys.executable, __file__, "--here", "--only", name, "--runs", str(runs)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        told = re.findall(r"Done (\d+) runs", done.stderr)
        total += int(told[-1]) if told else 0
        print(f"{name}: {told[-1] if told else 'stopped'}", flush=True)
        if done.returncode or not told:
            finds.append(name)
            print(done.stderr[-3000:], flush=True)
    if not given.only:
        from reliability import record

        told_of = f"{len(RUNS)} readers, atheris" + (f"; stopped at: {', '.join(finds)}" if finds else "")
        record("fuzzing", "all readers", {"inputs without a traceback": (total, "1000000", told_of)})
    sys.exit(bool(finds))


if __name__ == "__main__":
    main()
