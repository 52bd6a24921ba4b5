"""Harvesting: each vector is that of its token alone in its window, and nothing else comes out."""

from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.activations import (
    ActivationBatch,
    Harvester,
    LiveSource,
    TokenBatch,
    TokenCorpus,
    TokenWindows,
)
from neuron_explainer.errors import InputError, LocationError
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from tests.activations.helpers import SITE, harvest_all, random_corpus, save_context
from tests.conftest import PER_LAYER, TINY

BOS = 0
LENGTHS = [5, 1, 9, 3, 12, 7]


def windows(**options: Any) -> TokenWindows:
    return TokenWindows(random_corpus(LENGTHS), 10, 3, **({"concat": False, "bos": BOS} | options))


def solo(context: ModelContext, tokens: list[int], location: str = SITE) -> torch.Tensor:
    """``[s, d]``: the activations of one row, run alone."""
    with torch.no_grad():
        captured = context.get_or_create_model().capture(torch.tensor([tokens]), location)
    return captured[location][0].flatten(1)


@pytest.mark.parametrize(
    "location", [SITE, "0/resid.torso.post_mlp", "1/attn.v_out", "resid.post_ln_f"]
)
def test_rows_equal_a_solo_forward(context: ModelContext, location: str) -> None:
    """Codes of a text alone are those in a padded batch: the mistake of many who came before."""
    place = ActivationLocation.parse(location)
    for packed in (False, True):
        for batch in windows(concat=packed):
            found = harvest_all(context, [batch], location)
            expected = [
                solo(context, row[keep].tolist(), location)
                for row, keep in zip(batch.tokens, batch.position >= 0, strict=True)
            ]
            torch.testing.assert_close(found.activations[place], torch.cat(expected))


def test_each_vector_knows_its_document_and_position(context: ModelContext) -> None:
    corpus = random_corpus(LENGTHS)
    found = harvest_all(context, windows())
    assert len(found) == sum(min(n, 9) + 1 for n in LENGTHS)
    for i in range(len(found)):
        tokens = [BOS, *corpus.document(int(found.document[i]))]
        position = int(found.position[i])
        assert found.tokens[i] == tokens[position]
        alone = solo(context, tokens[: position + 1])[-1]
        torch.testing.assert_close(found.activations[ActivationLocation.parse(SITE)][i], alone)


def test_pads_never_and_start_tokens_only_when_wanted(context: ModelContext) -> None:
    with_bos = harvest_all(context, windows())
    without = harvest_all(context, windows(), keep_bos=False)
    assert (with_bos.tokens == BOS).sum() == len(LENGTHS)
    assert not (without.tokens == BOS).any()
    assert len(without) == sum(min(n, 9) for n in LENGTHS)
    for found in (with_bos, without):
        assert (found.document >= 0).all()
        assert (found.position >= 0).all()
    place = ActivationLocation.parse(SITE)
    assert torch.equal(
        with_bos.activations[place][with_bos.tokens != BOS], without.activations[place]
    )


@pytest.mark.parametrize("concat", [False, True])
def test_start_tokens_in_the_text_are_start_tokens(context: ModelContext, concat: bool) -> None:
    corpus = TokenCorpus.of([[3, 4, BOS, 5], [6, BOS], [BOS, 7, 8]])
    cut = TokenWindows(corpus, 10, 3, concat=concat, bos=BOS)
    found = harvest_all(context, cut, keep_bos=False)
    assert sorted(found.tokens.tolist()) == [3, 4, 5, 6, 7, 8]
    n_put_there = 4 if concat else 3  # one for each document, and where a window begins within one
    assert (harvest_all(context, cut).tokens == BOS).sum() == 3 + n_put_there


def test_packed_separators_go_with_the_start_tokens(context: ModelContext) -> None:
    found = harvest_all(context, windows(concat=True), keep_bos=False)
    assert sorted(zip(found.document.tolist(), found.tokens.tolist(), strict=True)) == sorted(
        (number, int(token))
        for number in range(len(LENGTHS))
        for token in random_corpus(LENGTHS).document(number)
    )


def test_one_forward_for_all_locations_that_stops_early(
    context: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = context.get_or_create_model()
    layers_run: list[int] = []
    for number, layer in enumerate(model.layers):  # type: ignore[attr-defined]
        layer.register_forward_pre_hook(lambda *_, number=number: layers_run.append(number))
    harvester = Harvester(context, ["0/mlp.post_act", "resid.post_emb", "0/resid.torso.delta_attn"])
    found = harvester(windows().batch(0))
    assert layers_run == [0]
    assert [str(place) for place in found.activations] == [str(p) for p in harvester.locations]
    assert len({len(x) for x in found.activations.values()}) == 1
    assert harvester.forward_s > 0
    every = Harvester(context, ["mlp.post_act", "1/mlp.post_act"]).locations
    assert [str(place) for place in every] == ["0/mlp.post_act", "1/mlp.post_act"]


def test_outliers_of_norm_are_left_out_at_every_location(context: ModelContext) -> None:
    places = [ActivationLocation.parse(SITE), ActivationLocation.parse("0/resid.torso.post_mlp")]
    batch = windows().batch(0)
    whole = Harvester(context, places)(batch)
    keep = torch.ones(len(whole), dtype=torch.bool)
    for place in places:
        norms = whole.activations[place].double().square().sum(1).sqrt()
        keep &= norms <= 1.05 * norms.sort().values[(len(norms) - 1) // 2]
    assert 0 < keep.sum() < len(keep)
    found = Harvester(context, places, max_norm_multiple=1.05)(batch)
    assert torch.equal(found.position, whole.position[keep])
    for place in places:
        assert torch.equal(found.activations[place], whole.activations[place][keep])


def test_vectors_can_be_trained_on(context: ModelContext) -> None:
    (x,) = Harvester(context, SITE)(windows().batch(0)).activations.values()
    assert not x.requires_grad
    assert not x.is_inference()
    weight = torch.ones(x.shape[1], requires_grad=True)
    (x @ weight).sum().backward()
    assert weight.grad is not None


def test_pads_may_stand_on_the_left(context: ModelContext) -> None:
    right = windows().batch(0)
    assert right.pad is not None
    left = TokenBatch(right.tokens.flip(1), right.document.flip(1), right.position.flip(1))
    rows = [row[keep] for row, keep in zip(left.tokens, left.position >= 0, strict=True)]
    position = (left.position >= 0).cumsum(1) - 1
    position[left.position < 0] = -1
    left = TokenBatch(left.tokens, left.document, position, right.pad.flip(1))
    (found,) = Harvester(context, SITE)(left).activations.values()
    torch.testing.assert_close(found, torch.cat([solo(context, row.tolist()) for row in rows]))


def test_dtypes(context: ModelContext) -> None:
    batch = windows().batch(0)
    (full,) = Harvester(context, SITE)(batch).activations.values()
    (half,) = Harvester(context, SITE, dtype="bf16")(batch).activations.values()
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(half, full.bfloat16())
    (rough,) = Harvester(context, SITE, autocast_bf16=True)(batch).activations.values()
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, full)
    torch.testing.assert_close(rough, full, atol=0.1, rtol=0.1)


def test_hugging_face_gives_what_the_native_model_gives() -> None:
    transformers = pytest.importorskip("transformers")
    from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

    config = transformers.GPT2Config(
        vocab_size=29,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    context = HuggingFaceModelContext.from_model(transformers.GPT2LMHeadModel(config))
    found = harvest_all(context, windows(), keep_bos=False)
    corpus = random_corpus(LENGTHS)
    for i in range(0, len(found), 5):
        row = [BOS, *corpus.document(int(found.document[i]))][: int(found.position[i]) + 1]
        alone = solo(context, row)[-1]
        torch.testing.assert_close(found.activations[ActivationLocation.parse(SITE)][i], alone)
    with pytest.raises(InputError, match="more than the context of 12"):
        harvest_all(context, TokenWindows(random_corpus([40]), 13, 1))


def test_a_wrong_location_is_named(context: ModelContext) -> None:
    with pytest.raises(LocationError, match=r"unknown location 'mlp\.post_acts'. Did you mean"):
        Harvester(context, "1/mlp.post_acts")
    with pytest.raises(LocationError, match="outside the model: it has layers 0 to 1"):
        Harvester(context, "2/mlp.post_act")
    with pytest.raises(InputError, match="at least one location"):
        Harvester(context, [])


@pytest.mark.parametrize("path", PER_LAYER)
def test_locations_are_one_vector_a_token_or_refused(context: ModelContext, path: str) -> None:
    batch = windows().batch(0)
    n = int((batch.position >= 0).sum())
    if path in ("attn.qk_logits", "attn.qk_probs"):
        with pytest.raises(LocationError, match="a number for each pair of tokens"):
            Harvester(context, f"0/{path}")
    else:
        (x,) = Harvester(context, f"0/{path}")(batch).activations.values()
        assert x.shape[0] == n
        assert x.ndim == 2


def test_windows_longer_than_the_context_are_refused(context: ModelContext) -> None:
    with pytest.raises(
        InputError, match=r"13 tokens long, more than the context of 12.*at most 12"
    ):
        Harvester(context, SITE)(TokenWindows(random_corpus([40]), 13, 1).batch(0))
    with pytest.raises(InputError, match="more than the context of 12"):
        LiveSource(Harvester(context, SITE), TokenWindows(random_corpus([4]), 13, 1))


def test_settings_that_cannot_be(context: ModelContext) -> None:
    with pytest.raises(InputError, match=r"unknown dtype 'float8'\. Known: float32"):
        Harvester(context, SITE, dtype="float8")
    with pytest.raises(InputError, match="max_norm_multiple must be above 0, found -1"):
        Harvester(context, SITE, max_norm_multiple=-1)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "inf|NaN")])
def test_what_is_not_finite_is_found(tmp_path: Path, value: float, name: str) -> None:
    context = save_context(tmp_path / "model")
    model: Any = context.get_or_create_model()
    token = int(random_corpus(LENGTHS).document(2)[4])
    with torch.no_grad():
        model.tok_embed.weight[token, 3] = value
    batch = TokenWindows(random_corpus(LENGTHS), 10, 6, concat=False, seed=None).batch(0)
    where = [
        (int(d), int(p))
        for d, p, t in zip(
            batch.document.flatten(), batch.position.flatten(), batch.tokens.flatten(), strict=True
        )
        if t == token
    ]
    document, position = where[0]
    with pytest.raises(
        InputError,
        match=rf"resid\.post_emb is ({name}) .*document {document}, position {position}, token {token}",
    ):
        Harvester(context, "resid.post_emb")(batch)


def test_float16_that_overflows_is_found(tmp_path: Path) -> None:
    context = save_context(tmp_path / "model")
    model: Any = context.get_or_create_model()
    with torch.no_grad():
        model.tok_embed.weight[:, 0] = 1e5
    with pytest.raises(
        InputError, match=r"is inf in element 0.*torch\.float16.*a wider dtype helps"
    ):
        Harvester(context, "resid.post_emb", dtype="fp16")(windows().batch(0))


def test_batches_can_be_joined_and_cut(context: ModelContext) -> None:
    whole = harvest_all(context, windows())
    parts = ActivationBatch.cat([whole.rows(slice(0, 4)), whole.rows(torch.arange(4, len(whole)))])
    assert torch.equal(parts.tokens, whole.tokens)
    assert whole.tokens.max() < TINY.n_vocab
