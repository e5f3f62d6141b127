"""bfloat16: for the passes of gradients and of randomized defenses; no error is taken for granted."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_toys import Noisy, grid_images
from torch import Tensor
from torch.nn import functional

from robench.audit import audit
from robench.evaluate import evaluate
from robench.judge import judge
from robench.losses import margin
from robench.precision import OPERATIONS, has_bfloat16
from robench.rng import seeded
from robench.testing import ConvToy
from robench.testing.attacks import conv_case
from robench.threat import ThreatModel
from robench.train.recipe import autocast
from robench.victim import Victim


def passes(victim: Victim) -> list[tuple[int, int]]:
    return list(zip(victim.ledger.forwards.tolist(), victim.ledger.backwards.tolist(), strict=True))


def test_bfloat16_is_for_gradients_alone_where_nothing_is_random_and_near_to_float32() -> None:
    defense, x, y = conv_case(8)
    exact, rough = Victim(defense, "gradient", 8), Victim(defense, "gradient", 8, precision="bfloat16")
    assert torch.equal(rough.logits(x), exact.logits(x))
    assert torch.equal(rough.labels(x), exact.labels(x))
    true, found = exact.gradient(x, y), rough.gradient(x, y)
    right = margin(true.logits, y) < -0.5
    assert int(right.sum()) > 3
    assert not torch.equal(found.logits[right], true.logits[right])
    assert (found.grad.dtype, found.loss.dtype, found.logits.dtype) == (torch.float32,) * 3
    similarity = torch.cosine_similarity(found.grad.flatten(1), true.grad.flatten(1))
    assert float(similarity.min()) > 0.99


class RandomConv(ConvToy):
    """Adds noise to its images."""

    randomized = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.rand_like(x))


def test_all_passes_of_a_randomized_defense_are_in_bfloat16_but_the_judges() -> None:
    _, x, _ = conv_case(8)
    defense, answers = RandomConv().freeze(), {}
    for precision in ("float32", "bfloat16"):
        with seeded("draws"):
            answers[precision] = Victim(defense, "gradient", 8, eot=4, precision=precision).logits(x)
    assert answers["bfloat16"].dtype == torch.float32
    assert not torch.equal(*answers.values())
    torch.testing.assert_close(*answers.values(), atol=0.05 * float(answers["float32"].abs().max()), rtol=0)
    seen: list[bool] = []
    defense.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    judge(defense, x, 1)
    assert seen == [False]


class Shifted(ConvToy):
    """Answers otherwise in bfloat16: a constant that counts in the fast passes only."""

    def adaptive_forward(self, x: Tensor, mode: str | None = None) -> Tensor:
        shift = 100.0 * torch.is_autocast_enabled("cpu") * functional.one_hot(torch.tensor(2), 5)
        return super().adaptive_forward(x, mode) + shift


def test_an_error_in_bfloat16_is_confirmed_in_float32() -> None:
    """No error is taken for granted, and the confirming pass is counted for the images that needed it."""
    plain, x, _ = conv_case(8)
    y = plain(x).argmax(1)
    y[0] = 3 if int(y[0]) != 3 else 4  # wrong in float32 too
    y[1] = 2  # right in bfloat16: nothing to confirm
    victim = Victim(Shifted(), "gradient", 8, precision="bfloat16")
    found = victim.gradient(x, y, "margin")
    doubted = y != 2
    assert 0 < int(doubted.sum()) < 8
    torch.testing.assert_close(found.logits[doubted], plain(x)[doubted])
    torch.testing.assert_close(found.loss[doubted], margin(plain(x), y)[doubted])
    assert ((margin(found.logits, y) > 0) & doubted).tolist() == [True] + [False] * 7
    assert passes(victim) == [(1 + int(flag), 1) for flag in doubted.tolist()]


def test_a_randomized_defense_is_not_asked_twice() -> None:
    x, y = grid_images(4)
    victim = Victim(Noisy(), "gradient", 4, eot=3, precision="bfloat16")
    victim.gradient(x, (y + 1) % 3)
    assert passes(victim) == [(3, 3)] * 4


def find(name: str) -> Any:
    return operator.attrgetter(name)(torch.backends)


def set_for_all(precision: str) -> None:
    backends: Any = torch.backends
    backends.fp32_precision = precision


def choose(setting: str) -> None:
    """Chooses how float32 products are taken, as a user may before a run."""
    precisions = {"the new names": "tf32", "new names that forbid it": "ieee"}
    if setting in precisions:
        for name in OPERATIONS:
            find(name).fp32_precision = precisions[setting]
    elif setting == "the old names":
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("medium")
    elif setting == "one new name":
        find("cudnn.conv").fp32_precision = "ieee"
    elif setting == "the name for all":
        set_for_all("tf32")


def read_settings() -> list[object]:
    """All that says how float32 products are taken; the text of the error where torch refuses to say."""
    flags = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    found: list[object] = [find("fp32_precision"), *flags, *(find(name).fp32_precision for name in OPERATIONS)]
    for name in ("cudnn.allow_tf32", "cuda.matmul.allow_tf32"):
        try:
            found.append(find(name))
        except RuntimeError:
            found.append("contradiction")
    return found


class Looks(ConvToy):
    """Notes in each pass how its products are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[object]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(read_settings())
        with torch.backends.cudnn.flags(enabled=False):  # which reads the old names
            return super().forward(x)


@pytest.fixture
def float32_settings() -> Iterator[None]:
    before = [find(name).fp32_precision for name in OPERATIONS]
    yield
    set_for_all("none")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for name, precision in zip(OPERATIONS, before, strict=True):
        find(name).fp32_precision = precision


@pytest.mark.usefixtures("float32_settings")
@pytest.mark.parametrize(
    "setting",
    ["the defaults", "the old names", "the new names", "new names that forbid it", "one new name", "the name for all"],
)
def test_float32_is_float32_for_attacks_audit_and_judge_and_is_restored(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 has 10 bits of mantissa; torch takes it in convolutions on a GPU unless told otherwise."""
    monkeypatch.setattr(sys.modules["robench.evaluate"], "check_answers", lambda *_: None)  # passes before any unit
    defense, (_, x, y) = Looks(), conv_case(4)
    choose(setting)
    before = read_settings()
    evaluate(defense, "fgsm", ThreatModel("linf", 0.1), (x, y), device="cpu")
    judge(defense, x, 1)
    assert (run := len(defense.seen)) > 3
    audit(defense, ThreatModel("linf", 0.1), (x, y), checks="finite_differences", device="cpu")
    assert len(defense.seen) > run + 3
    assert {tuple(seen[4:]) for seen in defense.seen} == {("ieee",) * len(OPERATIONS) + (False, False)}
    assert {tuple(seen[1:4]) for seen in defense.seen} == {(before[1], False, True)}, "cudnn on, no benchmark, repeats"
    restored = zip(read_settings(), before, strict=True)
    assert all(now == then or then == "contradiction" for now, then in restored)


CAPABILITIES = {
    "Zen 3": ({"avx2": True, "avx512_bf16": False, "amx_bf16": False, "cpu_name": "AMD EPYC"}, False),
    "Sapphire Rapids": ({"avx2": True, "avx512_bf16": True, "amx_bf16": True, "cpu_name": "Xeon"}, True),
    "Graviton 3": ({"neon": True, "bf16": True, "architecture": "aarch64"}, True),
}


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], bool]]:
    """Pretends to be on a CPU; tells whether it has bfloat16."""

    def pretend(name: str) -> bool:
        capabilities, has = CAPABILITIES[name]
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        has_bfloat16.cache_clear()
        return has

    yield pretend
    monkeypatch.undo()
    has_bfloat16.cache_clear()


@pytest.mark.parametrize("name", CAPABILITIES)
def test_training_takes_bfloat16_only_where_the_cpu_has_it(name: str, on_cpu: Callable[[str], bool]) -> None:
    """Where it is emulated, a step of the ConvNet takes 21 times as long as in float32."""
    has = on_cpu(name)
    x = torch.rand(1, 1, 3, 3)
    with autocast(x):
        product = x[0, 0] @ x[0, 0]
    assert product.dtype == (torch.bfloat16 if has else torch.float32)


@pytest.mark.parametrize("name", CAPABILITIES)
def test_emulated_bfloat16_is_told(name: str, on_cpu: Callable[[str], bool], caplog: pytest.LogCaptureFixture) -> None:
    has = on_cpu(name)
    defense, x, y = conv_case(4)
    with caplog.at_level(logging.WARNING, "robench"):
        evaluate(defense, "fgsm", ThreatModel("linf", 0.1), (x, y), precision="bfloat16", device="cpu")
    assert ("only emulates bfloat16" in caplog.text) == (not has)
