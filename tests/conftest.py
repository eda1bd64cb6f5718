"""Hooks and fixtures; what tests import lies in tests/support.

Every test that takes the fixture `backend` runs on every backend.
"""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

pytest.register_assert_rewrite("support")

from support.backends import BACKENDS, DEVICE, GPU_BACKENDS, INTERPRETED, Backend
from support.sampling import select
from support.torchvision_operators import stand_in

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")
if DEVICE == "cuda":
    torch.set_default_device(DEVICE)
if INTERPRETED:
    from support import interpreter
stand_in()


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:  # NumPy warns of every NaN and infinity that a kernel handles
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        interpreter.mend()
    if DEVICE == "cuda":  # torch's own operators may be as they are
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="many more of the combinations of parameters"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of many combinations of parameters some; all of a test that is named on the command line."""
    if not any("::" in argument for argument in config.args):
        items[:], left_out = select(items, config.getoption("long"))
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=tuple(BACKENDS.values()), ids=tuple(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend, one after the other."""
    with request.param.active():
        yield request.param


@pytest.fixture(
    params=tuple(GPU_BACKENDS.values()) or (None,), ids=tuple(GPU_BACKENDS) or ("none",)
)
def gpu(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The GPU kernels, where they can run."""
    if request.param is None:
        pytest.skip("needs a GPU, TRITON_INTERPRET=1 or g++")
    with request.param.active():
        yield request.param


@pytest.fixture(autouse=True, scope="session")
def _surroundings() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel forgets to write is seen. Threads only where tested."""
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)
