"""For the tests that need a GPU, which `make gpu` runs. Without a GPU they fail: nothing here is skipped."""

from contextlib import ExitStack

import pytest
import torch

from bench.providers import cuda_settings
from cbn_ext import use_backend

# The largest cluster that the launch planning may take: only the streaming kernels, one resident block, several.
PATHS = {"streaming": 0, "block": 1, "cluster": 8}

# Tensors on the host are too small to share, and processes that test side by side share the cores.
torch.set_num_threads(1)


def pytest_sessionstart(session):
    if not (session.config.option.collectonly or torch.cuda.is_available()):
        raise pytest.UsageError("these tests need a CUDA GPU, and torch finds none")


@pytest.fixture(autouse=True)
def _native():
    """The CUDA operators or an error that says why not, and the same data in every run."""
    torch.manual_seed(0)
    with use_backend("native"):
        yield


@pytest.fixture
def limit_cluster():
    """A function that sets CBN_CUDA_CLUSTER, for this test."""
    with ExitStack() as settings:
        yield lambda blocks: settings.enter_context(cuda_settings({"CLUSTER": blocks}))


@pytest.fixture(params=PATHS)
def path(request, limit_cluster):
    """Runs the test once on each path of the kernels."""
    limit_cluster(PATHS[request.param])
