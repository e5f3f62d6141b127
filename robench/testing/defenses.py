"""The contract of a defense as tests. Subclass `DefenseContract`, implement `build`, run pytest."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import ClassVar, Final

import pytest
import torch

from robench.defense import Defense, state_digest
from robench.errors import UsageError
from robench.losses import margin
from robench.rng import seeded
from robench.testing.attacks import describe_model, no_seeding
from robench.types import Images, Logits, PerExample
from robench.victim import Victim
from robench.weights import load_weights, save_weights

DERIVATIVE_STEP: Final = 1e-6
DERIVATIVE_TOLERANCE: Final = 1e-3
BATCH_TOLERANCE: Final = 1e-4
"""Relative to the largest logit: what the order of float32 sums may change when the batch is another."""


class DefenseContract:
    """What every defense must do; each test is one rule.

        class TestMine(DefenseContract):
            def build(self) -> Defense:
                return load_defense("mine")

    Attributes:
        count: random images of a test, besides a black and a white one; fewer for a slow defense.
    """

    count: ClassVar[int] = 3

    def build(self) -> Defense:
        """Builds the defense as `load_defense` does: frozen, in eval mode, on the CPU. Called once for each test."""
        raise NotImplementedError(f"{type(self).__name__} must implement build")

    def _build(self, label: str = "build") -> Defense:
        with seeded("contract", label):
            return self.build()

    def _images(self, defense: Defense, count: int = 0) -> Images:
        """Random images, away from the ends of the box."""
        with seeded("contract", "images"):
            return 0.2 + 0.6 * torch.rand(count or self.count, *defense.input_shape)

    def _answer(self, defense: Defense, x: Images, seed: str = "run") -> Logits:
        with torch.no_grad(), seeded("contract", seed):
            return defense(x)

    def test_fact_sheet(self) -> None:
        """The traits are valid, and the class's docstring says what it is."""
        defense = self._build()
        defense.check_traits()
        assert defense.name.isascii(), "the name must be ASCII: it is typed on a command line"
        modes = defense.gradient_modes
        assert len(set(modes)) == len(modes), f"gradient_modes must differ; got {modes}"
        assert all(isinstance(mode, str) and mode.isidentifier() for mode in modes), f"modes must be words; got {modes}"
        text = vars(type(defense)).get("__doc__") or ""
        assert text.strip(), f"{type(defense).__name__} has no docstring: threat models, cost, guarantee or none, paper"

    def test_comes_frozen_in_eval_mode_on_the_cpu(self) -> None:
        """No weight wants a gradient, no module is in train mode, and all is on the CPU."""
        defense = self._build()
        unfrozen = [name for name, parameter in defense.named_parameters() if parameter.requires_grad]
        assert not unfrozen, f"weights that require a gradient: {unfrozen}"
        training = [name or "the defense" for name, module in defense.named_modules() if module.training]
        assert not training, f"in train mode: {training}"
        devices = {str(value.device) for value in defense.state_dict().values()}
        assert devices <= {"cpu"}, f"weights must be on the CPU; some are on {devices}"

    def test_logits(self) -> None:
        """Logits are `b num_classes`, float32 and finite: on black, white and random images, and on one image alone."""
        defense = self._build()
        shape = (1, *defense.input_shape)
        x = torch.cat([torch.zeros(shape), torch.ones(shape), self._images(defense)])
        for rows in (x, x[-1:]):
            logits = self._answer(defense, rows)
            expected = (len(rows), defense.num_classes)
            assert tuple(logits.shape) == expected, f"logits must be {expected}; got {tuple(logits.shape)}"
            assert logits.dtype == torch.float32, f"logits must be float32; got {logits.dtype}"
            bad = (~logits.isfinite().all(1)).nonzero()[:, 0].tolist()
            assert not bad, f"logits must be finite; rows {bad} are not (row 0 is black, row 1 white)"

    def test_detection_score(self) -> None:
        """A detection score, where the defense has one, is one finite float per image, of each kind it names."""
        defense = self._build()
        overridden = type(defense).detection_score is not Defense.detection_score
        if not (overridden or defense.detection_scores):
            pytest.skip("the defense detects nothing")
        x = self._images(defense)
        calls = [functools.partial(defense.detection_score, x)]
        calls += [functools.partial(defense.detection_score, x, kind) for kind in defense.detection_scores]
        for detect in calls:
            with torch.no_grad(), seeded("contract", "run"):
                score = detect()
            assert tuple(score.shape) == (len(x),), f"detection_score must be {(len(x),)}; got {tuple(score.shape)}"
            assert bool(score.isfinite().all()), "detection_score must be finite"

    def test_pictures(self) -> None:
        """The rows of pictures, where the defense has some, are images in [0, 1] of its input's shape."""
        defense = self._build()
        if type(defense).pictures is Defense.pictures:
            pytest.skip("the defense shows nothing")
        x = self._images(defense)
        with torch.no_grad(), seeded("contract", "run"):
            rows = defense.pictures(x)
        assert rows, "pictures must give at least one row"
        for name, images in rows.items():
            assert images.shape[1:] == x.shape[1:], f'row "{name}" must be of shape {tuple(x.shape[1:])}'
            assert bool(((images >= 0) & (images <= 1)).all()), f'row "{name}" must be in [0, 1]'

    def test_randomized_as_declared(self) -> None:
        """Two calls in a row differ if and only if the defense declares that it is randomized."""
        defense = self._build()
        x = self._images(defense)
        with torch.no_grad(), seeded("contract", "run"):
            same = torch.equal(defense(x), defense(x))
        if defense.randomized:
            assert not same, "randomized = True, but two calls give the same bits"
        else:
            assert same, "randomized = False, but two calls on the same images differ"

    def test_batch_mates_do_not_matter(self) -> None:
        """Of a deterministic defense an image alone gets the logits that it gets in a batch, to 1e-4 of the largest."""
        defense = self._build()
        if defense.randomized:
            pytest.skip("the defense is randomized: what an image gets depends on its place in the batch")
        x = torch.cat([self._images(defense), torch.zeros(1, *defense.input_shape)])
        together = self._answer(defense, x)
        alone = torch.cat([self._answer(defense, row[None]) for row in x])
        gap = (together - alone).abs().max().item() / together.abs().max().item()
        assert gap <= BATCH_TOLERANCE, f"logits alone and in a batch differ by {gap:.2g} of the largest (BatchNorm?)"

    def test_randomness_is_torchs(self) -> None:
        """One state of torch's generator gives one answer: the defense seeds nothing and draws from nothing else."""
        defense = self._build()
        x = self._images(defense)
        with no_seeding("the defense"):
            first, second = (self._forward_from_state(defense, x) for _ in range(2))
        assert torch.equal(first, second), "two calls from one state of torch's global generator differ"

    def _forward_from_state(self, defense: Defense, x: Images) -> Logits:
        state = torch.get_rng_state()
        try:
            with torch.no_grad():
                return defense(x)
        finally:
            torch.set_rng_state(state)

    def test_forward_changes_nothing(self) -> None:
        """Neither forward nor adaptive_forward changes x, weights, buffers, modes or torch's settings."""
        defense = self._build()
        x = self._images(defense)
        given, before = x.clone(), describe_model(defense)
        settings = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
        self._answer(defense, given)
        for mode in (None, *defense.gradient_modes):
            with seeded("contract", "run"):
                defense.adaptive_forward(given.clone().requires_grad_(), mode)
        assert torch.equal(given, x), "forward changes x in place"
        assert describe_model(defense) == before, "a pass changes the weights, a buffer or the mode"
        after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
        assert after == settings, f"a pass changes torch's settings from {settings} to {after}"

    def test_gradient_matches_finite_differences(self) -> None:
        """In mode `full` the gradient is the derivative of adaptive_forward under frozen noise, in float64.

        Compared along a random direction, to 1e-3. A stand-in for a derivative (BPDA, a detached part) has another
        name than `full`.
        """
        defense = self._build()
        if "full" not in defense.gradient_modes:
            pytest.skip("the defense offers no full gradient")
        defense = copy.deepcopy(defense).double()
        x = self._images(defense, 2).double()
        with seeded("contract", "direction"):
            direction = torch.randn_like(x)
            weights = torch.randn(len(x), defense.num_classes, dtype=x.dtype)

        def value(images: Images) -> PerExample:
            with seeded("contract", "frozen noise"):
                return (defense.adaptive_forward(images, "full") * weights).sum(1)

        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(value(leaf).sum(), leaf)
        with torch.no_grad():
            step = DERIVATIVE_STEP * direction
            expected = (value(x + step) - value(x - step)) / (2 * DERIVATIVE_STEP)
        came = (grad * direction).flatten(1).sum(1)
        scale = torch.maximum(came.abs(), expected.abs()).clamp_min(1e-9)
        gap = ((came - expected).abs() / scale).max().item()
        assert gap <= DERIVATIVE_TOLERANCE, (
            f"the derivative is {expected.tolist()}; adaptive_forward gives {came.tolist()}"
        )

    def test_adaptive_forward_is_forward_or_declared(self) -> None:
        """Of a deterministic defense, mode `full` gives forward's logits, so that its gradient is forward's."""
        defense = self._build()
        if defense.randomized or "full" not in defense.gradient_modes:
            pytest.skip("adaptive_forward draws, or is a declared stand-in")
        x = self._images(defense)
        plain, adaptive = self._answer(defense, x), defense.adaptive_forward(x, "full").detach()
        gap = (plain - adaptive).abs().max().item() / plain.abs().max().item()
        assert gap <= BATCH_TOLERANCE, f"mode full differs from forward by {gap:.2g}; a stand-in needs another name"

    def test_every_gradient_mode_gives_a_gradient(self) -> None:
        """In each mode the gradient of the margin is finite and, for every image, not zero."""
        defense = self._build()
        x = self._images(defense)
        y = self._answer(defense, x).argmax(1)
        for mode in defense.gradient_modes:
            victim = Victim(defense, "gradient", len(x), mode=mode)
            with seeded("contract", "run"):
                grad = victim.gradient(x, y, margin).grad
            with seeded("contract", "run"):  # not by way of the victim, which puts 0 where it is not finite
                leaf = x.clone().requires_grad_()
                (raw,) = torch.autograd.grad(margin(defense.adaptive_forward(leaf, mode), y).sum(), leaf)
            assert bool(raw.isfinite().all()), f"mode {mode}: the gradient is not finite"
            assert bool((grad.flatten(1).abs().amax(1) > 0).all()), f"mode {mode}: the gradient is zero"

    def test_unknown_gradient_mode_is_refused(self) -> None:
        """A mode that the defense does not offer raises UsageError; `check_mode` does it."""
        defense = self._build()
        refused = False
        try:
            with seeded("contract", "run"):
                defense.adaptive_forward(self._images(defense, 1), "no_such_mode")
        except UsageError:
            refused = True
        assert refused, "adaptive_forward must refuse a mode that gradient_modes does not name: call check_mode"

    def test_weights_round_trip(self, tmp_path: Path) -> None:
        """The state_dict holds all that matters: written, and read into another instance, it gives the same logits."""
        defense, other = self._build(), self._build("another build")
        with torch.no_grad():
            for value in other.state_dict().values():
                value.add_(torch.ones_like(value))
        path = tmp_path / "weights.safetensors"
        save_weights(defense, path, {})
        load_weights(other, path)
        assert state_digest(other) == state_digest(defense), "the weights that come back are not those written"
        x = self._images(defense)
        assert torch.equal(self._answer(other, x), self._answer(defense, x)), "the same weights give other logits"
