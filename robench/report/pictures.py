"""Adversarial images of a leaderboard's row: which are shown, and what is said of each."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from robench.bundle import Bundle
from robench.data_part import load_of_digest
from robench.errors import RobenchError
from robench.estimate import Answers
from robench.types import Images
from robench.unit_table import CLEAN, WORST

PICTURES: Final = 8
"""Adversarial images shown of a row."""


@dataclass(frozen=True)
class Picture:
    """An adversarial image as a page shows it.

    Attributes:
        png: original, adversarial image and difference side by side, in base64.
        text: the label and the wrong answer: `Coat → Shirt (98 of 100 wrong)`.
    """

    png: str
    text: str


def make_pictures(bundle: Bundle, data_dir: Path | None) -> list[Picture]:
    """The adversarial images that `choose_broken` names; none without the data."""
    worst, clean = bundle.figures.answers(WORST), bundle.figures.answers(CLEAN)
    if worst is None or clean is None or not bundle.encodings:
        return []
    spec = bundle.spec
    try:
        data = load_of_digest(spec.data_digest, spec.dataset, spec.n, spec.seed, data_dir)
    except RobenchError:
        return []
    if data.digest != spec.data_digest:
        return []
    places = choose_broken(clean, worst)
    x = data.x[places]
    strips = draw_strips(x, bundle.pictures(places, x))
    texts = [tell_answer(worst, place, data.class_names) for place in places]
    return [Picture(png, text) for png, text in zip(strips, texts, strict=True)]


def choose_broken(clean: Answers, worst: Answers) -> list[int]:
    """Positions of the images that lost most right answers, of those whose majority was right and is no more.

    One draw of noise makes an answer of a randomized defense wrong now and then, so that an image with fewer right
    answers than before need not be broken. Only where no majority was lost, others are taken.
    """
    drop = clean.right / clean.repeats - worst.right / worst.repeats
    order = np.argsort(-drop, kind="stable")
    broken = order[(clean.won & ~worst.won)[order]]
    return (broken if len(broken) else order)[:PICTURES].tolist()


def tell_answer(answers: Answers, place: int, names: Sequence[str]) -> str:
    """An image's label, its most frequent wrong answer, and how many answers are wrong where there are several."""

    def name(number: int) -> str:
        return names[number] if number < len(names) else str(number)

    label, repeats = int(answers.labels[place]), answers.repeats
    wrong = repeats - int(answers.right[place])
    if not wrong:
        return f"{name(label)}, still right"
    others = answers.votes[place].copy()
    others[label] = -1
    counted = f" ({wrong} of {repeats} wrong)" if repeats > 1 else ""
    return f"{name(label)} → {name(int(others.argmax()))}{counted}"


def draw_strips(x: Images, x_adv: Images) -> list[str]:
    """Each original, its adversarial image and their difference around grey, all on one scale, as PNG in base64."""
    spread = (x_adv - x).abs().amax().clamp_min(1e-12)
    parts = torch.stack([x, x_adv, 0.5 + (x_adv - x) / (2 * spread)], dim=1)  # b 3 c h w
    framed = torch.nn.functional.pad(parts, (1, 1, 1, 1), value=1.0)
    pixels = (255 * framed.clamp(0, 1)).round().to(torch.uint8).permute(0, 3, 1, 4, 2).flatten(2, 3)  # b h 3w c
    return [_encode(one.numpy()) for one in pixels]


def _encode(pixels: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
