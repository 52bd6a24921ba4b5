"""Absorption is found where it was built in, and nowhere else."""

import pytest
import torch
from torch import Tensor

from neuron_explainer.errors import InputError
from neuron_explainer.evaluation.absorption import (
    Absorption,
    absorbed,
    absorption,
    absorption_table,
    main_latents,
)
from neuron_explainer.models.autoencoders.latents import Latents

N_TOKENS, WIDTH, N_CHILDREN, N_OTHERS = 4000, 32, 5, 10


class Hierarchy:
    """A parent that is active on 40 % of tokens, mostly with one of five children, and ten other features.

    The first latent is the parent, then come its children. Were there always a child, no linear probe
    could tell the parent from the sum of its children.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        n_features = 1 + N_CHILDREN + N_OTHERS
        self.directions = torch.linalg.qr(torch.randn(WIDTH, n_features, generator=generator))[
            0
        ].t()
        self.parent = torch.rand(N_TOKENS, generator=generator) < 0.4
        self.child = torch.randint(-2, N_CHILDREN, (N_TOKENS,), generator=generator)
        values = torch.zeros(N_TOKENS, n_features)
        values[:, 0] = self.parent * (1 + torch.rand(N_TOKENS, generator=generator))
        strength = 1 + torch.rand(N_TOKENS, generator=generator)
        for child in range(N_CHILDREN):
            values[:, 1 + child] = (self.parent & (self.child == child)) * strength
        others = torch.rand(N_TOKENS, N_OTHERS, generator=generator)
        values[:, 1 + N_CHILDREN :] = others * (others > 0.7)
        self.values = values
        self.x = values @ self.directions

    def absorbing(self, n_absorbed: int) -> tuple[Latents, Tensor]:
        """An autoencoder whose first children also write the parent, which is silent beside them."""
        values, directions = self.values.clone(), self.directions.clone()
        for child in range(n_absorbed):
            here = self.parent & (self.child == child)
            values[here, 0] = 0
            directions[1 + child] = self.directions[1 + child] + self.directions[0]
        return Latents.of(values), directions

    def measured(self, latents: Latents, directions: Tensor, n_seeds: int = 3) -> Absorption:
        seeds = range(n_seeds)
        found = absorption(
            latents, {"parent": self.parent}, self.x, directions, parts=self.child, seeds=seeds
        )
        return found["parent"]


@pytest.fixture(scope="module")
def hierarchy() -> Hierarchy:
    return Hierarchy()


def test_the_oracle_absorbs_nothing(hierarchy: Hierarchy) -> None:
    found = hierarchy.measured(Latents.of(hierarchy.values), hierarchy.directions)
    assert found.main == (0,)
    assert found.probe_f1.mean > 0.95
    assert found.main_f1.mean > 0.95
    assert found.full.mean <= 0.01
    assert found.fraction.mean <= 0.01
    assert found.absorbers == {}


def test_built_in_absorption_is_found_at_its_child(hierarchy: Hierarchy) -> None:
    found = hierarchy.measured(*hierarchy.absorbing(1))
    assert found.main == (0,)
    assert found.by_part[0] >= 0.9
    assert max(share for child, share in found.by_part.items() if child) <= 0.01
    assert found.full.mean == pytest.approx(1 / (N_CHILDREN + 2), abs=0.05)
    assert found.fraction.mean == pytest.approx(1 / (N_CHILDREN + 2), abs=0.05)
    assert list(found.absorbers) == [1]
    assert found.floor.mean <= 0.01


def test_where_no_latent_stands_for_the_parent_all_is_absorbed(hierarchy: Hierarchy) -> None:
    """Every child writes the parent itself."""
    latents, directions = hierarchy.absorbing(N_CHILDREN)
    rows = (hierarchy.parent & (hierarchy.child >= 0)).nonzero().flatten()
    probe = hierarchy.directions[0].double()
    some = Latents(latents.values[rows], latents.indices[rows], latents.n_latents)
    found = absorbed(
        some, hierarchy.x[rows].double(), directions.double(), probe, torch.tensor([0])
    )
    assert found.full.double().mean() >= 0.9
    assert found.fraction.mean() >= 0.9


def test_absorption_equals_a_plain_loop() -> None:
    """SAEBench's definition, written down token by token."""
    generator = torch.Generator().manual_seed(0)
    n_tokens, n_latents, width, main = 3000, 12, 6, [2, 5]
    values = torch.rand(n_tokens, n_latents, generator=generator).double()
    values *= torch.rand(n_tokens, n_latents, generator=generator) < 0.25
    directions = torch.randn(n_latents, width, generator=generator).double()
    probe = torch.nn.functional.normalize(directions[2] + directions[5] + directions[7], dim=0)
    x = values @ directions + 0.3 * torch.randn(n_tokens, width, generator=generator)
    found = absorbed(Latents.of(values), x, directions, probe, torch.tensor(main))
    cosine = [float(torch.cosine_similarity(row, probe, dim=0)) for row in directions]
    counts = {"full": 0, "some": 0, "all": 0}
    for token in range(n_tokens):
        whole = float(x[token] @ probe)
        does = [float(values[token, i] * (directions[i] @ probe)) for i in range(n_latents)]
        active = [i for i in range(n_latents) if values[token, i] != 0]
        full = False
        if active and whole > 0 and all(values[token, i] < 1e-8 for i in main):
            top = max(active, key=lambda i: does[i])
            full = cosine[top] >= 0.025 and does[top] / whole >= 0.4
        by_main = sum(does[i] for i in main)
        others = [does[i] for i in active if i not in main and cosine[i] >= 0.1 and does[i] > 0]
        by_others = sum(sorted(others, reverse=True)[:3])
        if whole <= 0 or by_main >= whole or by_others / whole < 0.4:
            fraction = 0.0
        elif by_main <= 0:
            fraction = 1.0
        else:
            taken = min(by_others, whole - by_main)
            fraction = taken / (taken + by_main)
        assert bool(found.full[token]) == full
        assert float(found.fraction[token]) == pytest.approx(fraction, abs=1e-9)
        counts["full"] += full
        counts["some"] += 0 < fraction < 1
        counts["all"] += fraction == 1
    assert min(counts.values()) > 20


def test_a_weak_main_latent_counts_by_its_fraction(hierarchy: Hierarchy) -> None:
    """The parent's latent gives a third of what there is, and the child the rest."""
    rows = (hierarchy.parent & (hierarchy.child == 0)).nonzero().flatten()
    values, directions = hierarchy.values[rows].clone(), hierarchy.directions.clone()
    values[:, :2] = 1.5
    x = values @ directions
    values[:, 0] = 0.5
    directions[1] += 2 / 3 * hierarchy.directions[0]
    found = absorbed(
        Latents.of(values),
        x.double(),
        directions.double(),
        hierarchy.directions[0].double(),
        torch.tensor([0]),
    )
    assert not found.full.any()
    torch.testing.assert_close(found.fraction, torch.full_like(found.fraction, 2 / 3))


def test_a_feature_split_among_latents_has_several_main_ones(hierarchy: Hierarchy) -> None:
    values = hierarchy.values.clone()
    half = torch.arange(N_TOKENS) % 2 == 0
    split = torch.cat(
        [values[:, :1] * half[:, None], values[:, :1] * ~half[:, None], values[:, 6:]], 1
    )
    assert sorted(main_latents(Latents.of(split), hierarchy.parent).tolist()) == [0, 1]
    assert main_latents(Latents.of(values), hierarchy.parent).tolist() == [0]


def test_what_an_autoencoder_adds_does_not_count(hierarchy: Hierarchy) -> None:
    """A large bias along the probe would make every contribution look small."""
    bias = 50 * hierarchy.directions[0]
    latents, directions = hierarchy.absorbing(1)
    plain = hierarchy.measured(latents, directions)
    moved = absorption(
        latents, {"parent": hierarchy.parent}, hierarchy.x + bias, directions, bias=bias
    )["parent"]
    assert moved.full.mean == pytest.approx(plain.full.mean, abs=1e-6)


def test_labels_that_no_probe_finds_are_left_out(hierarchy: Hierarchy) -> None:
    latents = Latents.of(hierarchy.values)
    generator = torch.Generator().manual_seed(0)
    labels = {
        "nothing": torch.rand(N_TOKENS, generator=generator) < 0.3,
        "rare": torch.arange(N_TOKENS) < 15,
    }
    found = absorption(latents, labels, hierarchy.x, hierarchy.directions)
    assert found == {}
    assert "no label" in absorption_table(found)


def test_the_table_has_the_floor(hierarchy: Hierarchy) -> None:
    found = {"parent": hierarchy.measured(*hierarchy.absorbing(1), 1)}
    table = absorption_table(found, found)
    assert table.count(f"{found['parent'].full.mean:.3f}") >= 2
    assert found["parent"].to_dict()["by_part"].keys() == {
        str(child) for child in range(-2, N_CHILDREN)
    }


def test_a_transcoder_is_refused(hierarchy: Hierarchy) -> None:
    latents = Latents.of(hierarchy.values)
    with pytest.raises(InputError, match="not defined for transcoders"):
        absorption(latents, {}, hierarchy.x, hierarchy.directions[:, :-1])
