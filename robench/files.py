"""Files and folders, here or behind a URL: atomic writes, and a lock that keeps two processes off one folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.errors import RobenchError, StorageError, UsageError

STALE_S: Final = 120.0
"""A lock behind a URL that was not renewed for so long belongs to nobody."""


if TYPE_CHECKING:
    Place = Path
else:
    Place = Any
"""A `pathlib.Path`, or for a URL a `upath.UPath`, which offers the same methods but is no subclass of it."""


def as_place(where: str | Place) -> Place:
    """A path, or for text with `://` in it (`s3://bucket/runs/first`) the place behind that URL.

    Raises:
        UsageError: a URL, and `universal_pathlib` or the file system's own package is not installed.
    """
    if not isinstance(where, str):
        return where
    if "://" not in where:
        return Path(where)
    try:
        import upath
    except ImportError as error:
        raise UsageError(f"{where} needs a package: {error}. pip install 'robench[remote]'") from None
    try:
        remote: Any = upath.UPath(where, use_listings_cache=False)  # others write there at the same time
        _ = remote.fs  # imports the file system's own package
    except ImportError as error:  # which says what to install, most often in these words
        found = re.search(r"nstall ([\w-]+) (?:to|for) access", str(error))
        raise UsageError(
            f"{where} needs another package: {error}{f'. pip install {found[1]}' if found else ''}"
        ) from None
    except ValueError as error:
        raise UsageError(f"{where} cannot be opened: {error}") from None
    return remote


def make_folder(folder: Place) -> None:
    """Makes a folder and those above it.

    Raises:
        UsageError: it cannot be made.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write_atomic(path: Place, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new one, never a part, also after a crash.

    Behind a URL that is as atomic as the store's own upload: object stores show whole files alone.

    Raises:
        UsageError: no space left, or no permission; the old file is untouched.
    """
    with explained(path):
        if not isinstance(path, Path):
            path.write_bytes(content)
            return
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


def write_text(path: Path, text: str) -> Path:
    """Writes a file of text, in a folder that need not be there; returns its path.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {path.parent}: {error.strerror}") from None
    write_atomic(path, text.encode())
    return path


def list_names(folder: Place) -> list[str]:
    """The names of all files in a folder, in any order; none where there is no such folder."""
    if isinstance(folder, Path):
        return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208 - an object for each file takes longer
    return [path.name for path in folder.iterdir()] if folder.exists() else []


def explain_folder(folder: Place, file: str) -> str:
    """Why a folder may lack a file that it should hold, to end a message with: `; there is no such folder`, ...

    Args:
        folder: that was looked at.
        file: what it lacks; folders in it that hold one are named.
    """
    if not folder.exists():
        return "; there is no such folder"
    if not isinstance(folder, Path):
        return ""
    if folder.is_file():
        return f"; it is a file. Name its folder: {folder.parent}"
    inside = sorted(str(path.parent) for path in folder.glob(f"*/{file}"))
    more = ", ..." if len(inside) > 3 else ""
    return f"; those in it are {', '.join(inside[:3])}{more}" if inside else ""


def move(path: Place, target: Place) -> None:
    """Moves a file within one store.

    Raises:
        UsageError: it cannot be written.
    """
    with explained(target):
        if isinstance(path, Path) and isinstance(target, Path):
            path.replace(target)
        else:
            target.write_bytes(path.read_bytes())
            path.unlink()


def remove_folder(folder: Place) -> None:
    """Deletes a folder of files, if there is one, and the folder above it if that is empty then; what resists stays.

    Behind a URL the folders stay: most stores have none, and others delete one with all that is in it.
    """
    with contextlib.suppress(Exception):  # clients of stores behind URLs have exceptions of their own
        for name in list_names(folder):
            (folder / name).unlink(missing_ok=True)
        for empty in (folder, folder.parent) if isinstance(folder, Path) else ():
            empty.rmdir()


@contextlib.contextmanager
def explained(path: Place) -> Iterator[None]:
    """Turns what the file system says into one line on what to do.

    Raises:
        StorageError: for an OSError inside the block, and behind a URL for any error.
    """
    try:
        yield
    except RobenchError:
        raise
    except Exception as error:
        if isinstance(path, Path) and not isinstance(error, OSError):
            raise  # clients of stores behind URLs have exceptions of their own
        raise StorageError(
            f"cannot write {path}: {getattr(error, 'strerror', '') or error}. What was finished before is kept; "
            "make room or choose another folder with --out"
        ) from error


@contextlib.contextmanager
def locked(path: Place, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock file at `path`, so that no other process works on its folder meanwhile.

    On a file system the lock of a process that died is gone with it. Behind a URL the lock is a file that is renewed
    every few seconds; one not renewed for two minutes is taken over.

    Args:
        path: the lock file.
        shared: hold it together with others that do the same; behind a URL this only asks that nobody else holds it.

    Raises:
        UsageError: another process works there, or the lock cannot be written.
    """
    if isinstance(path, Path):
        busy = UsageError(f"another process works on {path.parent}; wait for it or choose another --out")
        with _flock(path, busy, shared=shared):
            yield
        return
    lapses = f"the lock of one that was killed lapses after {STALE_S:g} s"
    lease = _Lease(path, UsageError(f"another process works on {path.parent}; wait for it ({lapses})"))
    if shared:
        lease.check()
        yield
    else:
        with lease:
            yield


@contextlib.contextmanager
def _flock(path: Path, busy: UsageError, *, shared: bool) -> Iterator[None]:
    with explained(path):
        file = path.open("wb")
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield


class _Lease:
    """A lock behind a URL: made only where there is none, and renewed by a thread while it is held."""

    def __init__(self, path: Place, busy: UsageError) -> None:
        self.path, self.busy = path, busy
        self.owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)

    def check(self) -> bool:
        """Whether a lock that lapsed lies there.

        Raises:
            UsageError: one that did not.
        """
        held = self._read()
        if held is not None and time.time() - float(held.get("renewed", 0)) < STALE_S:
            raise self.busy
        return held is not None

    def __enter__(self) -> None:
        with explained(self.path):
            if self.check():
                self.path.unlink(missing_ok=True)
            try:
                self._write("create")
            except FileExistsError:
                raise self.busy from None
            found = self._read()
        if found is None or found.get("owner") != self.owner:  # two took a stale lock over at the same moment
            raise self.busy
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        with contextlib.suppress(Exception):
            if (self._read() or {}).get("owner") == self.owner:
                self.path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self.ended.wait(STALE_S / 6):
            with contextlib.suppress(Exception):  # the store may answer again the next time
                held = self._read()
                if held is None or held.get("owner") == self.owner:
                    self._write("overwrite")

    def _read(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, mode: str) -> None:
        content = json.dumps({"owner": self.owner, "renewed": time.time()}).encode()
        remote: Any = self.path
        remote.fs.pipe_file(remote.path, content, mode=mode)
