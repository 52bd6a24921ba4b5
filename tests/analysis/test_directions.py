"""Directions: what a unit does to the logits, against formulas in float64 and against the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from neuron_explainer.analysis.directions import Directions, top_logits
from neuron_explainer.analysis.hardly_trained import TokenTexts, find_hardly_trained
from neuron_explainer.analysis.unit_directions import Units
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.autoencoder import TopK
from neuron_explainer.models.autoencoders.pruned import omit_least_active_latents
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer
from neuron_explainer.models.weight_names import WeightLocationType as W
from tests.analysis.direction_models import (
    HEADS,
    D,
    F,
    V,
    array,
    autoencoder,
    hugging_face_context,
    own_context,
)

FAMILIES = ["own", "gpt2", "gpt_neox", "llama", "gemma", "phi", "olmo"]
MEAN_SUBTRACTED = {"own", "gpt2", "gpt_neox", "phi", "olmo"}
LAST = "1/resid.torso.post_mlp"


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelContext]:
    found: dict[str, ModelContext] = {"own": own_context(tmp_path_factory.mktemp("own"))}
    return found | {name: hugging_face_context(name) for name in [*FAMILIES[1:], "gemma2"]}


def expected_logits(context: ModelContext, family: str, rows: np.ndarray) -> np.ndarray:
    """The formula in float64."""
    unembedding = array(context.get_weight(W.UNEMBEDDING))
    gain = 1.0 if family == "olmo" else array(context.get_weight(W.LAYER_NORM_GAIN_FINAL))
    if family in MEAN_SUBTRACTED:
        rows = rows - rows.mean(axis=1, keepdims=True)
    logits: np.ndarray = (rows * gain) @ unembedding
    logits -= logits.mean(axis=1, keepdims=True)
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_decoder_rows_are_the_formula(family: str, contexts) -> None:
    context, made = contexts[family], autoencoder(LAST)
    found = Directions(context, made).logits(range(40))
    expected = expected_logits(context, family, array(made.decoder.weight.t()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_what_the_model_does_with_a_small_step(family: str, contexts) -> None:
    """Add a little of the row to the final residual; the norm's scale does not move to first order."""
    context, made = contexts[family], autoencoder(LAST)
    model = context.get_or_create_model()
    dtype = model.dtype
    row = made.decoder.weight.t()[7].to(dtype)
    x = torch.randn(1, 1, D, dtype=dtype, generator=torch.Generator().manual_seed(3))
    along = row - row.mean() if family in MEAN_SUBTRACTED else row
    base = x - x.mean(dim=-1, keepdim=True) if family in MEAN_SUBTRACTED else x
    x = x - (base @ along) / (along @ along) * along

    def logits(step: float):
        hooks = TransformerHooks().append_at(LAST, lambda stream: x + step * row)
        return model(torch.zeros(1, 1, dtype=torch.int64), hooks=hooks)[0].detach()[0, 0]

    size = 1e-2  # the norms of some families compute in float32 whatever the model's dtype
    found = (logits(size) - logits(-size)) / (2 * size)
    moved = array(found - found.mean())
    expected = Directions(context, made).logits([7])[0].double().numpy()
    slope = (moved @ expected) / (
        expected @ expected
    )  # the norm's scale, which the lists leave out
    assert slope > 0
    np.testing.assert_allclose(moved / slope, expected, rtol=0, atol=1e-2 * np.abs(expected).max())
    assert spearmanr(moved, expected).statistic > 0.999


def test_raw_is_the_unembedding_alone(contexts) -> None:
    made = autoencoder(LAST)
    found = Directions(contexts["own"], made, fold="raw").logits(range(40))
    logits = array(made.decoder.weight.t()) @ array(contexts["own"].get_weight(W.UNEMBEDDING))
    np.testing.assert_allclose(
        found, logits - logits.mean(axis=1, keepdims=True), rtol=0, atol=1e-4
    )
    with pytest.raises(InputError, match="fold must be"):
        Directions(contexts["own"], made, fold="none")  # type: ignore[arg-type]


# ---- where units write -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_the_mlp_and_of_heads_go_through_the_last_matrix(family: str, contexts) -> None:
    context = contexts[family]
    w_out = array(context.get_weight(W.MLP_TO_RESIDUAL, 1))
    w_o = array(context.get_weight(W.ATTN_TO_RESIDUAL, 1)).reshape(-1, D)
    of_mlp, of_heads = autoencoder("1/mlp.post_act", F), autoencoder("1/attn.v_out", len(w_o))
    for made, matrix in ((of_mlp, w_out), (of_heads, w_o)):
        expected = array(made.decoder.weight.t()) @ matrix
        np.testing.assert_allclose(Units(context, made).rows(), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(
        Units(context, "1/mlp.post_act").rows([5, 3]), w_out[[5, 3]], atol=1e-6
    )
    heads = Units(context, "1/attn.v_out")
    width = len(w_o) // HEADS
    assert heads.index("3.1") == 3 * width + 1
    assert heads.name_of(3 * width + 1) == "channel 1 of head 3 of 1/attn.v_out"
    np.testing.assert_allclose(heads.rows([heads.index("3.1")]), w_o[[3 * width + 1]], atol=1e-6)


def test_what_the_rows_are_is_what_the_model_adds(contexts) -> None:
    """A latent's activation of 2 adds 2 times its row to the stream, whatever stands between."""
    context = contexts["own"]
    model, tokens = context.get_or_create_model(), torch.tensor([[3, 5, 1]])
    for location, n in (("0/mlp.post_act", F), ("1/resid.torso.delta_mlp", D)):
        made = autoencoder(location, n)
        row, layer = made.decoder.weight.t()[4], location[0]
        after = f"{layer}/resid.torso.post_mlp"
        hooks = TransformerHooks().append_at(location, lambda x, row=row: x + 2 * row)
        moved = model.capture(tokens, after, hooks=hooks)[after]
        added = (moved - model.capture(tokens, after)[after])[0, 0]
        torch.testing.assert_close(
            added, 2 * Units(context, made).rows([4])[0], atol=1e-4, rtol=1e-4
        )


def test_a_transcoder_writes_at_its_output(contexts) -> None:
    made = autoencoder(
        "1/resid.torso.post_ln_mlp", n_outputs=D, output_location="1/resid.torso.delta_mlp"
    )
    units = Units(contexts["llama"], made)
    assert str(units.location) == "1/resid.torso.delta_mlp"
    assert not units.direct_path_only
    torch.testing.assert_close(units.rows(), made.decoder.weight.t())


def test_channels_of_the_stream_and_rows_behind_the_final_norm(contexts) -> None:
    context = contexts["llama"]
    torch.testing.assert_close(
        Units(context, "0/resid.torso.post_mlp").rows([3])[0], torch.eye(D)[3]
    )
    made = autoencoder("resid.post_ln_f")
    logits = array(made.decoder.weight.t()) @ array(context.get_weight(W.UNEMBEDDING))
    found = Directions(context, made).logits(range(40))
    np.testing.assert_allclose(
        found, logits - logits.mean(axis=1, keepdims=True), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("location", "only"),
    [
        ("0/resid.torso.delta_mlp", True),
        ("1/resid.torso.delta_mlp", False),
        ("1/resid.torso.delta_attn", True),
        ("1/resid.torso.post_mlp", False),
        ("resid.torso.post_mlp", True),
        ("resid.post_emb", True),
        ("resid.post_ln_f", False),
    ],
)
def test_the_direct_path_is_said(location: str, only: bool, contexts) -> None:
    found = top_logits(contexts["own"], autoencoder(location), 0, 3)
    assert found.direct_path_only == only
    assert ("direct path only" in repr(found)) == only
    assert ("direct path only" in found._repr_html_()) == only


def test_units_that_can_be_negative_are_said_to_be(contexts) -> None:
    own = contexts["own"]
    for what, signed in (
        (autoencoder(LAST), False),
        (autoencoder(LAST, activation=TopK(3)), False),
        (autoencoder(LAST, activation=torch.nn.Identity()), True),
        ("1/mlp.post_act", False),
        (LAST, True),
    ):
        found = top_logits(own, what, 3, 2)
        assert found.signed == signed
        assert ("the opposite where the activation is negative" in repr(found)) == signed


def test_places_that_no_linear_map_joins_to_the_stream(contexts) -> None:
    own = contexts["own"]
    for location in ("0/mlp.pre_act", "0/resid.torso.post_ln_mlp", "0/attn.q", "logits"):
        with pytest.raises(LocationError, match="does not reach the residual stream"):
            Units(own, location)
    with pytest.raises(LocationError, match="in every layer"):
        Units(own, "mlp.post_act")
    with pytest.raises(LocationError, match="outside the model"):
        Units(own, "7/mlp.post_act")
    with pytest.raises(LocationError, match="norms what attention and the MLP compute"):
        Units(contexts["gemma2"], "1/mlp.post_act")
    assert Units(contexts["gemma2"], autoencoder("1/resid.torso.delta_mlp")).n_units == 40
    with pytest.raises(InputError, match="does not record where"):
        Units(own, autoencoder(None))
    assert Units(own, autoencoder(None), "1/resid.torso.post_mlp").n_units == 40
    with pytest.raises(InputError, match=f"its output has width {D + 1}"):
        Units(own, autoencoder(LAST, D + 1))
    with pytest.raises(InputError, match="location= is for autoencoders"):
        Units(own, LAST, LAST)


def test_a_unit_out_of_range_is_told_the_range(contexts) -> None:
    directions = Directions(contexts["own"], autoencoder(LAST))
    out_of_range: list[Any] = [40, -1, "40"]
    for unit in out_of_range:
        with pytest.raises(InputError, match="they are 0 to 39"):
            directions.top_logits(unit)
    no_units: list[Any] = ["x", "1.2", True, 1.5]
    for unit in no_units:
        with pytest.raises(InputError, match="expected"):
            directions.top_logits(unit)
    with pytest.raises(InputError, match="channels 0 to 3"):
        Units(contexts["own"], "1/attn.v_out").index("1.9")
    with pytest.raises(InputError, match="k must be at least 1"):
        directions.top_logits(0, 0)


# ---- folding ---------------------------------------------------------------------------------------


def test_folded_norms_change_nothing(tmp_path: Path, contexts) -> None:
    """Neither ``simplify()`` nor a final gain that was folded into the unembedding."""
    own, made = contexts["own"], autoencoder("0/mlp.post_act", F)
    expected = Directions(own, made).top_logits(3)
    simplified = own_context(tmp_path / "a")
    simplified.get_or_create_model(simplify=True)
    assert bool((simplified.get_weight(W.LAYER_NORM_GAIN_PRE_MLP, 0) == 1).all())
    model = own_context(tmp_path / "b").get_or_create_model()
    with torch.no_grad():
        model.unembed.weight.mul_(model.final_ln.weight)
        model.final_ln.weight.fill_(1)
    model.save(tmp_path / "folded")
    folded = StandardModelContext(tmp_path / "folded", device="cpu")
    for context in (simplified, folded):
        found = Directions(context, made).top_logits(3)
        assert [t.token for t in found.top] == [t.token for t in expected.top]
        assert [t.token for t in found.bottom] == [t.token for t in expected.bottom]
        np.testing.assert_allclose(
            [t.value for t in found.top], [t.value for t in expected.top], rtol=1e-5
        )


# ---- lists, histogram, moments -----------------------------------------------------------------------


def test_lists_histogram_and_moments_are_those_of_all_logits(contexts) -> None:
    directions = Directions(contexts["own"], autoencoder(LAST))
    logits = directions.logits([11])[0].double().numpy()
    found = directions.top_logits(11, 5)
    order = np.argsort(-logits, kind="stable")
    assert [t.token for t in found.top] == order[:5].tolist()
    assert [t.token for t in found.bottom] == order[::-1][:5].tolist()
    np.testing.assert_allclose([t.value for t in found.top], logits[order[:5]], rtol=1e-5)
    centred = logits - logits.mean()
    moments = [(centred**power).mean() for power in (2, 3, 4)]
    assert found.skewness == pytest.approx(moments[1] / moments[0] ** 1.5, rel=1e-4)
    assert found.kurtosis == pytest.approx(moments[2] / moments[0] ** 2, rel=1e-4)
    assert len(found.counts) == 60
    assert sum(found.counts) == V
    assert found.edges[30] == pytest.approx(0, abs=1e-12)
    assert found.counts == tuple(np.histogram(logits, 60, (found.edges[0], found.edges[-1]))[0])
    limited = directions.top_logits(11, limits=(-1.0, 1.0))
    assert sum(limited.counts) == V - int((np.abs(logits) > 1).sum()) < V
    with pytest.raises(InputError, match="a lower and a higher end"):
        directions.top_logits(11, limits=(1.0, 1.0))


def test_a_row_that_the_final_norm_turns_into_an_unembedding_ranks_its_token_first(
    contexts,
) -> None:
    """A decoder row along U_v / gain is read as U_v."""
    context, made = contexts["llama"], autoencoder(LAST)
    unembedding = context.get_weight(W.UNEMBEDDING).float()
    aligned = unembedding - unembedding.mean(dim=1, keepdim=True)
    gain = context.get_weight(W.LAYER_NORM_GAIN_FINAL).float()
    for token in range(0, V, 7):
        with torch.no_grad():
            made.decoder.weight[:, 2] = aligned[:, token] / gain / aligned[:, token].norm()
        # The longest row may win over a shorter one of the same direction: compare cosines.
        lengths = aligned.norm(dim=0)
        logits = Directions(context, made).logits([2])[0] / lengths
        assert int(logits.argmax()) == token


def test_all_lists_at_once_are_those_of_each(contexts) -> None:
    made = autoencoder("1/mlp.post_act", F)
    with torch.no_grad():
        made.decoder.weight[:, 6] = 0
    directions = Directions(contexts["own"], made)
    table = directions.table(4, chunk_bytes=4 * V * 7)  # 7 units at a time
    assert len(table) == 40
    assert table.top_tokens.shape == (40, 4)
    for unit in (0, 5, 13, 39):
        one = directions.top_logits(unit, 4)
        assert table.top_tokens[unit].tolist() == [t.token for t in one.top]
        assert table.bottom_tokens[unit].tolist() == [t.token for t in one.bottom]
        np.testing.assert_allclose(
            table.bottom_values[unit], [t.value for t in one.bottom], rtol=1e-4
        )
        assert table.skewness[unit] == pytest.approx(one.skewness, rel=1e-3)
        assert table.kurtosis[unit] == pytest.approx(one.kurtosis, rel=1e-3)
    assert table.top_tokens[6].tolist() == [-1] * 4
    assert np.isnan(table.top_values[6]).all()
    assert np.isnan(table.skewness[6])
    with pytest.raises(InputError, match="writes nothing"):
        directions.top_logits(6)
    several = list(directions.top_logits_of([5, "0", 39], 4, chunk_bytes=4 * V * 2))
    for found, unit in zip(several, (5, 0, 39), strict=True):
        one = directions.top_logits(unit, 4)
        assert found.unit == one.unit
        assert [t.token for t in found.top] == [t.token for t in one.top]
        assert found.edges == pytest.approx(one.edges, rel=1e-5)
        assert (sum(found.counts), found.note) == (V, one.note)
    with pytest.raises(InputError, match=r"latent 6 of 1/mlp\.post_act writes nothing"):
        list(directions.top_logits_of([5, 6]))
    some = directions.table(4, [13, 5])
    assert some.units.tolist() == [13, 5]
    assert some.top_tokens.tolist() == table.top_tokens[[13, 5]].tolist()
    with pytest.raises(InputError, match="units is empty"):
        directions.table(4, [])
    assert "40 units" in repr(table)


def test_a_latent_left_out_of_memory_writes_nothing(contexts) -> None:
    whole = autoencoder(LAST)
    whole.latents_activation_frequency[:] = torch.arange(40).float()
    pruned = omit_least_active_latents(whole, 30)
    directions = Directions(contexts["own"], pruned)
    assert directions.top_logits(20).top == Directions(contexts["own"], whole).top_logits(20).top
    with pytest.raises(InputError, match="left out of memory"):
        directions.top_logits(3)


def test_what_was_computed_is_kept(contexts, monkeypatch: pytest.MonkeyPatch) -> None:
    directions = Directions(contexts["own"], autoencoder(LAST))
    first = directions.top_logits(1)
    monkeypatch.setattr(ModelContext, "get_weight", None)  # nothing is read again
    assert directions.top_logits("1") is first
    assert directions.top_logits(2).unit == f"latent 2 of {LAST}"


def test_hostile_tokens_are_escaped_in_text_and_html(
    text_model: Transformer, tmp_path: Path
) -> None:
    text_model.save(tmp_path)
    context = StandardModelContext(tmp_path, device="cpu")
    found = top_logits(context, LAST, 3, 257)
    assert {t.text for t in found.top} >= {"\\x1b", "↵", "<", "&", "⟨E2⟩"}
    for text in (repr(found), found._repr_html_()):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "'\\x1b'" in repr(found)
    assert "<code>&lt;</code>" in found._repr_html_()
    assert len(top_logits(context, LAST, 3)._repr_html_()) < 30_000


# ---- hardly trained tokens -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_tales() -> StandardModelContext:
    return StandardModelContext("tiny-tales", device="cpu")


def test_tokens_that_training_never_met_are_left_out(tiny_tales: StandardModelContext) -> None:
    made = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", "cpu").get_autoencoder(3)
    directions, everything = (
        Directions(tiny_tales, made, keep_hardly_trained=keep) for keep in (False, True)
    )
    marked = directions.hardly_trained.marked
    encoding = tiny_tales.get_encoding()
    never = [encoding.encode_single_token(bytes([byte])) for byte in (0xC0, 0xF5, 0xFF, 0x00, 0x1B)]
    assert marked[never].all()
    common = tiny_tales.encode("The old king said to his daughter, 'Go home!' and they went away.")
    assert not marked[common].any()
    assert 150 < directions.hardly_trained.count < 250
    found, with_junk = (each.table(10, range(0, 2560, 16)) for each in (directions, everything))
    for tokens in (found.top_tokens, found.bottom_tokens):
        assert not marked[torch.from_numpy(tokens).long()].any()
    assert marked[torch.from_numpy(with_junk.bottom_tokens).long()].float().mean() > 0.02
    note = directions.top_logits(7).note
    assert f"{directions.hardly_trained.count} hardly trained tokens left out" in note
    assert "left out" not in everything.top_logits(7).note.replace("scale left out", "")


class _Bytes:
    """A tokenizer of 256 bytes."""

    n_vocab = 256

    def encode_single_token(self, piece: bytes) -> int:
        return piece[0]

    def decode_single_token_bytes(self, token: int) -> bytes:
        return bytes([token])


def _texts(n_known: int = 256) -> TokenTexts:
    class Context:
        def get_encoding(self) -> _Bytes:
            encoding = _Bytes()
            encoding.n_vocab = n_known
            return encoding

    return TokenTexts(Context())  # type: ignore[arg-type]


def test_the_rule_for_hardly_trained_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(260, 32, generator=generator)
    # Random weights: nothing has moved together, so only what lies beyond the tokenizer is marked.
    found = find_hardly_trained(rows, _texts())
    assert found.marked.nonzero().flatten().tolist() == [256, 257, 258, 259]
    assert found.n_reference == 0
    # What no text contains has moved together, and so have tokens 5 and 77.
    common = torch.randn(32, generator=generator)
    together = [0xC0, 0xC1, *range(0xF5, 0x100), 5, 77]
    rows[together] = common + 0.1 * torch.randn(len(together), 32, generator=generator)
    rows[9] *= 0.01  # what gets no gradient only decays
    found = find_hardly_trained(rows[:256], _texts())
    assert found.marked.nonzero().flatten().tolist() == sorted([*together, 9])
    assert found.n_reference == 13
    assert "16 of 256 tokens" in repr(found)


def test_bytes_are_found_in_tokenizers_of_hugging_face(byte_tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    without: Any = hugging_face_context("gpt2").get_or_create_model()
    context = HuggingFaceModelContext.from_model(without.model, tokenizer)
    impossible = TokenTexts(context).impossible()
    assert len(impossible) == 13
    assert impossible == sorted(letters.index(chr(b)) for b in [0xC0, 0xC1, *range(0xF5, 0x100)])
