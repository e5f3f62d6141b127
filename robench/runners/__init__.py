"""Where work units run: in this process; further runners take the same two arguments."""

from robench.runners.local import run_here

__all__ = ["run_here"]
