"""The evidence bundle of a leaderboard row: all that its numbers rest on, small enough to be published with it.

<digest>/manifest.json       what was run, and the digests of the files below; its own digest names the folder
<digest>/examples.parquet    the per-example table: answers on clean images, under each attack and in the worst case
<digest>/images.parquet      the adversarial image of the worst case, one for each example; see robench.pixels
<digest>/audit.json          the findings of the audit, where there was one
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from robench.check_names import VERDICTS, overall
from robench.errors import DataError, UsageError
from robench.files import write_atomic
from robench.text import parse_json
from robench.unit_table import CLEAN, WORST

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    from robench.defense import Defense
    from robench.leaderboard import Row
    from robench.plan import RunSpec
    from robench.result import Evaluation
    from robench.types import Images

SCHEMA: Final = 1
MANIFEST, EXAMPLES, IMAGES, AUDIT = "manifest.json", "examples.parquet", "images.parquet", "audit.json"
AUDIT_KINDS: Final[dict[str, type | tuple[type, ...]]] = {
    **dict.fromkeys(("verdict", "weights_digest", "dataset", "norm"), str),
    **dict.fromkeys(("failed", "findings"), list),
    "eps": (int, float),
    "n": int,
}
DIGEST: Final = 16
"""Letters of a bundle's digest, in the row and as the folder's name."""
KINDS: Final = {"schema": int, "spec": dict, "eps": float, "created": str, "encodings": dict, "files": dict}


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read, its files' digests checked.

    Attributes:
        folder: where it lies.
        spec: what was run, at one bound or several.
        eps: the bound of the row.
        created: the day of the run.
        encodings: how many images are stored in which way.
        audit: the findings, as `Audit.to_json` gives them; None where there was no audit.
    """

    folder: Path
    spec: RunSpec
    eps: float
    created: str
    encodings: Mapping[str, int]
    audit: dict[str, Any] | None

    @property
    def digest(self) -> str:
        """Names the folder, and stands in the row."""
        return self.folder.name

    def result(self, x: Images) -> Evaluation:
        """The evaluation at the bound, with the adversarial images of the worst case only.

        Args:
            x: the originals, on which some encodings rest.
        """
        from robench import pixels

        if not self.encodings:
            return self.figures
        return self._evaluation(pixels.decode(self._images, x, self.spec.image_shape))

    @property
    def is_told_right(self) -> bool:
        """Whether the manifest says how the images are stored: how many in which way, and of which positions."""
        found = Counter(self._images["encoding"].to_pylist())
        positions = self._images["index"].to_pylist()
        return found == self.encodings and (not found or positions == self.figures.indices.tolist())

    @cached_property
    def figures(self) -> Evaluation:
        """The evaluation at the bound without images."""
        return self._evaluation(None)

    def row(self) -> Row:
        """The leaderboard row that the bundle stands for, without a rank."""
        from robench.leaderboard import make_row

        return make_row(self.figures, self.eps, self.audit, self.digest)

    def pictures(self, positions: list[int], x: Images) -> Images:
        """The adversarial images at some positions, given the originals of these."""
        from robench import pixels

        return pixels.decode(self._images.take(positions), x, self.spec.image_shape)

    @cached_property
    def _images(self) -> pa.Table:
        return _read_table(self.folder / IMAGES)

    def _evaluation(self, images: Images | None) -> Evaluation:
        from robench.result import Evaluation

        spec = dataclasses.replace(self.spec, eps=(self.eps,))
        table = _read_table(self.folder / EXAMPLES)
        try:
            return Evaluation(spec, [_with_images(table, images)], folder=None, created=self.created)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DataError(f"{self.folder}: {EXAMPLES} does not fit the schema: {error}") from None


def write_bundle(
    result: Evaluation,
    eps: float,
    root: Path,
    audit: Mapping[str, Any] | None = None,
    defense: Defense | None = None,
    data_dir: Path | None = None,
    device: str = "cpu",
) -> Bundle:
    """Writes the bundle of a finished run at one of its bounds into `root/<digest>`; the same run gives the same bytes.

    Args:
        result: the run.
        eps: the bound.
        root: the folder of all bundles.
        audit: what `Audit.to_json` gave for this defense and threat model.
        defense: the defense, to see which images may be rounded without a change of its answers; None keeps float32.
        data_dir: folder with datasets; None: `ROBENCH_DATA`.
        device: `cpu` or `cuda`, where the defense answers.

    Raises:
        UsageError: the run's data has no name, an attack failed, or the folder cannot be written.
    """
    from robench import pixels
    from robench.data import load_dataset

    spec = result.spec
    if not spec.dataset:
        raise UsageError("evidence needs a named dataset; this run was on tensors handed over by the caller")
    data = load_dataset(spec.dataset, "test", spec.n, spec.seed, data_dir)
    if data.digest != spec.data_digest:
        raise UsageError(f'"{spec.dataset}" here holds other images than those of the run')
    images, encodings = pixels.encode(result, eps, data.x, defense, device)
    files = {EXAMPLES: _table_bytes(_examples(result, eps)), IMAGES: _table_bytes(images)}
    if audit is not None:
        files[AUDIT] = _json(audit)
    manifest = _json(
        {
            "schema": SCHEMA,
            "spec": spec.to_json(),
            "eps": eps,
            "created": result.created,
            "encodings": encodings,
            "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        }
    )
    folder = root / hashlib.sha256(manifest).hexdigest()[:DIGEST]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot make the folder {folder}: {error.strerror}") from None
    for name, content in {**files, MANIFEST: manifest}.items():
        write_atomic(folder / name, content)
    return read_bundle(folder)


def read_bundle(folder: Path) -> Bundle:
    """Reads a bundle and checks that each file is the one of the manifest, and the manifest the one of the name.

    Raises:
        UsageError: the folder or one of its files is missing.
        DataError: a file was changed, or does not fit the schema.
    """
    from robench.plan import RunSpec

    content = _content(folder, MANIFEST)
    digest = hashlib.sha256(content).hexdigest()[:DIGEST]
    if digest != folder.resolve().name:
        raise DataError(f"{folder}: {MANIFEST} has the digest {digest}, not the one that names the folder")
    try:
        manifest = parse_json(content)
        wrong = _misfits(manifest, KINDS)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: {MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if wrong or manifest["schema"] != SCHEMA:
        what = f"{wrong[0]} is of the wrong kind" if wrong else f"its schema is not {SCHEMA}"
        raise DataError(f"{folder}: {MANIFEST} does not fit: {what}")
    if not {EXAMPLES, IMAGES} <= manifest["files"].keys() <= {EXAMPLES, IMAGES, AUDIT}:
        raise DataError(f"{folder}: {MANIFEST} lists other files than a bundle has")
    for name, told in manifest["files"].items():
        if hashlib.sha256(_content(folder, name)).hexdigest() != told:
            raise DataError(f"{folder}: {name} was changed: it does not have the digest in {MANIFEST}")
    audit = check_audit(_content(folder, AUDIT), folder / AUDIT) if AUDIT in manifest["files"] else None
    spec = RunSpec.from_json(manifest["spec"])
    if manifest["eps"] not in spec.eps:
        raise DataError(f"{folder}: {MANIFEST} speaks of eps {manifest['eps']:g}, at which nothing was run")
    return Bundle(folder.resolve(), spec, manifest["eps"], manifest["created"], manifest["encodings"], audit)


def check_audit(content: bytes, path: Path) -> dict[str, Any]:
    """The findings of an audit as `Audit.to_json` wrote them.

    Raises:
        DataError: a field is missing or of the wrong kind, or the verdict is not that of the findings.
    """
    from robench.audit.effort import read_effort

    try:
        audit: dict[str, Any] = parse_json(content)
        wrong = _misfits(audit, AUDIT_KINDS)
        for name, values in audit["accuracies"].items():
            value, low, high = values
            wrong += [] if 0 <= low <= value <= high <= 100 else [name]
        read_effort(audit)
        for finding in audit["findings"]:
            wrong += [key for key in ("check", "verdict", "reason", "paper") if not isinstance(finding[key], str)]
            plot = finding.get("plot", {"curves": (), "x_label": "", "y_label": ""})
            labels = plot["x_label"], plot["y_label"], *(curve["label"] for curve in plot["curves"])
            wrong += [] if all(isinstance(label, str) for label in labels) else ["plot"]
            for curve in plot["curves"]:
                lengths = {len(curve["x"]), len(curve["y"]), len(curve["low"] or curve["x"])}
                values = [*curve["x"], *curve["y"], *curve["low"], *curve["high"]]
                wrong += ["plot"] if len(lengths) > 1 or not all(math.isfinite(value) for value in values) else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}). Run the audit again") from None
    if wrong:
        raise DataError(f"{path} does not fit the schema: {wrong[0]} is of the wrong kind. Run the audit again")
    verdicts = [finding["verdict"] for finding in audit["findings"]]
    failed = [finding["check"] for finding in audit["findings"] if finding["verdict"] == "fail"]
    if not {*verdicts} <= {*VERDICTS} or (audit["verdict"], audit["failed"]) != (overall(verdicts), failed):
        raise DataError(f"{path}: its verdict is not that of its findings. Run the audit again")
    return audit


def _misfits(content: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    """The keys whose values are not of their kind; True and False are no numbers."""
    return [key for key, kind in kinds.items() if not isinstance(content[key], kind) or isinstance(content[key], bool)]


def bundle_folder(root: Path, digest: str) -> Path:
    """Where the bundle of a row's `evidence` cell lies among all bundles.

    Raises:
        UsageError: the cell is empty, no digest, or there is no such bundle.
    """
    if not re.fullmatch(f"[0-9a-f]{{{DIGEST}}}", digest):
        raise UsageError(f'there is no evidence: "{digest}" is not the digest of a bundle')
    folder = root / digest
    if not folder.is_dir():
        raise UsageError(f"there is no evidence: {folder} is missing")
    return folder


def size(folder: Path) -> int:
    """Bytes of a bundle's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def _content(folder: Path, name: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except OSError:
        raise UsageError(f"{folder} cannot be checked: {name} is missing or cannot be read") from None


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _examples(result: Evaluation, eps: float) -> pa.Table:
    """The rows of the clean pass and of one bound, without images."""
    import pyarrow.compute as pc

    units = result.units
    kept = pc.or_(pc.equal(units["eps"], eps), pc.equal(units["attack"], CLEAN))
    return units.filter(kept).combine_chunks()


def _with_images(table: pa.Table, images: Images | None) -> pa.Table:
    """The units' table again: each image stands in the row of the attack that the worst case was taken from."""
    import pyarrow as pa

    blobs: list[bytes | None] = [None] * len(table)
    if images is not None:
        columns = table.select(["attack", "index", "chosen"]).to_pydict()
        place = {key: row for row, key in enumerate(zip(columns["attack"], columns["index"], strict=True))}
        worst = [row for row, attack in enumerate(columns["attack"]) if attack == WORST]
        pixels: npt.NDArray[np.float32] = images.numpy().astype("<f4")
        for row, image in zip(worst, pixels, strict=True):
            blobs[place[columns["chosen"][row], columns["index"][row]]] = image.tobytes()
    return table.append_column("x_adv", pa.array(blobs, pa.binary()))


def _table_bytes(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", compression_level=19)
    return buffer.getvalue()


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
