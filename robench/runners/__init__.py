"""Where the work of runs and studies is done: in this process, in several, or on a Ray cluster."""

from robench.runners.local import run_here, run_in_processes, threads_for
from robench.runners.task import Limits, Outcome, Runner, Task

__all__ = ["Limits", "Outcome", "Runner", "Task", "run_here", "run_in_processes", "threads_for"]
