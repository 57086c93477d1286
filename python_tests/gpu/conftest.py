"""For the tests that need a GPU, which `make gpu` runs. Without a GPU they fail: nothing here is skipped."""

import pytest
import torch

from cbn_ext import use_backend

# What the launch planning may take: only the streaming kernels, one resident block, a cluster of them.
PATHS = {"streaming": "0", "block": "1", "cluster": "8"}


def pytest_sessionstart(session):
    if not (session.config.option.collectonly or torch.cuda.is_available()):
        raise pytest.UsageError("these tests need a CUDA GPU, and torch finds none")


@pytest.fixture(autouse=True)
def _native():
    """The CUDA operators or an error that says why not, and the same data in every run."""
    torch.manual_seed(0)
    with use_backend("native"):
        yield


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Runs the test once on each path of the kernels."""
    monkeypatch.setenv("CBN_CUDA_CLUSTER", PATHS[request.param])
