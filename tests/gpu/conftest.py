"""The device of these tests: CUDA; or what ``NEURON_EXPLAINER_GPU_TESTS_ON`` says, to rehearse them."""

import os

import pytest
import torch

REHEARSAL = os.environ.get("NEURON_EXPLAINER_GPU_TESTS_ON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of them, with the reason, where there is no device to run them on."""
    why = (
        ""
        if torch.cuda.is_available() or REHEARSAL
        else f"no CUDA device (torch {torch.__version__})"
    )
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def device() -> torch.device:
    return torch.device(REHEARSAL or "cuda:0")
