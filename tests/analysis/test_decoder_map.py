"""The map of directions in the plane."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.decoder_map import decoder_map
from neuron_explainer.errors import InputError, MissingExtraError
from tests.analysis.direction_models import array, autoencoder


def rows() -> torch.Tensor:
    """Two groups of directions; lengths differ and must not matter."""
    torch.manual_seed(0)
    centres = torch.eye(8)[:2].repeat_interleave(20, dim=0)
    return (centres + 0.1 * torch.randn(40, 8)) * torch.rand(40, 1).add(0.1)


def test_the_plane_is_that_of_the_principal_components() -> None:
    x = array(rows())
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    _, singular, components = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ components[:2].T
    found = decoder_map(rows(), "pca")
    signs = np.sign((found.coordinates * expected).sum(0))
    np.testing.assert_allclose(found.coordinates * signs, expected, atol=1e-5)
    assert found.explained == pytest.approx((singular[:2] ** 2).sum() / (singular**2).sum())
    assert np.array_equal(found.coordinates, decoder_map(rows(), "pca").coordinates)
    assert "pca" in repr(found)
    first = found.coordinates[:20, 0] > 0
    assert first.all() or not first.any()
    assert (found.coordinates[20:, 0] > 0).all() != first.all()


def test_rows_of_zeros_have_no_place() -> None:
    x = rows()
    x[3] = 0
    found = decoder_map(x, "pca").coordinates
    assert np.isnan(found[3]).all()
    without = decoder_map(x[torch.arange(40) != 3], "pca").coordinates
    np.testing.assert_array_equal(np.delete(found, 3, axis=0), without)
    with pytest.raises(InputError, match="3 directions or more, found 0"):
        decoder_map(torch.zeros(9, 4), "pca")
    with pytest.raises(InputError, match="method must be"):
        decoder_map(x, "tsne")  # type: ignore[arg-type]


class FakeUmap(types.ModuleType):
    """Counts how often a map is computed."""

    def __init__(self) -> None:
        super().__init__("umap")
        self.calls: list[dict[str, object]] = []
        self.UMAP = self.make

    def make(self, **settings):
        self.calls.append(settings)
        return types.SimpleNamespace(fit_transform=lambda x: np.float32(x[:, :2]))


def test_umap_is_used_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    assert decoder_map(rows()).method == "pca"
    with pytest.raises(MissingExtraError, match="pip install umap-learn"):
        decoder_map(rows(), "umap")
    fake = FakeUmap()
    monkeypatch.setitem(sys.modules, "umap", fake)
    first = decoder_map(rows(), cache=tmp_path, seed=3)
    assert first.method == "umap"
    assert first.explained is None
    assert fake.calls[0]["random_state"] == 3
    assert fake.calls[0]["metric"] == "cosine"
    again = decoder_map(rows(), cache=tmp_path, seed=3)  # read from the folder
    assert len(fake.calls) == 1
    assert (again.method, again.seed, again.explained) == ("umap", 3, None)
    np.testing.assert_array_equal(again.coordinates, first.coordinates)
    decoder_map(rows() + 1e-3, cache=tmp_path, seed=3)  # other rows
    decoder_map(rows(), cache=tmp_path, seed=4)
    assert len(fake.calls) == 3
    for kept in tmp_path.iterdir():
        kept.write_bytes(kept.read_bytes()[:40])  # damaged
    decoder_map(rows(), cache=tmp_path, seed=3)
    assert len(fake.calls) == 4
    decoder_map(torch.eye(3))
    assert [call["init"] for call in fake.calls[-2:]] == ["spectral", "random"]


def test_an_autoencoder_has_a_map() -> None:
    made = autoencoder("0/resid.torso.post_mlp")
    found = decoder_map(made, "pca").coordinates
    np.testing.assert_array_equal(found, decoder_map(made.decoder.weight.t(), "pca").coordinates)
    assert not np.array_equal(found, decoder_map(made, "pca", side="encoder").coordinates)


def test_umap_itself() -> None:
    pytest.importorskip("umap")
    a, b = (decoder_map(rows(), "umap", seed=1).coordinates for _ in range(2))
    np.testing.assert_array_equal(a, b)
    apart = np.linalg.norm(a[:, None] - a[None], axis=-1)
    assert apart[:20, :20].max() < apart[:20, 20:].min()


@pytest.mark.parametrize(
    "few", [torch.eye(3), torch.tensor([[1.0], [2.0], [-1.0], [3.0]])], ids=["three", "opposite"]
)
def test_umap_of_few_directions_and_of_opposite_ones(few: torch.Tensor) -> None:
    pytest.importorskip("umap")
    assert np.isfinite(decoder_map(few, "umap").coordinates).all()
