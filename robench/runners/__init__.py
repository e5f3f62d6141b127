"""Where work units run: in this process, or in several."""

from robench.runners.local import run_here
from robench.runners.pool import Job, check_loadable, run_in_processes, threads_for

__all__ = ["Job", "check_loadable", "run_here", "run_in_processes", "threads_for"]
