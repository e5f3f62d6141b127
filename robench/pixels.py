"""Adversarial images on disk: in as few bytes as leave every answer of the defense as it is.

`uint8`: the image in steps of 1/255, rounded so that it stays within the bound. `steps`: the same image as its
difference from an original that is itself in such steps, modulo 256; on CIFAR-10 at 8/255 this compresses to a
thirteenth. `float16`: the difference from the original in half precision, rounded toward zero. `float32`: as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from robench.judge import judge_in_units
from robench.result import Evaluation
from robench.rng import seeded
from robench.threat import ThreatModel
from robench.unit_table import WORST

if TYPE_CHECKING:
    import pyarrow as pa

    from robench.defense import Defense
    from robench.plan import RunSpec
    from robench.types import Images, Mask

ROUNDINGS: Final = ("uint8", "float16", "float32")
"""From the shortest; the last one changes nothing."""
STEPS: Final = "steps"
ENCODINGS: Final = (STEPS, *ROUNDINGS)
LARGEST_DRIFT: Final = 0.5
"""How far rounding may move a randomized defense's accuracy, in standard errors between two runs of the judge.

`verify` doubts one honest row in 1,000; half an error makes that 2.7. At linf 0.3 whole steps of 1/255 end at 0.298,
which gave back 0.6 points on 1,000 images: `verify` saw it. In l2 half precision moved 17 of 100,000 answers: 0.3."""


def encode(
    result: Evaluation, eps: float, x: Images, defense: Defense | None, device: str = "cpu"
) -> tuple[pa.Table, dict[str, int]]:
    """The images of the worst case as a table, and how many are stored in which way.

    Each image of a deterministic defense takes the shortest encoding under which its answer is the one of the run. Of a
    randomized one all images take the shortest that moves the accuracy by far less than two runs of the judge differ.

    Args:
        result: the run.
        eps: the bound.
        x: the originals.
        defense: None stores all as float32. It is moved to the device.
        device: `cpu` or `cuda`, where the defense answers.

    Returns:
        Columns `index` (in the dataset), `encoding`, `pixels`; without rows where the worst case is not known.
    """
    import pyarrow as pa

    stored = result.answers(WORST, eps)
    if stored is None:  # an attack failed
        return pa.table({"index": pa.array([], pa.int64()), "encoding": pa.array([], pa.string()), "pixels": []}), {}
    x_adv = torch.from_numpy(result.images(WORST, eps))
    threat = ThreatModel(result.spec.norm, eps)
    chosen = np.full(len(x), "float32", dtype=object)
    exact = stored.votes
    if defense is not None and defense.randomized:
        exact = _judge(result.spec, x_adv, defense, device)
    for encoding in ROUNDINGS[:-1]:
        left = chosen == "float32"
        if defense is None or not left.any():
            break
        rounded = _round(encoding, x, x_adv, threat)
        inside = threat.contains(x, rounded) & ((rounded >= 0) & (rounded <= 1)).flatten(1).all(1)
        harmless = inside & _harmless(exact, _judge(result.spec, rounded, defense, device), stored.labels, defense)
        if defense.randomized:
            harmless[:] = harmless.all()
        chosen[left & harmless.numpy()] = encoding
    if torch.equal(_to_steps(x).float() / 255, x):
        chosen[chosen == "uint8"] = STEPS
    blobs = [_bytes(str(kind), x[row], x_adv[row], threat) for row, kind in enumerate(chosen)]
    table = pa.table({"index": result.indices, "encoding": pa.array(chosen, pa.string()), "pixels": blobs})
    return table, {kind: int((chosen == kind).sum()) for kind in ENCODINGS if (chosen == kind).any()}


def decode(table: pa.Table, x: Images, shape: tuple[int, ...]) -> Images:
    """The images of a table, float32 in [0, 1], given the originals of its rows.

    Raises:
        ValueError: an encoding is not known, or the bytes are not those of an image of this shape.
    """
    rows = zip(table["encoding"].to_pylist(), table["pixels"].to_pylist(), x.numpy(), strict=True)
    found = [_image(encoding, blob, original, shape) for encoding, blob, original in rows]
    return torch.from_numpy(np.stack(found)) if found else torch.zeros(0, *shape)


def _image(
    encoding: str, blob: bytes, original: npt.NDArray[np.float32], shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    if encoding not in ENCODINGS:
        raise ValueError(f'unknown encoding "{encoding}"')
    kind = np.dtype("uint8" if encoding == STEPS else encoding).newbyteorder("<")
    stored: npt.NDArray[Any] = np.frombuffer(blob, dtype=kind).reshape(shape)
    if encoding == STEPS:
        stored = stored + np.rint(255 * original).astype(np.uint8)  # modulo 256
    values = stored.astype(np.float32)
    if encoding == "float16":
        return original + values
    return values if encoding == "float32" else values / np.float32(255)


def _harmless(
    exact: npt.NDArray[np.int64], votes: npt.NDArray[np.int64], labels: npt.NDArray[np.int64], defense: Defense
) -> Mask:
    """On which rounded images the defense answers as on the exact ones; of a randomized one on all or none.

    A randomized defense judged both on the same draws, so that what differs is the rounding's doing alone.
    """
    if not defense.randomized:
        return torch.from_numpy((votes == exact).all(1))
    rows, repeats = np.arange(len(labels)), exact.sum(1)
    before, after = (counts[rows, labels] / repeats for counts in (exact, votes))
    noise = np.sqrt((2 * before * (1 - before) / repeats).sum()) / len(rows)
    moved = abs(float((after - before).mean())) > LARGEST_DRIFT * noise
    return torch.full((len(rows),), not moved)


def _judge(spec: RunSpec, x: Images, defense: Defense, device: str) -> npt.NDArray[np.int64]:
    defense = defense.to(device)
    with seeded(spec.seed, "bundle", device=device):
        votes = judge_in_units(defense, x.to(device), spec.judge_repeats, spec.unit_size)
    found: npt.NDArray[np.int64] = votes.numpy()
    return found


def _round(encoding: str, x: Images, x_adv: Images, threat: ThreatModel) -> Images:
    """What comes back of images that are stored so."""
    if encoding == "float16":
        return x + torch.from_numpy(_half_toward_zero((x_adv - x).numpy()).astype(np.float32))
    return _steps(x, x_adv, threat).float() / 255


def _to_steps(x: Images) -> torch.Tensor:
    return (255 * x).round().to(torch.uint8)


def _steps(x: Images, x_adv: Images, threat: ThreatModel) -> torch.Tensor:
    if threat.norm == "linf":
        low, high = (255 * (x - threat.eps) - 1e-3).ceil(), (255 * (x + threat.eps) + 1e-3).floor()
        rounded = (255 * x_adv).round().maximum(low).minimum(high)
    else:  # rounding lengthens a difference by the length of what is rounded off, at right angles to it
        rounded = (255 * (x + 0.99 * (x_adv - x))).round() if threat.norm == "l2" else (255 * x_adv).round()
    return rounded.clamp(0, 255).to(torch.uint8)


def _bytes(encoding: str, x: Images, x_adv: Images, threat: ThreatModel) -> bytes:
    if encoding in ("uint8", STEPS):
        steps = _steps(x, x_adv, threat)
        return (steps if encoding == "uint8" else steps - _to_steps(x)).numpy().tobytes()
    values: npt.NDArray[Any] = (
        _half_toward_zero((x_adv - x).numpy()) if encoding == "float16" else x_adv.numpy().astype("<f4")
    )
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


def _half_toward_zero(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    half = values.astype(np.float16)
    longer = np.abs(half.astype(np.float32)) > np.abs(values)
    return np.where(longer, np.nextafter(half, np.float16(0)), half).astype(np.float16)
