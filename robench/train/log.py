"""The curve of a training run, for TensorBoard where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robench.errors import UsageError


class Log:
    """Takes losses and figures by step and writes nothing; what a run has unless it asks for TensorBoard."""

    def loss(self, step: int, stage: str, value: float) -> None:
        """Takes the loss of one iteration."""

    def figures(self, step: int, stage: str, figures: Mapping[str, Any]) -> None:
        """Takes the figures of a check or of the end of a stage; what is no number is left out."""


class _TensorBoard(Log):
    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def loss(self, step: int, stage: str, value: float) -> None:
        self.writer.add_scalar(f"loss/{stage}", value, step)

    def figures(self, step: int, stage: str, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, float):
                self.writer.add_scalar(f"{name}/{stage}", value, step)


@contextmanager
def open_log(folder: Path, tensorboard: bool) -> Iterator[Log]:
    """Opens the log of a run; TensorBoard's event files go to `folder`.

    Raises:
        UsageError: TensorBoard is asked for and not installed.
    """
    if not tensorboard:
        yield Log()
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError(
            "--tensorboard needs tensorboard. Install it with: pip install 'robench[tensorboard]'"
        ) from None
    with SummaryWriter(log_dir=str(folder)) as writer:
        yield _TensorBoard(writer)
