"""Every hook name of TransformerLens that is understood here means the same numbers as there.

The fixtures are the peer's own activations (``benchmarks/peers/make_places.py``), of a model whose gains and
biases are random: a value before them is not the value after them.
"""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from neuron_explainer.errors import LocationError
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.transformer import Transformer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peers" / "transformer-lens"
KINDS = [(major, kind) for major in ("3", "4") for kind in ("hooked", "bridge")]
# What has no counterpart here: embeddings before they are added, q and k before they are scaled, the ids.
UNKNOWN = {"hook_embed", "hook_pos_embed", "ln_final.hook_in"}
UNKNOWN |= {f"{part}.hook_{end}" for part in ("embed", "pos_embed") for end in ("in", "out")}
UNKNOWN_IN_BLOCKS = {"attn.hook_q", "attn.hook_k", "attn.q.hook_out", "attn.k.hook_out"}
UNKNOWN_IN_BLOCKS |= {"attn.hook_hidden_states"}


@functools.cache
def theirs(major: str, kind: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / major / f"{kind}.safetensors")


@functools.cache
def ours(major: str) -> dict[str, Tensor]:
    model = Transformer.load(FIXTURES / major / "gpt2", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        found = model.capture(theirs(major, "hooked")["tokens"], list(SITES))
    return {str(place): value for place, value in found.items()}


def is_known(name: str) -> bool:
    inside = name.partition(".")[2].partition(".")[2]
    return name not in UNKNOWN and not (name.startswith("blocks.") and inside in UNKNOWN_IN_BLOCKS)


@pytest.mark.parametrize(("major", "kind"), KINDS)
def test_each_name_means_the_same_numbers(major: str, kind: str) -> None:
    compared = 0
    for name, value in theirs(major, kind).items():
        if name == "tokens":
            continue
        if not is_known(name):
            with pytest.raises(LocationError):
                ActivationLocation.parse(name)
            continue
        expected = value.permute(0, 2, 3, 1) if name.endswith(("scores", "pattern")) else value
        # A masked score is the smallest finite number in the bridge, and minus infinity elsewhere.
        lowest = torch.finfo(torch.float32).min
        expected = torch.where(expected == lowest, -torch.inf, expected)
        found = ours(major)[str(ActivationLocation.parse(name))]
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), name
        compared += 1
    assert compared >= 30


@pytest.mark.parametrize("major", ["3", "4"])
def test_the_name_given_to_a_place_is_one_that_the_peer_has(major: str) -> None:
    """Both of its kinds of model have it, but for what comes out of a norm: the bridge alone names that."""
    for path, site in SITES.items():
        name = ActivationLocation(path, 1 if site.per_layer else None).transformer_lens_name
        if name is None:
            continue
        assert ActivationLocation.parse(name).path == path
        assert name in theirs(major, "bridge")
        assert name in theirs(major, "hooked") or "post_ln" in path


def test_what_is_compared_tells_values_before_and_after_gain_and_bias_apart() -> None:
    found = ours("3")
    pairs = {"1/resid.torso.ln_attn": "1/resid.torso.post_ln_attn", "resid.ln_f": "resid.post_ln_f"}
    for norm, after in pairs.items():
        assert not torch.allclose(found[f"{norm}.post_scale"], found[after], atol=0.1)
