"""Set-up of all tests: shapes and types checked at run time, the `data` marker, --update-golden."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook
from browser import find_browser

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when torch is imported
if os.environ.get("ROBENCH_TEST_CUDA") != "1":  # the toys' tensors, the draws and the figures expected are the CPU's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

if "robench" in sys.modules:
    raise RuntimeError("robench was imported before tests/conftest.py: its signatures would go unchecked")
# An int passes for a float, as in mypy. `Self` goes unchecked: beartype knows it in classes, not method by method.
TYPECHECKER = """beartype.beartype(conf=beartype.BeartypeConf(
    is_pep484_tower=True,
    hint_overrides=beartype.FrozenDict({__import__("typing").Self: __import__("typing").Any}),
))"""
jaxtyping.install_import_hook("robench", TYPECHECKER)
# The contract tests are shipped inside the package: there pytest's finder, which rewrites assert, must come first.
pytest.register_assert_rewrite("robench.testing")
sys.meta_path.sort(key=lambda finder: not isinstance(finder, AssertionRewritingHook))

hypothesis.settings.register_profile("robench", deadline=None)  # a busy machine is no error
hypothesis.settings.load_profile("robench")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files; review the diff")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session")
def published_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of this repository's leaderboards, which is not kept in it."""
    from robench.command_board import build_page  # not before the import hook

    folder = Path(__file__).parents[1] / "leaderboards"
    return build_page(folder, [], tmp_path_factory.mktemp("page") / "index.html", None)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test whose marker asks for what is not here; with ROBENCH_REQUIRE_... = 1 (CI) it fails instead."""
    if item.get_closest_marker("data") is not None:
        folder = os.environ.get("ROBENCH_DATA", "")
        if not (folder and Path(folder).is_dir()):
            reason = f"ROBENCH_DATA is not a folder: {folder}" if folder else "ROBENCH_DATA is not set"
            _do_without(reason, "ROBENCH_REQUIRE_DATA")
    if item.get_closest_marker("browser") is not None and find_browser() is None:
        _do_without("there is no chromium", "ROBENCH_REQUIRE_BROWSER")


def _do_without(reason: str, required: str) -> None:
    if os.environ.get(required) == "1":
        pytest.fail(f"{reason}, and {required}=1", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny batches are quicker on one thread, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder ROBENCH_DATA; only for tests marked `data`."""
    return Path(os.environ["ROBENCH_DATA"])
