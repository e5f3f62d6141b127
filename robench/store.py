"""The run folder: the spec, one atomic file per finished unit, and what failed.

run.json                          schema version, spec, day of creation
.lock                             held while a process works on the run
damaged/                          units that were found damaged and done again
units/00003-<sha256>.parquet      the per-example table of unit 3 with its adversarial images; the name carries the
                                  digest of the content, so that damage is found
failures/00003-<attack>.txt       the traceback of an attack that failed
timings.json                      seconds per unit; the only file that differs between two equal runs
result.json, row.csv              written at the end, from the units alone
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robench.errors import DataError, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from robench.plan import RunSpec, Unit

SPEC_FILE, UNIT_FOLDER, FAILURE_FOLDER, TIMINGS_FILE = "run.json", "units", "failures", "timings.json"
LOCK_FILE, DAMAGED_FOLDER = ".lock", "damaged"


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part, also after a crash.

    Raises:
        UsageError: no space left, or no permission; the old file is untouched.
    """
    with _explained(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}. What was finished before is kept; "
            "make room or choose another folder with --out"
        ) from error


class RunStore:
    """A run folder that is open for reading and writing."""

    def __init__(self, folder: Path, spec: RunSpec, created: str) -> None:
        """Use `create` or `open`."""
        self.folder, self.spec, self.created = folder, spec, created

    @classmethod
    def create(cls, folder: Path, spec: RunSpec, created: str | None = None) -> RunStore:
        """Starts a run folder; `created` is the day of the run, None for today.

        Raises:
            UsageError: it holds a run already, or cannot be written.
        """
        from robench.plan import SCHEMA

        if (folder / SPEC_FILE).exists():
            raise UsageError(
                f"{folder} holds a run already. Finish it with 'robench run --resume {folder}' or choose another --out"
            )
        with _explained(folder):
            (folder / UNIT_FOLDER).mkdir(parents=True, exist_ok=True)
        created = created or cls.today()
        content = {"schema": SCHEMA, "created": created, "spec": spec.to_json()}
        write_atomic(folder / SPEC_FILE, _json(content))
        return cls(folder, spec, created)

    @staticmethod
    def today() -> str:
        """The day in UTC, as ISO text."""
        return datetime.datetime.now(tz=datetime.UTC).date().isoformat()

    @classmethod
    def open(cls, folder: Path) -> RunStore:
        """Opens a run folder.

        Raises:
            UsageError: there is no run in it.
            DataError: run.json is damaged or of a newer schema.
        """
        from robench.plan import SCHEMA, RunSpec

        path = folder / SPEC_FILE
        if not path.is_file():
            raise UsageError(f"{folder} is not a run folder: it has no {SPEC_FILE}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema, created, spec = content["schema"], str(content["created"]), content["spec"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
        if schema != SCHEMA:
            todo = "Update robench" if isinstance(schema, int) and schema > SCHEMA else "Run it again"
            raise DataError(f"{path} has schema {schema}; this version of robench reads {SCHEMA}. {todo}")
        return cls(folder, RunSpec.from_json(spec), created)

    def finished(self) -> dict[int, Path]:
        """The files of finished units, by unit number."""
        found = {}
        for path in sorted((self.folder / UNIT_FOLDER).glob("*.parquet")):
            match = re.fullmatch(r"(\d{5})-[0-9a-f]{64}\.parquet", path.name)
            if match:
                found[int(match[1])] = path
        return found

    def write(self, unit: Unit, table: pa.Table, failures: Mapping[str, str] | None = None) -> None:
        """Stores a finished unit in one atomic step, after the tracebacks of the attacks that failed in it.

        Raises:
            UsageError: no space left, or no permission.
        """
        import pyarrow.parquet as pq

        for key, trace in (failures or {}).items():
            self.note_failure(unit, key, trace)
        buffer = io.BytesIO()
        labelled = table.replace_schema_metadata({"robench": json.dumps([self.spec.digest(), unit.index])})
        pq.write_table(labelled, buffer, compression="zstd")
        content = buffer.getvalue()
        name = f"{unit.index:05d}-{hashlib.sha256(content).hexdigest()}.parquet"
        write_atomic(self.folder / UNIT_FOLDER / name, content)

    def read(self, unit: Unit) -> pa.Table:
        """Reads a finished unit.

        Raises:
            DataError: it is missing, damaged, or of another run.
        """
        import pyarrow.parquet as pq

        path = self.finished().get(unit.index)
        if path is None:
            raise DataError(
                f"{self.folder}: unit {unit.index} is missing. Finish it with 'robench run --resume {self.folder}'"
            )
        content = path.read_bytes()
        advice = f"'robench run --resume {self.folder}' moves it aside and does it again"
        if hashlib.sha256(content).hexdigest() != path.stem.split("-")[1]:
            raise DataError(f"{path} is damaged: its content does not have the digest in its name. {advice}")
        table = pq.read_table(io.BytesIO(content))
        if json.loads((table.schema.metadata or {}).get(b"robench", b"[]")) != [self.spec.digest(), unit.index]:
            raise DataError(f"{path} belongs to another run. {advice}")
        return table

    def set_aside_damaged(self, units: Iterable[Unit]) -> list[str]:
        """Moves the files of finished units that cannot be read to `damaged/`; returns what was wrong with each."""
        found, reasons = self.finished(), []
        for unit in units:
            if unit.index not in found:
                continue
            try:
                self.read(unit)
            except DataError as error:
                path = found[unit.index]
                with _explained(path):
                    (self.folder / DAMAGED_FOLDER).mkdir(exist_ok=True)
                    path.replace(self.folder / DAMAGED_FOLDER / path.name)
                reasons.append(str(error))
        return reasons

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from working on the run; the lock of a process that died is gone with it.

        Raises:
            UsageError: another process works on it, or the lock cannot be written.
        """
        with _explained(self.folder / LOCK_FILE):
            file = (self.folder / LOCK_FILE).open("wb")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process works on {self.folder}; wait for it or choose another --out"
                ) from None
            yield

    def note_failure(self, unit: Unit, key: str, trace: str) -> None:
        """Keeps the traceback of an attack that failed in a unit."""
        folder = self.folder / FAILURE_FOLDER
        with _explained(folder):
            folder.mkdir(exist_ok=True)
        write_atomic(folder / f"{unit.index:05d}-{re.sub(r'[^A-Za-z0-9_.=@-]+', '_', key)}.txt", trace.encode())

    def failures(self) -> dict[str, str]:
        """The tracebacks of failed attacks, by file name."""
        return {
            path.stem: path.read_text(encoding="utf-8") for path in sorted(self.folder.glob(f"{FAILURE_FOLDER}/*.txt"))
        }

    def note_time(self, unit: Unit, seconds: float) -> None:
        """Adds a unit's wall time to timings.json."""
        write_atomic(self.folder / TIMINGS_FILE, _json({**self.timings(), str(unit.index): round(seconds, 3)}))

    def timings(self) -> dict[str, float]:
        """Seconds by unit, as far as known; what cannot be read counts as unknown."""
        try:
            content = json.loads((self.folder / TIMINGS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write_file(self, name: str, content: dict[str, Any] | str) -> None:
        """Writes a file of the folder: JSON or text."""
        write_atomic(self.folder / name, _json(content) if isinstance(content, dict) else content.encode())


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
