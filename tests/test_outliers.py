"""Images to be told from a dataset's own: means of two, and other datasets brought into its shape."""

from __future__ import annotations

import pytest
import torch

from robench import UsageError, load_data
from robench import outliers as outliers_module
from robench.outliers import make_outliers
from robench.types import Images, Labels


def test_outliers_between_two_images() -> None:
    """Each is the mean of two different test images, and every image is part of two of them."""
    own, _ = load_data("fashion_mnist", "test", 60, 0)
    found, made = make_outliers("interpolation", own, 60, 0)
    assert made == "means of two images"
    assert torch.equal(found, make_outliers("interpolation", own, 60, 0).x)
    assert not torch.equal(found, make_outliers("interpolation", own, 60, 1).x)
    torch.testing.assert_close(found.sum(0), own.sum(0))
    partners = [
        [(2 * row - one - other).abs().max().item() < 1e-5 for other in own] for row in found[:3] for one in own
    ]
    assert torch.tensor(partners).unflatten(0, (3, 60)).sum((1, 2)).tolist() == [2, 2, 2]


def test_grey_outliers_take_the_shape_of_images_in_colour() -> None:
    clothes, _ = load_data("fashion_mnist", "test", 60, 0)
    found, made = make_outliers("fashion_mnist", torch.zeros(60, 3, 32, 30), 60, 0)
    assert made == "a black frame of 2x1 pixels and grey in 3 equal channels"
    assert found.shape == (60, 3, 32, 30)
    assert torch.equal(found[:, 1, 2:30, 1:29], clothes[:, 0])
    assert found[:, :, :2].abs().sum().item() == found[:, :, :, 29:].abs().sum().item() == 0


def test_images_of_the_shape_stay_as_they_are() -> None:
    clothes, _ = load_data("fashion_mnist", "test", 20, 0)
    found, made = make_outliers("fashion_mnist", clothes.flip(0), 20, 0)
    assert made == ""
    assert torch.equal(found, clothes)


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 30, 30), (1, 28, 31)])
def test_what_would_lose_something_is_refused(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> tuple[Images, Labels]:
        return torch.zeros(4, *shape), torch.zeros(4).long()

    monkeypatch.setattr(outliers_module, "load_data", load)
    with pytest.raises(UsageError, match=r"do not bring to \(1, 28, 28\)\. Choose another --against"):
        make_outliers("other", torch.zeros(4, 1, 28, 28), 4, 0)
