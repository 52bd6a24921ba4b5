"""GPT-2 small against published figures: TransformerLens's demos, the IOI paper, ports of others.

    pytest -m network tests/network/test_gpt2_facts.py

Downloads the model (500 MB) once. Tolerances: 0.01 on logit differences and direct effects in float32.
"""

import pytest
import torch

from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.lenses import logit_attribution, logit_lens
from neuron_explainer.analysis.sweeps import heads, patching, sweep
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.models.interventions import ablate
from neuron_explainer.models.transformer import Transformer

pytestmark = pytest.mark.network

FRAMES = [
    ("When John and Mary went to the shops,{} gave the bag to", " John", " Mary"),
    ("When Tom and James went to the park,{} gave the ball to", " Tom", " James"),
    ("When Dan and Sid went to the shops,{} gave an apple to", " Dan", " Sid"),
    ("After Martin and Amy went to the park,{} gave a drink to", " Martin", " Amy"),
]
"""Sentence, first and second name. The subject is one of them, the answer the other."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.load("gpt2-small", device="cpu", dtype=torch.float32)


def prompts() -> tuple[list[str], list[str], list[list[str]], list[list[str]]]:
    """Prompts, the same with the names exchanged, right and wrong names."""
    pairs = [(frame, a, b) for frame, one, two in FRAMES for a, b in ((one, two), (two, one))]
    clean = [frame.format(subject) for frame, subject, _ in pairs]
    corrupt = [frame.format(other) for frame, _, other in pairs]
    return clean, corrupt, [[other] for *_, other in pairs], [[subject] for _, subject, _ in pairs]


def mary(model: Transformer) -> tuple[str, object]:
    frame, john, answer = FRAMES[0]
    return frame.format(john), logit_difference(model, answer, john)


def test_parameters(model: Transformer) -> None:
    tied = model.unembed.weight.numel()
    assert sum(p.numel() for p in model.parameters()) - tied == 124_439_808


def test_indirect_objects_are_preferred(model: Transformer) -> None:
    clean, corrupt, right, wrong = prompts()
    target = logit_difference(model, right, wrong)
    nothing = [ablate("0/mlp.post_act", 0, 0)]
    assert sweep(model, clean, nothing, target, bos=True).baseline.mean() == pytest.approx(
        3.5519, abs=0.01
    )
    assert sweep(model, corrupt, nothing, target, bos=True).baseline.mean() == pytest.approx(
        -3.5519, abs=0.01
    )


def test_direct_effects_of_heads(model: Transformer) -> None:
    prompt, target = mary(model)
    found = logit_attribution(model, prompt, target, by="head", bos=True)  # type: ignore[arg-type]  # a Target
    published = {
        "9/attn head 9": 1.9583,
        "9/attn head 6": 1.6281,
        "10/attn head 7": -1.4267,
        "11/attn head 1": -0.9117,
        "11/attn head 10": -0.9042,
        "10/attn head 0": 0.6370,
    }
    for name, value in published.items():
        assert found[name] == pytest.approx(value, abs=0.01)
    table = nodes(model, prompt, target, ["direct"], 40, bos=True)  # type: ignore[arg-type]  # a Target
    neurons = {
        (node.location, node.unit): value
        for node, value in zip(table.nodes, table.values["direct"], strict=True)
        if node.kind == "neuron"
    }
    assert max(neurons.items(), key=lambda item: abs(item[1]))[0][0] == "11/mlp.post_act"


def test_backup_heads_make_up_for_the_name_mover(model: Transformer) -> None:
    """Removing 9.9 at the last position costs less than it writes: 3.55 falls to 2.99, not to 0.57."""
    clean, _, right, wrong = prompts()
    target = logit_difference(model, right, wrong)
    found = sweep(model, clean, [ablate("9/attn.v_out", 9, "last")], target, bos=True)
    assert found.values[0].mean() == pytest.approx(2.99, abs=0.05)


def test_the_name_movers_matter_and_the_difference_appears_in_layer_9(model: Transformer) -> None:
    clean, corrupt, right, wrong = prompts()
    target = logit_difference(model, right, wrong)
    source = model.capture(corrupt[:1], "resid.torso.post_mlp", bos=True)
    length = source.tokens.shape[1]
    grid = patching("resid.torso.post_mlp", source, positions=[length - 1])
    moved = sweep(model, clean[:1], grid, logit_difference(model, right[0], wrong[0]), bos=True)
    effect = moved.mean[:, 0]
    assert abs(effect[5]) < 0.3 * abs(effect[-1]) < abs(effect[9])
    strongest = {cell for cell, _ in sweep(model, clean, heads(model), target, bos=True).top(12)}
    assert {(9, 9), (10, 7)} & strongest


def test_the_lens_converges(model: Transformer) -> None:
    prompt, _ = mary(model)
    found = logit_lens(model, prompt, bos=True)
    assert found.kl[-1].max() < 1e-5
    assert found.top_tokens[-1][-1][0] == " Mary"


def test_induction_heads(model: Transformer) -> None:
    """Attention on the token after the earlier copy, on 60 random tokens twice."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(1000, 40_000, (60,), generator=generator).tolist()
    tokens = [[50256, *row, *row]]
    with torch.no_grad():
        found = model.capture(tokens, "attn.qk_probs")
    second = torch.arange(61, 121)
    for layer, head in [(5, 5), (6, 9), (7, 10), (5, 1), (7, 2)]:
        pattern = found[f"{layer}/attn.qk_probs"][0, ..., head]
        assert pattern[second, second - 59].mean() > 0.75
    previous = found["4/attn.qk_probs"][0, ..., 11]
    places = torch.arange(1, 121)
    assert previous[places, places - 1].mean() > 0.95
