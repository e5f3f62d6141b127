"""The checks of the audit by name, in the order of the report, and their verdicts. Imports nothing: listing is fast."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final, Literal, get_args

Verdict = Literal["pass", "suspect", "fail", "not run"]
Overall = Literal["pass", "suspect", "masked"]
VERDICTS: Final[tuple[str, ...]] = get_args(Verdict)
FEWEST_AUDITED: Final = 32
"""Images; on fewer most checks cannot tell a sign from chance."""

QUESTIONS: Final = {
    "null_control": "Is the accuracy under an attack of bound 0 the clean one?",
    "zero_gradients": "Is the gradient of cross-entropy there, finite and not zero?",
    "finite_differences": "Is the gradient the derivative of the classifier that is judged?",
    "loss_surface": "Does the loss rise along the gradient more than at random?",
    "stability": "Do the answers near an image resemble those at the image?",
    "inference_time": "Does an answer optimise, and can an attack differentiate that?",
    "single_step": "Does PGD find at least what FGSM finds?",
    "distortion": "Is the way to the image of a single step as right as its end?",
    "monotone": "Does a larger bound break at least as many images?",
    "unbounded": "Does the accuracy fall to chance without a bound?",
    "loss_choice": "Does cross-entropy lead as far as the margin?",
    "square": "Does the score attack square break only what gradients break too?",
    "noise": "Does random noise break only what gradients break too?",
    "transfer": "Does transfer from another defense break only what gradients break too?",
    "double_steps": "Does PGD with twice the steps break no more?",
    "double_restarts": "Does PGD with twice the restarts break no more?",
    "double_draws": "Does PGD with twice the draws break no more?",
    "gradient_modes": "Is the gradient path that the defense calls strongest the strongest?",
    "draws": "Does one draw lead as far as many?",
    "fixed_draws": "Do fresh draws lead as far as fixed ones?",
    "retries": "Does the accuracy stand if each image may be tried five times?",
    "gradient_noise": "Do the draws of the attack give a gradient that repeats?",
    "silent_success": "Does the attack keep what it finds on the way?",
    "incomplete_optimisation": "Has the loss stopped rising?",
    "break_point": "How soon does the loss rise?",
    "binarisation": "Does PGD find adversarial examples that exist by construction?",
    "contract": "Are the logits finite, no probabilities, and the image's own?",
}


OF_RANDOMIZED: Final = frozenset({"double_draws", "draws", "fixed_draws", "retries", "gradient_noise"})
"""Those that ask after a randomized defense's draws."""
CONDITIONAL: Final = frozenset({"gradient_modes", "binarisation", "distortion", "finite_differences", "transfer"})
"""Those that need what a sound defense may lack: a second gradient path, time for hundreds of passes, images that a
single step leaves right or where the gradient is not zero, another defense of the same data."""


def find_idle(findings: Iterable[Mapping[str, Any]], *, randomized: bool) -> list[str]:
    """The checks of an audit that were not run although they can be: none where gradients are found to be missing.

    Args:
        findings: as `Audit.to_json` gives them.
        randomized: whether the defense is.
    """
    verdicts = {finding["check"]: finding["verdict"] for finding in findings}
    if verdicts.get("zero_gradients") == "fail":
        return []
    excused = CONDITIONAL if randomized else CONDITIONAL | OF_RANDOMIZED
    return [name for name, verdict in verdicts.items() if verdict == "not run" and name not in excused]


def overall(verdicts: Collection[str]) -> Overall:
    """The verdict on the defense: `masked` if any check fails, else `suspect` if any is or if none was run.

    Args:
        verdicts: of the checks.
    """
    if "fail" in verdicts:
        return "masked"
    return "suspect" if "suspect" in verdicts or set(verdicts) <= {"not run"} else "pass"
