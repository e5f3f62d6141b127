"""The `datasets` library behind one door: imported late, kept quiet, never waiting minutes for a hub that is away."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from robench.errors import RobenchError, UsageError

T = TypeVar("T")

_PROBE_TIMEOUT_S = 8.0
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads its variables


def read_quietly(read: Callable[[Any], T], refuse: Callable[[str], RobenchError]) -> T:
    """Return `read(datasets)`, with no progress bars and no log lines; the library's settings are put back afterwards.

    Args:
        read: gets the imported library.
        refuse: makes the error to raise from the first line of what the library raised.

    Raises:
        RobenchError: what `refuse` made, or what `read` raised itself.
    """
    import datasets  # takes over a second, and most commands read no data
    import pyarrow

    with _keep_quiet(datasets):
        try:
            return read(datasets)
        except (
            datasets.exceptions.DatasetsError,
            pyarrow.ArrowException,
            OSError,
            ValueError,
            TypeError,
            KeyError,
            NotImplementedError,
        ) as error:
            reason = str(error.__cause__ or error) or type(error).__name__
            raise refuse(reason.strip().splitlines()[0]) from error


def fetch_from_hub(repo: str, config: str | None, split: str, what: str, advice: str) -> Any:
    """Return a split as a `datasets.Dataset` in memory, from the hub or, where it is away, from its cache.

    One short request finds out whether the hub answers, since the library itself would retry for minutes.
    `HF_HUB_OFFLINE` and `HF_DATASETS_OFFLINE` are respected.

    Args:
        repo: `org/name`.
        config: configuration; None takes the only or the default one.
        split: name of the split.
        what: begins the error message.
        advice: ends it: how to get the data in another way.

    Raises:
        UsageError: the hub does not answer and its cache has no copy; it has no such dataset, configuration or split;
            or the working directory has a folder of that name.
    """
    if Path(repo).exists():  # the library would take it instead of the hub's
        raise UsageError(
            f"{what} the folder {Path(repo).resolve()} hides the hub's repository. Work in another folder."
        )
    told_offline = any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
    away = ""

    def read(datasets: Any) -> Any:
        nonlocal away
        if told_offline or datasets.config.HF_HUB_OFFLINE:
            away = "the Hugging Face hub is switched off by HF_HUB_OFFLINE"
        elif not _hub_answers(repo):
            away = "the Hugging Face hub cannot be reached"
        with _go_offline(datasets, bool(away)):
            return datasets.load_dataset(repo, config, split=split, keep_in_memory=True)

    def refuse(reason: str) -> RobenchError:
        if away:
            return UsageError(f"{what} {away}, and its cache has no copy. {advice}")
        return UsageError(f"{what} {repo} cannot be had from the Hugging Face hub ({reason}). {advice}")

    return read_quietly(read, refuse)


def _hub_answers(repo: str) -> bool:
    """Ask the hub once, without retries; an answer of any kind, also a refusal, counts."""
    import huggingface_hub  # slow to import

    try:
        huggingface_hub.HfApi().dataset_info(repo, timeout=_PROBE_TIMEOUT_S)
    except huggingface_hub.errors.HfHubHTTPError:
        return True
    except Exception:  # noqa: BLE001 - the HTTP client, and so its errors, differ between versions of huggingface_hub
        return False
    return True


@contextmanager
def _keep_quiet(datasets: Any) -> Iterator[None]:
    hub: Any = importlib.import_module("huggingface_hub.utils")  # Any: it does not declare what it re-exports
    switches = [(datasets, datasets.logging), (hub, hub.logging)]
    before = [(bars.are_progress_bars_disabled(), logging.get_verbosity()) for bars, logging in switches]
    for bars, logging in switches:
        bars.disable_progress_bars()
        logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        for (bars, logging), (disabled, level) in zip(switches, before, strict=True):
            logging.set_verbosity(level)
            if not disabled:
                bars.enable_progress_bars()


@contextmanager
def _go_offline(datasets: Any, offline: bool) -> Iterator[None]:
    """Switch both libraries to their caches alone; they read the environment only once, when they are imported."""
    from huggingface_hub import constants  # slow to import

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
