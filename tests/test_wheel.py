"""The wheel holds what the checkout's packages hold, and the command runs from it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
# An editable install would find in the checkout what the wheel lacks; its finder is taken out before the command runs.
NO_EDITABLE = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
PLANTED = ("__init__.py", "deep/__init__.py", "deep/card.yaml", "weights/small.json", "weights/small.safetensors")


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout


def package_files(tree: Path) -> set[str]:
    """The files of the three package folders, under the names that they have in a wheel; links are not followed."""
    found = set()
    for folder, inside in (("robench", "robench"), ("defenses", "robench/defenses"), ("attacks", "robench/attacks")):
        for parent, _, names in os.walk(tree / folder):
            below = Path(inside) / Path(parent).relative_to(tree / folder)
            found |= {(below / name).as_posix() for name in names if not name.startswith(".")}
    return found


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout (setuptools would reuse a build/ beside it), with one nested plugin package more."""
    copy = tmp_path_factory.mktemp("checkout") / "robench"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for name in PLANTED:
        file = copy / "defenses" / "planted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    expected = package_files(tree)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, tree)
    assert package_files(tree) == expected, "the build wrote into the package folders"
    (built,) = folder.glob("robench-*.whl")
    return built


def test_wheel_equals_checkout(tree: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = package_files(tree)
    assert {f"robench/defenses/planted/{name}" for name in PLANTED} <= expected
    assert sorted(expected - names) == [], "in the checkout, not in the wheel: see package-data in pyproject.toml"
    assert sorted(names - expected) == [], "in the wheel, not in the checkout"


def test_wheel_holds_only_robench(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert "robench" in tops
    assert [top for top in tops if top != "robench" and not top.endswith(".dist-info")] == []
    assert [name for name in zipfile.ZipFile(wheel).namelist() if "leaderboards/" in name or "tests/" in name] == []


def test_command_runs_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel)
    (site / "sitecustomize.py").write_text(NO_EDITABLE)
    environment = {**os.environ, "PYTHONPATH": str(site)}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(sys.executable, "-c", "import robench, robench.defenses as d; print(robench.__file__, d.__file__)")
    assert all(Path(file).is_relative_to(site) for file in where.split())
    listed = run(site / "bin" / "robench", "list")
    assert "shortrun" in listed
    assert "pgd" in listed
