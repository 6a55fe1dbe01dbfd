"""Without a GPU the kernels run in Triton's interpreter: the switch must be set before anything imports triton."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if not shutil.which("nvidia-smi"):
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "kernels")]
GOLDEN = Path(__file__).parent / "golden"
FUZZ_EXAMPLES = int(os.environ.get("NSAGEN_FUZZ", "24"))

hypothesis.settings.register_profile(
    "nsagen",
    deadline=None,
    derandomize="NSAGEN_FUZZ" not in os.environ,  # `make test` draws the same examples every time, `make fuzz` new ones
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("nsagen")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write tests/golden/ anew instead of comparing")


@pytest.fixture(params=[False, True], ids=["shared out", "whole"])
def one_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a step of one token is a program's alone, as with many sequences."""
    from nsagen.runtime import split

    if request.param:
        monkeypatch.setattr(split, "PROGRAMS", 1)
    return request.param


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) compares text with tests/golden/name, or writes it under --update-goldens."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-goldens"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest --update-goldens"
        assert text == path.read_text(), f"{name} changed: look at the diff, then run pytest --update-goldens"

    return check


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are NaN before a launch, so that a row which nobody writes shows."""
    from nsagen.runtime import launch

    monkeypatch.setattr(launch, "POISON", True)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests' modules stay out of the user's cache."""
    before = os.environ.get("NSAGEN_CACHE_DIR")
    os.environ["NSAGEN_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        os.environ.pop("NSAGEN_CACHE_DIR")
    else:
        os.environ["NSAGEN_CACHE_DIR"] = before


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the test's own, and no shipped measurements."""
    from nsagen.runtime import cache, tuned

    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_fallback", None)
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path / "shipped")
    tuned._shipped.cache_clear()
    yield tmp_path / "cache"
    tuned._shipped.cache_clear()
