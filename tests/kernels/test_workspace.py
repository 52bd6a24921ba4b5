"""Memory that is used again: from step to step, and never by two tensors of one step."""

import pytest
import torch

from neuron_explainer.kernels.workspace import Workspace, empty, row_blocks

LIKE = torch.zeros(())
SHAPE = (4, 1000)


def test_gradients_of_one_step_share_nothing() -> None:
    workspace = Workspace(min_bytes=0)
    one, other = (workspace.gradient(SHAPE, LIKE).fill_(i) for i in (1, 2))
    assert (one.shape, one.dtype) == (SHAPE, torch.float32)
    assert (one == 1).all()
    assert (other == 2).all()


def test_the_next_step_has_the_same_memory() -> None:
    workspace = Workspace(min_bytes=0)
    sizes = (SHAPE, SHAPE, (4, 1001))
    first = [workspace.gradient(shape, LIKE).data_ptr() for shape in sizes]
    assert len(set(first)) == 3
    workspace.next_step()
    assert [workspace.gradient(shape, LIKE).data_ptr() for shape in sizes] == first
    workspace.next_step()
    halves = workspace.gradient((8, 1000), LIKE.half())  # as many bytes
    assert (halves.data_ptr(), halves.shape) == (first[0], (8, 1000))


def test_scratch_is_one_place_that_grows() -> None:
    workspace = Workspace(min_bytes=0)
    large = workspace.scratch((9, 1000), LIKE).data_ptr()
    small = workspace.scratch(SHAPE, LIKE)
    assert (small.data_ptr(), small.shape) == (large, SHAPE)
    assert workspace.scratch((20, 1000), LIKE).fill_(3).sum() == 60_000


def test_two_workspaces_share_nothing() -> None:
    one, other = (Workspace(min_bytes=0).gradient(SHAPE, LIKE).fill_(i) for i in (1, 2))
    assert (one == 1).all()
    assert (other == 2).all()


def test_small_tensors_are_the_allocators() -> None:
    workspace = Workspace()
    one = workspace.gradient(SHAPE, LIKE).fill_(1)
    workspace.next_step()
    workspace.gradient(SHAPE, LIKE).fill_(2)
    assert (one == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 3, 1 << 14])
def test_large_tensors_are_ordinary_tensors(rows: int, dtype: torch.dtype) -> None:
    like = torch.ones((), dtype=dtype)
    tensor = empty((rows, 256), like).fill_(2)
    assert (tensor.shape, tensor.dtype) == ((rows, 256), dtype)
    assert tensor.is_contiguous()
    view = tensor[1:]
    del tensor
    assert float(view.sum()) == 2 * 256 * max(0, rows - 1)


def test_blocks_are_all_rows_in_order() -> None:
    x = torch.arange(1_000_000.0).view(1000, 1000)
    parts = list(row_blocks(x, x[:, :1]))
    assert len(parts) > 1
    assert torch.equal(torch.cat([part for part, _ in parts]), x)
    assert torch.equal(torch.cat([first for _, first in parts]), x[:, :1])
