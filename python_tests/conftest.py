"""Seeds, backends and hypothesis' profile, for all tests."""

import pytest
import torch
from hypothesis import settings

from cbn_ext import use_backend

# The same examples in every run; no deadline, because the first call loads libraries.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("repeatable")


# Most tensors here are too small to share; threads waiting for each other cost more than all else. The tests that are
# about threads ask for them.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    """Runs the test once with each backend."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    """A function that sets the number of threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
