"""The run folder: the spec, one atomic file per finished unit, and what failed.

run.json                          schema version, spec, day of creation, digests of the defense's code if it is not
                                  robench's, and the digest of it all
.lock                             held while a process works on the run
damaged/                          units that were found damaged and done again
units/00003-<sha256>.parquet      the per-example table of unit 3 with its adversarial images; the name carries the
                                  digest of the content, so that damage is found
drafts/00003/                     what unit 3 has found so far, while it is at work; see `robench.drafts`
failures/00003-<attack>.txt       the traceback of an attack that failed
timings.json                      seconds per unit; the only file that differs between two equal runs
result.json, row.csv              written at the end, from the units alone

The folder may be behind a URL; see `robench.files`.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final

from robench.errors import DataError, UsageError
from robench.files import Place, explain_folder, list_names, locked, make_folder, move, write_atomic

if TYPE_CHECKING:
    import pyarrow as pa

    from robench.drafts import Drafts
    from robench.plan import RunSpec, Unit

SPEC_FILE, UNIT_FOLDER, FAILURE_FOLDER, TIMINGS_FILE = "run.json", "units", "failures", "timings.json"
LOCK_FILE, DAMAGED_FOLDER, RESULT_FILE, ROW_FILE = ".lock", "damaged", "result.json", "row.csv"
DRAFT_FOLDER: Final = "drafts"
TIMINGS_EVERY_S: Final = 5.0
"""Seconds between two writes of timings.json, which grows with the run."""


class RunStore:
    """A run folder that is open for reading and writing."""

    def __init__(self, folder: Place, spec: RunSpec, created: str, source: Mapping[str, str]) -> None:
        """Use `create` or `open`."""
        self.folder, self.spec, self.created, self.source = folder, spec, created, dict(source)
        self._new_timings: dict[str, float] = {}
        self._timings_written = time.monotonic()

    @classmethod
    def create(
        cls, folder: Place, spec: RunSpec, created: str | None = None, source: Mapping[str, str] | None = None
    ) -> RunStore:
        """Starts a run folder.

        Args:
            folder: where.
            spec: the run's.
            created: the day of the run; None: today.
            source: digests of the defense's code; see `robench.source`.

        Raises:
            UsageError: it holds a run already, or cannot be written.
        """
        from robench.plan import SCHEMA

        if (folder / SPEC_FILE).exists():
            raise UsageError(
                f"{folder} holds a run already. Finish it with 'robench run --resume {folder}' or choose another --out"
            )
        make_folder(folder / UNIT_FOLDER)
        created = created or cls.today()
        content = {"schema": SCHEMA, "created": created, "spec": spec.to_json()}
        if source:
            content["source"] = dict(source)
        write_atomic(folder / SPEC_FILE, _json({**content, "digest": _digest(content)}))
        return cls(folder, spec, created, source or {})

    @staticmethod
    def today() -> str:
        """The day in UTC, as ISO text."""
        return datetime.datetime.now(tz=datetime.UTC).date().isoformat()

    @classmethod
    def open(cls, folder: Place) -> RunStore:
        """Opens a run folder.

        Raises:
            UsageError: there is no run in it.
            DataError: run.json is damaged or of a newer schema.
        """
        from robench.plan import SCHEMA, RunSpec

        path = folder / SPEC_FILE
        if not path.is_file():
            raise UsageError(f"{folder} is not a run folder: it has no {SPEC_FILE}{explain_folder(folder, SPEC_FILE)}")
        try:
            content = json.loads(path.read_bytes())
            schema, created, spec = content["schema"], str(content["created"]), content["spec"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise DataError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
        if schema != SCHEMA:
            todo = "Update robench" if isinstance(schema, int) and schema > SCHEMA else "Run it again"
            raise DataError(f"{path} has schema {schema}; this version of robench reads {SCHEMA}. {todo}")
        if content.pop("digest", None) not in (None, _digest(content)):  # None: written before there was one
            raise DataError(f"{path} is damaged: its content does not have the digest that it names. Run it again")
        return cls(folder, RunSpec.from_json(spec), created, content.get("source", {}))

    def finished(self) -> dict[int, Place]:
        """The files of finished units, by unit number; lists the folder, 100,000 units in about a second."""
        found = {}
        folder = self.folder / UNIT_FOLDER
        for name in sorted(list_names(folder)):
            match = re.fullmatch(r"(\d{5,})-[0-9a-f]{64}\.parquet", name)
            if match:
                found[int(match[1])] = folder / name
        return found

    def write(self, unit: Unit, table: pa.Table, failures: Mapping[str, str] | None = None) -> None:
        """Stores a finished unit in one atomic step, after the tracebacks of its failed attacks; its drafts go.

        Raises:
            UsageError: no space left, or no permission.
        """
        import pyarrow.parquet as pq

        for key, trace in (failures or {}).items():
            self.note_failure(unit, key, trace)
        buffer = io.BytesIO()
        labelled = table.replace_schema_metadata({**(table.schema.metadata or {}), b"robench": self._identity(unit)})
        pq.write_table(labelled, buffer, compression="zstd")
        content = buffer.getvalue()
        name = f"{unit.index:05d}-{hashlib.sha256(content).hexdigest()}.parquet"
        write_atomic(self.folder / UNIT_FOLDER / name, content)
        self.drafts(unit).clear()

    def drafts(self, unit: Unit) -> Drafts:
        """What a unit that is not finished has found so far."""
        from robench.drafts import Drafts

        return Drafts(self.folder / DRAFT_FOLDER / f"{unit.index:05d}", self._identity(unit))

    def read(self, unit: Unit, path: Place | None = None) -> pa.Table:
        """Reads a finished unit.

        Args:
            unit: which.
            path: its file; None looks for it, for which all units are listed.

        Raises:
            DataError: it is missing, damaged, or of another run.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        from robench.unit_table import check_columns

        path = path or self.finished().get(unit.index)
        if path is None:
            raise DataError(
                f"{self.folder}: unit {unit.index} is missing. Finish it with 'robench run --resume {self.folder}'"
            )
        content = path.read_bytes()
        advice = f"'robench run --resume {self.folder}' moves it aside and does it again"
        if hashlib.sha256(content).hexdigest() != path.stem.split("-")[1]:
            raise DataError(f"{path} is damaged: its content does not have the digest in its name. {advice}")
        try:
            # by this thread alone: one of Arrow's that still holds a Python object at exit would abort the process
            table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
            check_columns(table)
        except (pa.ArrowException, OSError, ValueError, DataError) as error:  # ValueError: a name is no UTF-8
            raise DataError(f"{path} is no table of a unit: {error}. {advice}") from None
        if (table.schema.metadata or {}).get(b"robench") != self._identity(unit):
            raise DataError(f"{path} belongs to another run. {advice}")
        return table

    def read_all(self, units: Iterable[Unit]) -> Iterator[pa.Table]:
        """Reads finished units one after the other, in their order.

        Raises:
            DataError: as `read`.
        """
        found = self.finished()
        for unit in units:
            yield self.read(unit, found.get(unit.index))

    def _identity(self, unit: Unit) -> bytes:
        """Names a unit of this run in its file."""
        return json.dumps([self.spec.digest(), unit.index]).encode()

    def tidy(self, units: Iterable[Unit]) -> list[str]:
        """Makes the folder ready to go on; returns what was wrong with each unit that was found damaged.

        Such units move to `damaged/`. Drafts of finished units go, which a process leaves that is killed in between.
        """
        found, begun, reasons = self.finished(), list_names(self.folder / DRAFT_FOLDER), []
        for unit in units:
            if unit.index not in found:
                continue
            try:
                self.read(unit, found[unit.index])
            except DataError as error:
                path = found[unit.index]
                make_folder(self.folder / DAMAGED_FOLDER)
                move(path, self.folder / DAMAGED_FOLDER / path.name)
                reasons.append(str(error))
            else:
                if begun:
                    self.drafts(unit).clear()
        return reasons

    def locked(self, *, shared: bool = False) -> AbstractContextManager[None]:
        """Keeps other processes from working on the run; see `robench.files.locked`."""
        return locked(self.folder / LOCK_FILE, shared=shared)

    def note_failure(self, unit: Unit, key: str, trace: str) -> None:
        """Keeps the traceback of an attack that failed in a unit."""
        folder = self.folder / FAILURE_FOLDER
        make_folder(folder)
        write_atomic(folder / f"{unit.index:05d}-{re.sub(r'[^A-Za-z0-9_.=@-]+', '_', key)}.txt", trace.encode())

    def failures(self) -> dict[str, str]:
        """The tracebacks of failed attacks, by file name."""
        folder = self.folder / FAILURE_FOLDER
        found = sorted(folder.iterdir(), key=lambda path: path.name) if folder.exists() else []
        return {path.stem: path.read_bytes().decode(errors="replace") for path in found if path.name.endswith(".txt")}

    def note_time(self, unit: Unit, seconds: float) -> None:
        """Remembers a unit's wall time, and writes timings.json from time to time; `flush_times` writes the rest."""
        self._new_timings[str(unit.index)] = round(seconds, 3)
        if time.monotonic() - self._timings_written >= TIMINGS_EVERY_S:
            self.flush_times()

    def flush_times(self) -> None:
        """Adds the wall times noted since the last time to timings.json."""
        if self._new_timings:
            write_atomic(self.folder / TIMINGS_FILE, _json({**self.timings(), **self._new_timings}))
            self._new_timings = {}
        self._timings_written = time.monotonic()

    def timings(self) -> dict[str, float]:
        """Seconds by unit, as far as known; what cannot be read counts as unknown."""
        try:
            content = json.loads((self.folder / TIMINGS_FILE).read_bytes())
        except (OSError, ValueError):
            return {}
        known = isinstance(content, dict) and all(isinstance(value, int | float) for value in content.values())
        return content if known else {}

    def write_file(self, name: str, content: dict[str, Any] | str) -> None:
        """Writes a file of the folder: JSON or text."""
        write_atomic(self.folder / name, _json(content) if isinstance(content, dict) else content.encode())


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
