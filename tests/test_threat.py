"""The threat model: projections, distances, steps and bounds, against numpy, scipy and the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from robench.errors import UsageError
from robench.rng import seeded
from robench.threat import NORMS, ThreatModel, _meant, format_eps, parse_eps

BOUNDS = {"linf": (0.01, 1.0), "l2": (0.02, 5.0), "l1": (0.05, 20.0), "l0": (0, 12)}
seeds = st.integers(0, 2**32 - 1)


@st.composite
def threats(draw: st.DrawFn) -> ThreatModel:
    norm = draw(st.sampled_from(NORMS))
    low, high = BOUNDS[norm]
    eps = draw(st.integers(int(low), int(high)) if norm == "l0" else st.floats(low, high))
    return ThreatModel(norm, float(eps))


@st.composite
def pairs(draw: st.DrawFn, reach: float = 2.0) -> tuple[Tensor, Tensor]:
    """Originals in the box, some pixels at its faces, and points around them, some pixels unmoved."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    generator = np.random.default_rng(draw(seeds))
    x = np.clip(generator.uniform(-0.3, 1.3, shape), 0, 1)
    scale = draw(st.floats(0.0, reach))
    moved = generator.uniform(-scale, scale, shape) * (generator.random(shape) < draw(st.floats(0.2, 1.0)))
    return torch.from_numpy(x).float(), torch.from_numpy(x + moved).float()


def reference_distance(norm: str, x: Tensor, x_adv: Tensor) -> np.ndarray:
    delta = (x_adv.double() - x.double()).numpy()
    flat = np.abs(delta.reshape(len(delta), -1))
    if norm == "l0":
        return (np.abs(delta) > 0).any(axis=1).reshape(len(delta), -1).sum(1)
    return np.linalg.norm(flat, ord={"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)


@given(threat=threats(), pair=pairs())
def test_projection_lands_in_ball_and_box(threat: ThreatModel, pair: tuple[Tensor, Tensor]) -> None:
    x, point = pair
    assert bool(threat.contains(x, threat.project(x, point)).all())


@given(threat=threats(), pair=pairs())
def test_projection_is_idempotent(threat: ThreatModel, pair: tuple[Tensor, Tensor]) -> None:
    x, point = pair
    once = threat.project(x, point)
    torch.testing.assert_close(threat.project(x, once), once, rtol=0, atol=1e-5)


@given(threat=threats(), pair=pairs())
def test_projection_never_moves_a_point_that_is_inside(threat: ThreatModel, pair: tuple[Tensor, Tensor]) -> None:
    x, point = pair
    point = point.clamp(0, 1)
    inside = threat.distance(x, point) <= threat.eps * (1 - 1e-6)  # a hair inside: at the edge rounding decides
    projected = threat.project(x, point)
    torch.testing.assert_close(projected[inside], point[inside], rtol=0, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_moves_a_point_that_is_outside(norm: str) -> None:
    x, point = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0.9, 0.8, 0.7, 0.5]).view(1, 1, 2, 2)
    threat = ThreatModel(norm, 1.0 if norm == "l0" else 0.1)
    expected = {
        "linf": [0.6, 0.6, 0.6, 0.5],
        "l2": [0.5 + 0.1 * part / math.sqrt(0.29) for part in (0.4, 0.3, 0.2, 0.0)],
        "l1": [0.6, 0.5, 0.5, 0.5],
        "l0": [0.9, 0.5, 0.5, 0.5],
    }[norm]
    torch.testing.assert_close(threat.project(x, point).flatten(), torch.tensor(expected))


@given(seed=seeds, threat=threats(), size=st.integers(1, 4))
def test_random_start_is_inside(seed: int, threat: ThreatModel, size: int) -> None:
    with seeded(seed, "start"):
        x = torch.rand(3, 2, size, size).round(decimals=1)
        start = threat.random_start(x)
    assert bool(threat.contains(x, start).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_start_is_uniform_in_the_ball(norm: str) -> None:
    """In d dimensions the fraction of a uniform draw within half the radius is 2^-d; here d = 4, away from the box."""
    threat, x = ThreatModel(norm, 0.2), torch.full((4000, 1, 2, 2), 0.5)
    with seeded(1, "start"):
        distance = threat.distance(x, threat.random_start(x))
    expected = 4000 / 2**4
    assert abs(int((distance < 0.1).sum()) - expected) < 5 * math.sqrt(expected)


def test_random_start_in_l0_changes_that_many_pixels() -> None:
    x = torch.full((50, 3, 4, 4), 0.5)
    with seeded(0, "start"):
        distance = ThreatModel("l0", 5).distance(x, ThreatModel("l0", 5).random_start(x))
    assert distance.tolist() == [5.0] * 50


@given(norm=st.sampled_from(NORMS), pair=pairs())
def test_distance_is_numpy_s(norm: str, pair: tuple[Tensor, Tensor]) -> None:
    x, point = pair
    found = ThreatModel(norm, 1.0).distance(x, point).numpy()
    np.testing.assert_allclose(found, reference_distance(norm, x, point), rtol=1e-5, atol=1e-6)


def test_l0_counts_all_channels_of_a_location_once() -> None:
    x = torch.zeros(1, 3, 2, 2)
    point = x.clone()
    point[0, :, 0, 0] = 0.5
    point[0, 1, 1, 1] = 1e-8
    assert ThreatModel("l0", 1).distance(x, point).tolist() == [2.0]


@given(seed=seeds, norm=st.sampled_from(NORMS), power=st.integers(-36, 6))
def test_steepest_has_length_one_and_the_largest_inner_product(seed: int, norm: str, power: int) -> None:
    """Also for the gradients of a saturated softmax, whose squares underflow in float32."""
    generator = np.random.default_rng(seed)
    grad = torch.from_numpy(generator.normal(size=(2, 2, 2, 3)) * 10.0**power).float()
    threat = ThreatModel(norm, 1.0)
    step = threat.steepest(grad)
    torch.testing.assert_close(threat.distance(torch.zeros_like(grad), step), torch.ones(2))
    flat = grad.double().flatten(1)
    gain = (flat * step.double().flatten(1)).sum(1)
    best = {  # the dual norm; for l0, one pixel whose values move by one each
        "linf": flat.abs().sum(1),
        "l2": flat.norm(dim=1),
        "l1": flat.abs().amax(1),
        "l0": grad.double().abs().sum(1).flatten(1).amax(1),
    }[norm]
    torch.testing.assert_close(gain / best, torch.ones(2).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_of_no_gradient_is_no_step(norm: str) -> None:
    grad = torch.zeros(2, 1, 2, 2)
    grad[1, 0, 0, 1] = 3.0
    step = ThreatModel(norm, 1.0).steepest(grad)
    assert step.flatten().tolist() == [0.0] * 4 + [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e-7, 1.0000001, 5.0])
def test_contains_refuses_what_is_not_an_image(norm: str, value: float) -> None:
    x = torch.zeros(2, 1, 2, 2)
    x[:, 0, 0, 0] = min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.5
    x_adv = x.clone()
    x_adv[1, 0, 0, 0] = value
    assert ThreatModel(norm, 1.0).contains(x, x_adv).tolist() == [True, False]


@given(threat=threats(), pair=pairs())
def test_stretched_to_the_bound_along_the_line(threat: ThreatModel, pair: tuple[Tensor, Tensor]) -> None:
    """In the ball and the box, and at the bound unless the box or, in l0, the whole changes end before it."""
    x, point = pair
    found = threat.stretch(x, point)
    assert bool(threat.contains(x, found).all())
    inside = threat.project(x, point)
    away, before = (found - x).flatten(1), (inside - x).flatten(1)
    assert bool((away * before >= 0).all()), "no value turns round"
    assert bool((away.abs() >= before.abs() - 1e-6).all()), "none comes nearer"
    if threat.norm == "l0":
        assert torch.equal(found, inside)
        return
    cut_off = ((found == 0) | (found == 1)).flatten(1).any(1)
    short = threat.distance(x, found) < threat.eps * (1 - 1e-4) - 1e-6
    nowhere = threat.distance(x, inside) < 1e-12  # squares vanish in float32
    assert bool((~short | cut_off | nowhere).all())


@pytest.mark.parametrize("norm", NORMS)
def test_whole_box_holds_the_farthest_corner_and_no_more(norm: str) -> None:
    x = torch.zeros(2, 3, 5, 4)
    whole = ThreatModel(norm, 1).whole_box(x)
    assert bool(whole.contains(x, torch.ones_like(x)).all())
    torch.testing.assert_close(whole.distance(x, torch.ones_like(x)), torch.full((2,), whole.eps))


def test_stretched_by_hand() -> None:
    x = torch.full((3, 1, 1, 2), 0.5)
    point = x + torch.tensor([[0.03, 0.04], [0.0, 0.0], [3.0, 4.0]]).view(3, 1, 1, 2)
    found = ThreatModel("l2", 0.25).stretch(x, point) - x
    torch.testing.assert_close(found.flatten(1), torch.tensor([[0.15, 0.2], [0.0, 0.0], [0.15, 0.2]]))
    found = ThreatModel("linf", 0.2).stretch(x, point) - x
    torch.testing.assert_close(found.flatten(1), torch.tensor([[0.15, 0.2], [0.0, 0.0], [0.2, 0.2]]))


@given(pair=pairs(), eps=st.floats(0.05, 3.0))
@settings(max_examples=30)
def test_l1_projection_is_the_nearest_point_of_the_ball(pair: tuple[Tensor, Tensor], eps: float) -> None:
    """Against scipy on the split delta = p - q with p, q >= 0 and sum(p + q) <= eps; the box plays no part here."""
    x, point = pair
    x, point = torch.full_like(x[:1], 0.5), 0.5 + (point - x)[:1] / 4  # deltas within 1/2
    delta = (point - x).double().flatten().numpy()
    size = len(delta)

    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        gap = parts[:size] - parts[size:] - delta
        return float(gap @ gap) / 2, np.concatenate([gap, -gap])

    found = minimize(
        objective,
        np.zeros(2 * size),
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * (2 * size),
        constraints={"type": "ineq", "fun": lambda parts: eps - parts.sum(), "jac": lambda _: -np.ones(2 * size)},
        options={"ftol": 1e-12, "maxiter": 500},
    )
    projected = (ThreatModel("l1", eps).project(x, point) - x).double().flatten().numpy()
    np.testing.assert_allclose(projected, found.x[:size] - found.x[size:], atol=2e-4)


@given(pair=pairs(), eps=st.floats(0.05, 3.0))
def test_l1_projection_satisfies_its_optimality_conditions(pair: tuple[Tensor, Tensor], eps: float) -> None:
    """Soft thresholding with one threshold per image: zero where all is inside, else such that the ball is touched."""
    x, point = torch.full_like(pair[0], 0.5), 0.5 + (pair[1] - pair[0]) / 4
    threat = ThreatModel("l1", eps)
    before, after = (point - x).flatten(1), (threat.project(x, point) - x).flatten(1)
    shrink = (before.abs() - after.abs()).amax(1, keepdim=True)
    torch.testing.assert_close(after, before.sign() * (before.abs() - shrink).clamp_min(0), rtol=0, atol=1e-5)
    outside = before.abs().sum(1) > eps
    torch.testing.assert_close(after.abs().sum(1)[outside], torch.full((int(outside.sum()),), eps), rtol=0, atol=1e-5)
    torch.testing.assert_close(shrink[~outside], torch.zeros(int((~outside).sum()), 1), rtol=0, atol=1e-6)


# bounds as text


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.1", 0.1), ("2", 2.0), (" 1e-3 ", 1e-3), ("1/4", 0.25), ("0", 0.0)]
)
def test_parse_eps_reads_what_people_write(text: str, value: float) -> None:
    assert parse_eps(text) == value


@pytest.mark.parametrize(
    "text", ["", "x", "8/", "/255", "1/0", "1/2/3", "-0.1", "nan", "inf", "8/inf/2", "1,2", "1/-2"]
)
def test_parse_eps_refuses_the_rest(text: str) -> None:
    with pytest.raises(UsageError, match="eps must be"):
        parse_eps(text)


@pytest.mark.parametrize(
    ("eps", "norm", "text"),
    [
        (8 / 255, "linf", "8/255"),
        (1 / 255, "linf", "1/255"),
        (0.1, "linf", "0.1"),
        (0.2, "linf", "0.2"),
        (1.0, "linf", "1"),
        (0.0, "linf", "0"),
        (36 / 255, "l2", "36/255"),
        (300 / 255, "l2", "300/255"),
        (0.5, "l2", "0.5"),
        (0.123456, "l2", "0.123456"),
        (1.5, "l2", "1.5"),
        (5.0, "l0", "5"),
    ],
)
def test_format_eps_writes_what_the_field_writes(eps: float, norm: str, text: str) -> None:
    assert format_eps(eps, norm) == text
    assert parse_eps(text) == pytest.approx(eps, rel=1e-5)


@given(numerator=st.integers(1, 254), norm=st.sampled_from(["linf", "l2"]))
def test_pixel_steps_survive_the_round_trip(numerator: int, norm: str) -> None:
    eps = parse_eps(f"{numerator}/255")
    assert parse_eps(format_eps(eps, norm)) == pytest.approx(eps, abs=1e-12)


# the threat model itself


@pytest.mark.parametrize(
    ("norm", "eps", "message"),
    [
        ("l3", 0.1, "norm must be one of linf, l2, l1, l0"),
        ("Linf", 0.1, 'got "Linf"; did you mean linf[?]$'),
        ("L_inf", 0.1, "did you mean linf"),
        ("L2", 0.1, "did you mean l2"),
        ("inf", 0.1, "did you mean linf"),
        ("linf", -0.1, "finite and not negative"),
        ("l2", math.nan, "finite and not negative"),
        ("l1", math.inf, "finite and not negative"),
        ("linf", 8.0, "for example 8/255"),
        ("l0", 2.5, "a number of pixels"),
    ],
)
def test_threat_model_refuses(norm: str, eps: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ThreatModel(norm, eps)


def test_a_bound_before_its_norm_is_told() -> None:
    assert _meant(0.1, "linf") == '; the norm comes first: ThreatModel("linf", 0.1)'


def test_threat_model_is_a_value() -> None:
    assert ThreatModel("linf", 8 / 255) == ThreatModel("linf", parse_eps("8/255"))
    assert str(ThreatModel("linf", 8 / 255)) == "linf eps=8/255"
    whole, numpy_s = ThreatModel("l0", 5), ThreatModel("l2", np.float64(0.5))
    assert [repr(whole.eps), repr(numpy_s.eps)] == ["5.0", "0.5"]  # seeds and digests take the text


@pytest.mark.parametrize("norm", NORMS)
def test_bound_of_zero_allows_the_original_alone(norm: str) -> None:
    x = torch.linspace(0, 1, 12).view(1, 3, 2, 2)
    threat = ThreatModel(norm, 0.0)
    with seeded(0, "start"):
        points = threat.project(x, torch.rand_like(x)), threat.random_start(x)
    assert all(torch.equal(point, x) for point in points)
    assert threat.contains(x, x).tolist() == [True]
    assert threat.contains(x, (x + 0.01).clamp(0, 1)).tolist() == [False]
