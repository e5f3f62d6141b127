"""The adversarial images of a leaderboard's row: which are shown, and what is said of each."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from robench.estimate import Answers
from robench.report.pictures import PICTURES, choose_broken, draw_strips, tell_answer

NAMES = ("Coat", "Bag", "Shirt")


def answers(*votes: tuple[int, int, int]) -> Answers:
    """Votes for three classes; the first is the right one."""
    return Answers(np.array(votes), np.zeros(len(votes), dtype=np.int64))


def test_images_that_are_mostly_right_are_not_shown_as_broken() -> None:
    """One draw less is no error found, nor is a majority that was wrong before."""
    clean = answers((20, 0, 0), (20, 0, 0), (20, 0, 0), (9, 11, 0), (18, 2, 0), (20, 0, 0))
    worst = answers((19, 1, 0), (3, 1, 16), (17, 3, 0), (0, 20, 0), (8, 12, 0), (10, 10, 0))
    assert choose_broken(clean, worst) == [1, 4, 5]  # they lost 17, 10 and 10 right answers


def test_shares_are_compared_where_the_answers_are_of_different_number() -> None:
    clean, worst = answers((100, 0, 0), (60, 40, 0)), answers((9, 11, 0), (0, 20, 0))
    assert choose_broken(clean, worst) == [1, 0]


def test_images_that_lost_most_are_shown_where_no_majority_was_lost() -> None:
    clean = answers(*[(20, 0, 0)] * 12)
    worst = answers(*[(20 - place % 3, place % 3, 0) for place in range(12)])
    assert choose_broken(clean, worst) == [2, 5, 8, 11, 1, 4, 7, 10]
    assert len(choose_broken(clean, answers(*[(0, 20, 0)] * 12))) == PICTURES


def test_an_image_is_told_by_its_label_and_its_most_frequent_wrong_answer() -> None:
    many = answers((2, 0, 98), (97, 3, 0), (100, 0, 0))
    told = [tell_answer(many, place, NAMES) for place in range(3)]
    assert told == ["Coat → Shirt (98 of 100 wrong)", "Coat → Bag (3 of 100 wrong)", "Coat, still right"]
    assert tell_answer(answers((0, 1, 0)), 0, NAMES) == "Coat → Bag"
    assert tell_answer(answers((0, 0, 1)), 0, NAMES[:2]) == "Coat → 2"


def test_each_strip_is_original_worst_case_and_difference() -> None:
    for channels in (1, 3):
        x = torch.full((2, channels, 4, 4), 0.2)
        x_adv = x + torch.tensor([0.1, 0.4]).view(2, 1, 1, 1)
        for strip, middle, right in zip(draw_strips(x, x_adv), (77, 153), (159, 255), strict=True):
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip))))
            assert pixels.shape[:2] == (6, 18)
            assert (pixels[1:5, 1:5] == 51).all()
            assert (abs(pixels[1:5, 7:11].astype(int) - middle) <= 1).all()
            assert (abs(pixels[1:5, 13:17].astype(int) - right) <= 1).all()
