"""What all tests share: a seed, and the number of threads."""

import os
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("torch"):
        (needed,) = marker.args
        if torch.__version__ < needed:  # compared as versions are
            pytest.skip(f"torch {torch.__version__} cannot: {needed} can")


@pytest.fixture(autouse=True)
def fresh_generator_and_threads() -> Iterator[None]:
    """Every test starts from one seed, so that it does not depend on those before it, and gives the threads back."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
