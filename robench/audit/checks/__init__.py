"""The checks of the audit, one file each."""

from __future__ import annotations

from robench.audit.checks import (
    binarisation,
    black_box,
    contract,
    convergence,
    distortion,
    finite_differences,
    inference_time,
    loss_surface,
    losses,
    modes,
    monotone,
    null_control,
    randomness,
    single_step,
    stability,
    trajectory,
    unbounded,
    zero_gradients,
)
from robench.audit.checks.base import Check
from robench.check_names import QUESTIONS

_KNOWN = (
    null_control.CHECK,
    zero_gradients.CHECK,
    finite_differences.CHECK,
    loss_surface.CHECK,
    stability.CHECK,
    inference_time.CHECK,
    single_step.CHECK,
    distortion.CHECK,
    monotone.CHECK,
    unbounded.CHECK,
    losses.CHECK,
    *black_box.CHECKS,
    *convergence.CHECKS,
    modes.CHECK,
    *randomness.CHECKS,
    *trajectory.CHECKS,
    binarisation.CHECK,
    contract.CHECK,
)
_BY_NAME = {check.name: check for check in _KNOWN}

CHECKS: dict[str, Check] = {name: _BY_NAME[name] for name in QUESTIONS}
"""By name, in the order of the report; the contract comes last, since it also asks whether the runs left a mark."""
