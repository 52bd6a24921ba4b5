"""Memory that is used again: never while a tensor has it, and only where that was asked for."""

import threading

import pytest
import torch

from neuron_explainer.kernels import memory as sparse_memory
from neuron_explainer.kernels.memory import empty, kept, row_blocks

LIKE = torch.zeros(())
SHAPE = (4, 1000)


@pytest.fixture(autouse=True)
def _every_size_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_memory, "_WORTH_IT", 0)


def test_what_a_tensor_has_is_not_given_again() -> None:
    with kept():
        one, other = empty(SHAPE, LIKE).fill_(1), empty(SHAPE, LIKE).fill_(2)
        assert (one.shape, one.dtype) == (SHAPE, torch.float32)
        view = one[1:, :10]
        gone = other.data_ptr()
        del one, other
        third = empty(SHAPE, LIKE).fill_(3)
        assert third.data_ptr() == gone
        assert (view == 1).all()
        graph = third.view(-1).requires_grad_().exp()
        del third
        fourth = empty(SHAPE, LIKE).fill_(4)
        assert fourth.data_ptr() != gone
        assert torch.allclose(graph, torch.tensor(3.0).exp())


def test_other_sizes_and_types() -> None:
    with kept():
        address = empty(SHAPE, LIKE).data_ptr()
        assert empty((4, 1001), LIKE).data_ptr() != address
        halves = empty((8, 1000), LIKE.half())  # as many bytes
        assert halves.data_ptr() == address
        assert halves.shape == (8, 1000)


def test_nothing_is_kept_outside_and_afterwards() -> None:
    empty(SHAPE, LIKE)
    assert getattr(sparse_memory._of_thread, "pools", None) is None
    with kept():
        with kept():
            empty(SHAPE, LIKE)
        assert sparse_memory._of_thread.pools
        seen = []
        other = threading.Thread(
            target=lambda: seen.append(hasattr(sparse_memory._of_thread, "pools"))
        )
        other.start()
        other.join()
        assert seen == [False]
    assert sparse_memory._of_thread.pools is None


def test_blocks_are_all_rows_in_order() -> None:
    x = torch.arange(1_000_000.0).view(1000, 1000)
    parts = list(row_blocks(x, x[:, :1]))
    assert len(parts) > 1
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([first for _, first in parts]), x[:, :1])
