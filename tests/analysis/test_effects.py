"""The table of nodes against finite differences, sums and full passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neuron_explainer.analysis.attribution import integrated_gradients
from neuron_explainer.analysis.effects import Effects, Node, NodeTable, nodes, spearman
from neuron_explainer.analysis.sweeps import active_latents
from neuron_explainer.analysis.targets import Target, kl, logit_difference, loss, probability
from neuron_explainer.errors import InputError, NeuronExplainerError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.interventions import (
    ablate,
    add,
    align,
    freeze,
    patch_from,
    scale,
    set_to,
)
from neuron_explainer.models.transformer import Transformer
from tests.conftest import make_model
from tests.models.test_interventions import wrong
from tests.models.test_language_model import make

MODEL = make_model(dtype=torch.float64)
PROMPT = [3, 1, 4, 1, 5, 9, 2]
OTHER = [3, 7, 4, 1, 5, 11, 2]
TARGET = logit_difference(MODEL, [6, 8], 12)
ALL = 10**6


def table(**settings: Any) -> NodeTable:
    return nodes(MODEL, PROMPT, TARGET, **{"top_k": ALL, **settings})


def value(
    hooks: TransformerHooks | None = None, model: Any = MODEL, target: Target = TARGET
) -> float:
    with torch.no_grad():
        logits = model([PROMPT], hooks=hooks)[0][0, -1]
    return float((logits[6] + logits[8]) / 2 - logits[12])


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AutoencoderContext]:
    found = {}
    for path, width in [
        ("resid.torso.delta_mlp", 16),
        ("mlp.post_act", 48),
        ("resid.torso.delta_attn", 16),
    ]:
        torch.manual_seed(width)
        autoencoder = Autoencoder(
            64, width, activation=TopK(6), input_normalization="layer_norm", dtype=torch.float64
        )
        with torch.no_grad():
            for parameter in autoencoder.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
        folder: Path = tmp_path_factory.mktemp("autoencoder")
        autoencoder.save(folder / "a")
        config = AutoencoderConfig(path, {0: folder / "a", 1: folder / "a"})
        found[path] = AutoencoderContext(config, "cpu", dtype=torch.float64)
    return found


@pytest.mark.parametrize("attention", ["heads", "pairs"])
@pytest.mark.parametrize("mlp", [None, "resid.torso.delta_mlp", "mlp.post_act"])
def test_direct_effects_of_all_nodes_sum_to_the_target(
    attention: Any, mlp: str | None, contexts: dict[str, AutoencoderContext]
) -> None:
    given = [] if mlp is None else [contexts[mlp]]
    found = table(measures=["direct"], attention=attention, autoencoders=given)
    assert found.totals["direct"] == pytest.approx(value(), abs=1e-9)
    assert found.target == pytest.approx(value(), abs=1e-9)
    # The constant is not what is left over: it is the final norm's bias through the unembedding.
    (constant,) = [i for i, node in enumerate(found.nodes) if node.location == "resid.post_ln_f"]
    logits = (MODEL.unembed.weight @ MODEL.final_ln.bias).detach()
    expected = float((logits[6] + logits[8]) / 2 - logits[12])
    assert found.values["direct"][constant] == pytest.approx(expected, abs=1e-9)
    assert found.coverage("direct") == pytest.approx(1.0)


def plain_write(node: Node) -> Tensor:
    """What a node adds to the stream ``[d]``, from the model's weights."""
    layer, _, path = node.location.partition("/")
    with torch.no_grad():
        found = MODEL.capture([PROMPT], node.location)[node.location][0]
        block = list(MODEL.layers)[int(layer)]
        if path == "mlp.post_act":
            return found[node.position, node.unit] * block.mlp.out_layer.weight[:, node.unit]
        out = block.attn.out_proj.weight.view(16, 4, 4)[:, node.unit]  # [d, d_head]
        if path == "attn.v_out":
            return out @ found[node.position, node.unit]
        v = MODEL.capture([PROMPT], f"{layer}/attn.v")[f"{layer}/attn.v"][0]
        weight = found[node.position, node.attended, node.unit]
        return weight * (out @ v[node.attended, node.unit])


@pytest.mark.parametrize("attention", ["heads", "pairs"])
def test_direct_effects_are_those_of_the_write_at_the_last_stream(attention: Any) -> None:
    found = table(measures=["direct", "write_norm"], attention=attention)
    frozen = freeze("resid.ln_f.scale", MODEL.capture([PROMPT], "resid.ln_f.scale"))
    picked = [i for i in found.order("direct") if found.nodes[i].kind in ("neuron", "head", "pair")]
    for i in picked[:6] + picked[-2:]:
        write = plain_write(found.nodes[i])
        change = torch.zeros(1, len(PROMPT), 16, dtype=torch.float64)
        change[0, found.nodes[i].position] = -write
        taken = value() - value(add("1/resid.torso.post_mlp", change) + frozen)
        assert found.values["direct"][i] == pytest.approx(taken, abs=1e-9)
        assert abs(found.values["write_norm"][i]) == pytest.approx(float(write.norm()), abs=1e-9)


def test_act_grad_is_the_finite_difference(contexts: dict[str, AutoencoderContext]) -> None:
    found = table(measures=["act_grad"], freeze=())
    step = 1e-5
    for i in found.order("act_grad")[:12]:
        node = found.nodes[i]
        units = None if node.kind in ("embedding", "bias") else node.unit
        if node.kind == "bias":
            continue
        up, down = (scale(node.location, 1 + sign * step, units, node.position) for sign in (1, -1))
        slope = (value(up) - value(down)) / (2 * step)
        assert found.values["act_grad"][i] == pytest.approx(slope, abs=1e-7), node
    context = contexts["resid.torso.delta_mlp"]
    found = table(measures=["act_grad"], freeze=(), autoencoders=[context])
    latents = [i for i in found.order("act_grad") if found.nodes[i].kind == "latent"]
    for i in latents[:8]:
        node = found.nodes[i]
        up, down = (
            scale(node.location, 1 + sign * step, node.unit, node.position, autoencoders=context)
            for sign in (1, -1)
        )
        slope = (value(up) - value(down)) / (2 * step)
        assert found.values["act_grad"][i] == pytest.approx(slope, abs=1e-7), node


def test_ablation_is_measured(contexts: dict[str, AutoencoderContext]) -> None:
    for settings in ({"attention": "pairs"}, {"autoencoders": [contexts["resid.torso.delta_mlp"]]}):
        found = table(measures=["act_grad", "ablation"], top_k=12, freeze=(), **settings)
        assert found.rank_correlation is not None
        for i, node in enumerate(found.nodes):
            if node.kind == "neuron":
                hooks = scale(node.location, 0.0, node.unit, node.position)
                expected = value() - value(hooks)
                assert found.values["ablation"][i] == pytest.approx(expected, abs=1e-9)
            if node.kind == "latent":
                hooks = scale(
                    node.location,
                    0.0,
                    node.unit,
                    node.position,
                    autoencoders=contexts["resid.torso.delta_mlp"],
                )
                expected = value() - value(hooks)
                assert found.values["ablation"][i] == pytest.approx(expected, abs=1e-9)


def test_patching_is_exact_where_the_model_is_linear() -> None:
    """The last layer's MLP reaches the logits through a frozen norm alone, so estimates are exact there."""
    found = table(measures=["patching", "act_grad"], prompt_b=OTHER)
    there = MODEL.capture([OTHER], "1/mlp.post_act")["1/mlp.post_act"]
    frozen = freeze("resid.ln_f.scale", MODEL.capture([PROMPT], "resid.ln_f.scale"))
    checked = 0
    for i, node in enumerate(found.nodes):
        if node.location == "1/mlp.post_act" and node.position == len(PROMPT) - 1:
            here = MODEL.capture([PROMPT], node.location)[node.location][0, -1, node.unit]
            change = torch.zeros(1, len(PROMPT), 48, dtype=torch.float64)
            change[0, -1, node.unit] = there[0, -1, node.unit] - here
            measured = value(add(node.location, change) + frozen) - value()
            assert found.values["patching"][i] == pytest.approx(measured, abs=1e-9)
            checked += 1
    assert checked == 48


def test_integrated_is_integrated_gradients_of_each_location() -> None:
    found = table(measures=["integrated"], freeze=(), ig_steps=5)
    for path in ("resid.post_emb", "0/attn.v_out", "1/mlp.post_act"):
        whole = integrated_gradients(MODEL, PROMPT, TARGET, path, steps=5).values
        expected = whole.sum(axis=-1) if path != "1/mlp.post_act" else whole
        for node, value in zip(found.nodes, found.values["integrated"], strict=True):
            if node.location == path:
                place = (node.position, node.unit)[: expected.ndim]
                assert value == pytest.approx(expected[place], abs=1e-12)


@pytest.mark.parametrize(
    "path", ["resid.torso.delta_mlp", "mlp.post_act", "resid.torso.delta_attn"]
)
def test_integrated_latents_error_and_bias_sum_to_the_effect_of_the_location(
    path: str, contexts: dict[str, AutoencoderContext]
) -> None:
    place = f"1/{path}"
    found = table(measures=["integrated"], freeze=(), ig_steps=16, autoencoders=[contexts[path]])
    inside = [i for i, n in enumerate(found.nodes) if n.location == place and n.kind != "head"]
    assert {found.nodes[i].kind for i in inside} == {"latent", "error", "bias"}
    total = found.values["integrated"][inside].sum()
    assert total == pytest.approx(found.target - value(ablate(place)), abs=1e-3)


@pytest.mark.parametrize("other", [[3, 1, 9, 5, 8], [3, 7, 1, 4, 5, 8]])
def test_integrated_patching_sums_to_the_effect_of_patching_the_location(other: list[int]) -> None:
    found = table(
        measures=["integrated_patching"], freeze=(), ig_steps=16, prompt_b=other, attention="heads"
    )
    run, index_map = MODEL.capture([other], "0/attn.v_out"), align(PROMPT, other)
    patched = value(patch_from("0/attn.v_out", run, index_map=index_map))
    heads = [i for i, node in enumerate(found.nodes) if node.location == "0/attn.v_out"]
    total = found.values["integrated_patching"][heads].sum()
    assert total == pytest.approx(patched - found.target, abs=1e-3)


@pytest.mark.parametrize("other", [OTHER, [3, 7, 1, 4, 5, 2]])
def test_integrated_patching_of_pairs_sums_to_the_effect_of_patching_them(other: list[int]) -> None:
    settings = {"measures": ["integrated_patching"], "attention": "pairs", "prompt_b": other}
    found = table(**settings, freeze=(), ig_steps=16)
    place, index_map = "1/attn.qk_probs", align(PROMPT, other)
    theirs = MODEL.capture([other], place)[place][0]
    here = (index_map >= 0).nonzero()[:, 0]
    there = index_map[here]

    def patch(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, here[:, None], here] = theirs[there[:, None], there]
        return x

    patched = value(TransformerHooks().append_at(place, patch))
    pairs = [i for i, node in enumerate(found.nodes) if node.location == place]
    total = found.values["integrated_patching"][pairs].sum()
    assert total == pytest.approx(patched - found.target, abs=1e-3)
    assert abs(total) > 1e-2


def test_a_second_prompt_of_another_length_is_aligned() -> None:
    longer = [3, 1, 20, 4, 1, 5, 9, 2]
    found = table(measures=["act_grad"], prompt_b=longer)
    alone = nodes(MODEL, longer, TARGET, ["act_grad"], ALL)
    by_node = dict(zip(alone.nodes, alone.values["act_grad"], strict=True))
    for i, node in enumerate(found.nodes):
        if node.kind == "neuron":
            moved = Node(node.location, "neuron", node.unit, node.position + (node.position >= 2))
            assert found.other["act_grad"][i] == pytest.approx(by_node[moved], abs=1e-12)
    same = table(measures=["patching", "act_grad"], prompt_b=PROMPT)
    assert np.abs(same.values["patching"]).max() == 0
    np.testing.assert_array_equal(same.other["act_grad"], same.values["act_grad"])


def test_latents_that_the_second_prompt_lacks_count_as_zero(
    contexts: dict[str, AutoencoderContext],
) -> None:
    context = contexts["resid.torso.delta_attn"]
    found = table(measures=["patching", "act_grad"], prompt_b=OTHER, autoencoders=[context])
    place = "1/resid.torso.delta_attn"
    latents = context.get_autoencoder(1).encode(MODEL.capture([OTHER], place)[place].detach())[0]
    seen = 0
    for i, node in enumerate(found.nodes):
        if node.kind == "latent" and node.location == place:
            expected = float(latents[node.position, node.unit])
            assert found.other["activation"][i] == pytest.approx(expected, abs=1e-9)
            seen += expected == 0
    assert seen


def test_the_largest_of_each_measure_are_shown() -> None:
    everything = table(measures=["direct", "act_grad"])
    few = table(measures=["direct", "act_grad"], top_k=5)
    for measure in ("direct", "act_grad"):
        best = [everything.nodes[i] for i in everything.order(measure)[:5]]
        assert set(best) <= set(few.nodes)
    assert 5 <= len(few.nodes) <= 10
    assert few.totals == pytest.approx(everything.totals)
    assert f"{few.coverage('direct'):.0%} of direct" in str(few)
    assert str(few.nodes[0]) in str(few)


def test_other_targets_models_and_frozen_patterns() -> None:
    for target in (probability(MODEL, 3), loss()):
        assert np.isfinite(nodes(MODEL, PROMPT, target).values["act_grad"]).all()
    frozen = table(measures=["act_grad"], freeze=("norms", "patterns"))
    assert frozen.totals["act_grad"] != pytest.approx(
        table(measures=["act_grad"]).totals["act_grad"]
    )
    theirs = make("gpt2")
    found = nodes(
        theirs, PROMPT, lambda x: x[:, 3] - x[:, 4], ["direct", "act_grad"], ALL, freeze=()
    )
    assert found.totals["direct"] == pytest.approx(found.target, abs=1e-4)


def test_tables_for_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    model = Transformer.load("tiny-tales")
    found = nodes(model, "The old dog saw the", logit_difference(model, " cat", " dog"), bos=True)
    frame = found.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(found.nodes)
    assert frame["token"].iloc[0] == found.tokens[found.nodes[0].position]


@pytest.mark.parametrize(
    ("total", "shown", "words"),
    [
        (0.0, 0.25, "they explain +0.25 of direct, which sums to 0 over all nodes."),
        (0.5, 0.25, "they explain 50% of direct."),
        (0.5, -2.0, "they explain -2 of direct's +0.5."),
        (float("nan"), 0.25, "they explain an undefined share of direct."),
    ],
)
def test_a_share_of_nothing_is_said_in_words(total: float, shown: float, words: str) -> None:
    found = NodeTable(
        [Node("0/mlp.post_act", "neuron", 1, 0)] * 3,
        {"direct": np.array([shown, 0.0, 0.0])},
        {"direct": total},
        1.0,
        "target",
        ["a"],
        rank_correlation=float("nan"),
    )
    assert words in repr(found)
    assert "ablation: undefined" in repr(found)
    assert "nan" not in repr(found)


def test_a_table_without_sums_of_effects_names_no_share() -> None:
    assert "16 nodes shown.\n" in str(nodes(MODEL, PROMPT, TARGET, ["write_norm"], 16))


def test_spearman() -> None:
    a = np.array([1.0, 2.0, 2.0, 9.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert spearman(a, np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(0.9486832980505138)
    assert np.isnan(spearman(a, np.ones(4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measures": ["dirct"]}, "unknown measure 'dirct'. Did you mean 'direct'"),
        ({"measures": ["ablation", "direct"]}, "give both measures"),
        ({"measures": ["activation"]}, "that chooses nodes"),
        ({"measures": ["patching"]}, "give prompt_b"),
        ({"measures": ["integrated_patching"]}, "integrated_patching compares .* give prompt_b"),
        ({"measures": ["integrated"], "ig_steps": 0}, "ig_steps must be"),
        ({"top_k": 0}, "at least 1"),
        ({"top_k": 2.5}, "whole number of at least 1, found 2.5"),
        ({"measures": "direct"}, "measures must be a list, found 'direct'"),
        ({"freeze": "norms"}, "freeze must be a list, found 'norms'"),
        ({"positions": "last"}, "positions must be a list, found 'last'"),
        ({"positions": 3}, "positions must be a list, found 3"),
        ({"positions": [0.5]}, "positions are 0 to 6 in this prompt"),
        ({"autoencoders": 3}, "autoencoders must be a list, found 3"),
        ({"attention": "neurons"}, "'heads' or 'pairs'"),
        ({"freeze": ("norm",)}, "freeze takes final_norm"),
        ({"prompt_b": [20, 21]}, "no token in common"),
    ],
)
def test_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        table(**settings)


def test_an_autoencoder_of_another_width_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Autoencoder(24, 8, dtype=torch.float64).save(tmp_path)
    place = "0/resid.torso.delta_mlp"
    context = AutoencoderContext(
        AutoencoderConfig("resid.torso.delta_mlp", {0: tmp_path}), "cpu", dtype=torch.float64
    )
    monkeypatch.setattr(Transformer, "run_embed", lambda *_: pytest.fail("the model ran"))
    hooks = ablate(place, 1, autoencoders=context)
    for run in (
        lambda: MODEL([PROMPT], hooks=hooks),
        lambda: MODEL.sample([PROMPT], 2, hooks=hooks),
        lambda: MODEL.capture([PROMPT], place, hooks=hooks),
        lambda: nodes(MODEL, PROMPT, TARGET, autoencoders=[context]),
        lambda: active_latents(MODEL, [PROMPT], context, 0),
        lambda: nodes(make("gpt2"), PROMPT, TARGET, autoencoders=[context], freeze=()),
    ):
        with pytest.raises(NeuronExplainerError, match=r"inputs of width 8, .* has width"):
            run()


def test_a_node_is_no_target_but_can_be_traced() -> None:
    with pytest.raises(InputError, match=r"trace\(model, prompt, node\)"):
        nodes(MODEL, PROMPT, wrong(Node("0/mlp.post_act", "neuron", 1, 1)))


def test_autoencoders_that_overlap_or_are_no_part_of_the_stream(
    contexts: dict[str, AutoencoderContext],
) -> None:
    both = [contexts["resid.torso.delta_mlp"], contexts["mlp.post_act"]]
    with pytest.raises(InputError, match="same part of the stream"):
        table(autoencoders=both)
    with pytest.raises(InputError, match="one prompt"):
        nodes(MODEL, wrong([[1, 2], [3, 4]]), TARGET)


@pytest.mark.parametrize("layers", [(0, 1), (None,)], ids=str)
def test_a_latent_without_a_direction_and_one_autoencoder_for_all_layers(
    layers: Any, tmp_path: Path
) -> None:
    autoencoder = Autoencoder(64, 16, input_normalization="layer_norm", dtype=torch.float64)
    with torch.no_grad():
        autoencoder.decoder.weight[:, 0] = 0
    autoencoder.save(tmp_path / "a")
    config = AutoencoderConfig("resid.torso.delta_mlp", dict.fromkeys(layers, tmp_path / "a"))
    context = AutoencoderContext(config, "cpu", dtype=torch.float64)
    found = table(measures=["direct"], autoencoders=[context])
    assert {n.location for n in found.nodes if n.kind == "latent"} == {
        f"{layer}/resid.torso.delta_mlp" for layer in range(2)
    }
    assert found.totals["direct"] == pytest.approx(found.target, abs=1e-9)


# --- some positions, interventions, several tables of one pass ---


@pytest.mark.parametrize("attention", ["heads", "pairs"])
@pytest.mark.parametrize("mlp", [None, "mlp.post_act"])
def test_nodes_of_some_positions_are_those_of_the_whole_table(
    attention: Any, mlp: str | None, contexts: dict[str, AutoencoderContext]
) -> None:
    given = [] if mlp is None else [contexts[mlp]]
    settings: dict[str, Any] = {"attention": attention, "autoencoders": given}
    whole, some = table(**settings), table(**settings, positions=[6, 2])
    expected = [i for i, node in enumerate(whole.nodes) if node.position in (2, 6)]
    assert some.nodes == [whole.nodes[i] for i in expected]
    for measure, values in some.values.items():
        np.testing.assert_allclose(values, whole.values[measure][expected], atol=1e-12)
        assert some.totals[measure] == pytest.approx(values.sum(), abs=1e-9)
    assert some.target == whole.target
    with pytest.raises(InputError, match="positions are 0 to 6"):
        table(positions=[7])


def test_effects_under_an_intervention_are_those_of_the_changed_model(
    contexts: dict[str, AutoencoderContext],
) -> None:
    latent = ablate(
        "0/resid.torso.delta_mlp", 3, autoencoders=contexts["resid.torso.delta_mlp"]
    ) + set_to("0/resid.torso.delta_mlp", 0.3, 5)
    for hooks in (ablate("0/attn.v_out", 2), latent):
        found = table(hooks=hooks, freeze=())
        assert found.target == pytest.approx(value(hooks), abs=1e-12)
        step, checked = 1e-5, 0
        for i in found.order("act_grad")[:10]:
            node = found.nodes[i]
            if node.kind not in ("neuron", "head"):
                continue
            up, down = (
                scale(node.location, 1 + sign * step, node.unit, node.position) for sign in (1, -1)
            )
            slope = (value(hooks + up) - value(hooks + down)) / (2 * step)
            assert found.values["act_grad"][i] == pytest.approx(slope, abs=1e-7), node
            checked += 1
        assert checked > 3
    found = table(measures=["direct"], hooks=ablate("0/attn.v_out", 2))
    assert found.totals["direct"] == pytest.approx(found.target, abs=1e-9)
    alone = next(i for i, node in enumerate(found.nodes) if node.kind == "head" and node.unit == 2)
    assert found.values["activation"][alone] == 0


def test_an_intervention_may_leave_nothing_of_what_came_before() -> None:
    hooks = set_to("0/resid.torso.post_mlp", 0.1)
    found = table(hooks=hooks)
    assert found.target == pytest.approx(value(hooks), abs=1e-12)
    below = [i for i, node in enumerate(found.nodes) if node.location.startswith("0/")]
    assert np.abs(found.values["act_grad"][below]).max() == 0
    logits_set = set_to("logits", 2.0, 6)
    assert table(hooks=logits_set).target == pytest.approx(value(logits_set), abs=1e-12)
    with pytest.raises(InputError, match="leave hooks out"):
        table(measures=["act_grad", "ablation"], hooks=hooks)


def test_one_pass_gives_several_tables_and_the_values_of_given_nodes(
    contexts: dict[str, AutoencoderContext],
) -> None:
    given = [contexts["resid.torso.delta_mlp"]]
    effects = Effects(MODEL, PROMPT, TARGET, autoencoders=given, positions=[4, 5, 6])
    whole = table(autoencoders=given, positions=[4, 5, 6])
    assert effects.table(top_k=ALL).nodes == whole.nodes
    assert (
        effects.table(["direct"], 3).nodes
        == table(measures=["direct"], top_k=3, autoencoders=given, positions=[4, 5, 6]).nodes
    )
    picked = whole.nodes[::7]
    for measure in ("activation", "act_grad"):
        expected = whole.values[measure][::7]
        np.testing.assert_array_equal(effects.values(picked, measure), expected)
    active = {(n.location, n.unit, n.position) for n in whole.nodes if n.kind == "latent"}
    place = "1/resid.torso.delta_mlp"
    silent = next(u for u in range(64) if (place, u, 4) not in active)
    others = [Node(place, "latent", silent, 4), Node(place, "latent", silent, 1)]
    found = effects.values([*others, Node("1/mlp.post_act", "neuron", 0, 4)], "direct")
    assert found[0] == 0
    assert np.isnan(found[1:]).all()


def test_effects_of_tokens_are_sums_over_the_nodes() -> None:
    effects = Effects(MODEL, PROMPT, TARGET, positions=[6], of_tokens=True).of_tokens()
    heads, pairs = table(measures=["act_grad"]), table(measures=["act_grad"], attention="pairs")

    def summed(found: NodeTable, kind: str, by: str) -> list[float]:
        at = [
            (getattr(n, by), v)
            for n, v in zip(found.nodes, found.values["act_grad"], strict=True)
            if n.kind == kind
        ]
        return [sum(v for p, v in at if p == position) for position in range(len(PROMPT))]

    for given, expected in [
        (effects.embedding, summed(heads, "embedding", "position")),
        (effects.mlp, summed(heads, "neuron", "position")),
        (effects.attention_from, summed(heads, "head", "position")),
        (effects.attention_from, summed(pairs, "pair", "position")),
        (effects.attention_to, summed(pairs, "pair", "attended")),
    ]:
        np.testing.assert_allclose(given, expected, atol=1e-9)


def test_a_distance_from_the_unchanged_run_is_no_target() -> None:
    with pytest.raises(InputError, match="KL divergence is a distance from the unchanged run"):
        nodes(MODEL, PROMPT, kl())


@pytest.mark.parametrize("normalization", ["none", "layer_norm"])
def test_latents_of_joined_heads(normalization: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    autoencoder = Autoencoder(
        32, 16, activation=TopK(5), input_normalization=normalization, dtype=torch.float64
    )
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    autoencoder.save(tmp_path / "a")
    config = AutoencoderConfig("attn.v_out", {0: tmp_path / "a"})
    context = AutoencoderContext(config, "cpu", dtype=torch.float64)
    measures = ["direct", "act_grad", "ablation"]
    found = table(measures=measures, autoencoders=[context], top_k=15)
    assert found.totals["direct"] == pytest.approx(found.target, abs=1e-9)
    some = [i for i, node in enumerate(found.nodes) if node.kind == "latent"][:5]
    for i in some:
        place, unit, at = found.nodes[i].location, found.nodes[i].unit, found.nodes[i].position
        x = MODEL.capture([PROMPT], place)[place].flatten(2)
        code = autoencoder.code(x)
        without = code.latents.clone()
        without[0, at, unit] = 0
        change = (code.decode(without) - code.decode(code.latents)).view(1, len(PROMPT), 4, 4)
        expected = value() - value(add(place, change))
        assert found.values["ablation"][i] == pytest.approx(expected, abs=1e-9)
