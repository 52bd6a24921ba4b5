"""Factors: the strongest tokens, in which layers, because of which words, and the pages about them."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch

from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.factors import (
    FactorDictionary,
    FactorExample,
    FactorExamples,
    Importance,
    Saliency,
    SaliencyConfig,
    SaliencyFile,
    Sentences,
    collect_examples,
    importance,
    plot_importance,
    read_records,
    saliency_of,
    write_pages,
    write_records,
)
from neuron_explainer.analysis.factors.collect import PARTIAL_FOLDER, hash_of
from neuron_explainer.analysis.factors.examples import EXAMPLES_FILE
from neuron_explainer.analysis.factors.pages import opacities, page_name, sentence_html
from neuron_explainer.analysis.factors.pieces import pieces
from neuron_explainer.analysis.factors.saliency import (
    explain,
    key_of,
    replacement_token,
    samples,
    weighted_ridge,
)
from neuron_explainer.analysis.factors.strongest import Entries, Strongest
from neuron_explainer.analysis.highlights import visible
from neuron_explainer.errors import CheckpointError, InputError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.latents import Latents
from neuron_explainer.models.autoencoders.nonlinearities import Fista
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from tests.activations.helpers import random_corpus, save_context
from tests.conftest import TINY, make_model

RESID = "resid.torso.post_mlp"
PLACES = [ActivationLocation(RESID, layer) for layer in range(TINY.n_layers)]


# ---- the strongest tokens --------------------------------------------------------------------------


def brute_force(dense: np.ndarray, n: int) -> list[list[tuple[float, int]]]:
    """For each factor (score, position), by sorting everything that is active."""
    return [
        sorted(((s, i) for i, s in enumerate(column) if s > 0), key=lambda e: (-e[0], e[1]))[:n]
        for column in dense.T.tolist()
    ]


def as_lists(entries: Entries, n_factors: int) -> list[list[tuple[float, int]]]:
    parts = [entries.of(factor) for factor in range(n_factors)]
    return [list(zip(p.score.tolist(), p.position.tolist(), strict=True)) for p in parts]


@pytest.mark.parametrize("n", [1, 3, 10, 500])
@pytest.mark.parametrize("seed", range(3))
def test_the_strongest_are_those_of_sorting_everything(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.integers(-2, 4, (97, 7)).astype(
        np.float32
    )  # many ties, and many that are not active
    dense[:, 5] = 0
    expected = brute_force(dense, n)
    for batch, per_merge in ((1, 1), (10, 3), (97, 1), (200, 1)):
        strongest = Strongest(7, n)
        rows = rng.permutation(97)
        for number, start in enumerate(range(0, 97, batch)):
            some = np.sort(rows[start : start + batch])
            codes = Latents.of(torch.from_numpy(dense[some]))
            strongest.add(codes, torch.from_numpy(some))
            if number % per_merge == 0:
                strongest.merge()
        assert as_lists(strongest.merge(), 7) == expected


def test_codes_that_are_not_finite_are_refused() -> None:
    codes = Latents(torch.tensor([[1.0], [float("nan")]]), torch.zeros(2, 1, dtype=torch.long), 3)
    with pytest.raises(InputError, match="corpus position 41 holds NaN"):
        Strongest(3, 2).add(codes, torch.tensor([40, 41]))


# ---- a pass over sentences -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    return save_context(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus() -> TokenCorpus:
    return random_corpus([23, 4, 0, 31, 8, 1, 17])


def dictionary(n_inputs: int = TINY.d_model, n: int = 12, penalty: float = 0.3) -> Autoencoder:
    torch.manual_seed(0)
    found = Autoencoder(n, n_inputs, Fista(penalty, 200, 1e-6), tied=True, location=RESID)
    with torch.no_grad():
        found.encoder.weight.copy_(torch.nn.functional.normalize(found.encoder.weight, dim=1))
    return found.requires_grad_(False)


def alone(context: ModelContext, sentences: Sentences, place: ActivationLocation) -> np.ndarray:
    """The codes of all tokens ``[t, l]``, each sentence run by itself."""
    model, found = context.get_or_create_model(), []
    for number in range(len(sentences.corpus)):
        tokens = torch.from_numpy(sentences.corpus.document(number))[None]
        bos = False if sentences.bos is None else sentences.bos
        with torch.no_grad():
            x = model.capture(tokens, place, bos=bos)[place][0]
        found.append(dictionary().encode(x[0 if sentences.bos is None else 1 :]))
    return torch.cat(found).numpy()


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize("shard_size", [1, 7, 12, 1000])
def test_examples_are_those_of_all_sentences(
    context: ModelContext, corpus: TokenCorpus, shard_size: int, bos: int | None
) -> None:
    """For any number of shards, the last one included, and for less than one shard."""
    sentences = Sentences.cut(corpus, 9, bos)
    assert len(sentences.corpus) == 12
    (found,) = collect_examples(
        context,
        {"d": FactorDictionary(dictionary(), PLACES)},
        sentences,
        n_examples=20,
        shard_size=shard_size,
        batch_size=4,
    ).values()
    assert found.n_tokens == corpus.n_tokens
    for place in PLACES:
        dense = alone(context, sentences, place)
        for factor, expected in enumerate(brute_force(np.where(dense > 1e-4, dense, 0), 20)):
            examples = found.examples(factor, place)
            score = [each.score for each in examples]
            np.testing.assert_allclose(score, [s for s, _ in expected], atol=2e-4)
            assert score == sorted(score, reverse=True)
            for each in examples:
                assert each.score == pytest.approx(dense[each.position, factor], abs=2e-4)
                sentence = sentences.corpus.document(each.sent_index)
                assert each.tokens == tuple(sentence)
                assert each.position == sentences.corpus.starts[each.sent_index] + each.index
        last = sentences.corpus.starts[11]
        assert (found.at(place).position >= last).any()  # the last sentence gives examples too


def test_lengths_of_activations_are_measured(context: ModelContext, corpus: TokenCorpus) -> None:
    sentences = Sentences.cut(corpus, 9)
    subject = {"d": FactorDictionary(dictionary(), PLACES)}
    (found,) = collect_examples(context, subject, sentences, n_examples=1, batch_size=3).values()
    model = context.get_or_create_model()
    for place in PLACES:
        with torch.no_grad():
            rows = [
                model.capture(torch.from_numpy(sentences.corpus.document(i))[None], place)[place][0]
                for i in range(len(sentences.corpus))
            ]
        expected = torch.cat(rows).double().square().sum(1).mean().sqrt()
        assert found.rms[place] == pytest.approx(float(expected), rel=1e-5)


def test_an_interrupted_pass_continues(
    context: ModelContext, corpus: TokenCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = Sentences.cut(corpus, 9, 0)
    subjects = {
        "one": FactorDictionary(dictionary(), PLACES),
        "two": FactorDictionary(dictionary(n=5), PLACES[:1]),
    }

    def collect(folder: Path, **changes: Any) -> dict[str, FactorExamples]:
        settings: dict[str, Any] = {"n_examples": 6, "shard_size": 2, "batch_size": 2}
        return collect_examples(context, subjects, sentences, folder, **settings | changes)

    whole = collect(tmp_path / "whole")
    monkeypatch.setattr("neuron_explainer.analysis.factors.collect._Pass.add", _stops_after(3))
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "part")
    monkeypatch.undo()
    assert (tmp_path / "part" / PARTIAL_FOLDER).is_dir()
    with pytest.raises(InputError, match="interrupted pass with other settings"):
        collect(tmp_path / "part", n_examples=7)
    resumed = collect(tmp_path / "part")
    for name, found in whole.items():
        again = FactorExamples.load(tmp_path / "part" / name)
        for place in found.locations:
            for other in (resumed[name], again):
                for column, same in zip(found.at(place), other.at(place), strict=True):
                    np.testing.assert_array_equal(column, same)
                assert other.rms == found.rms
                assert other.n_tokens == corpus.n_tokens
    assert not (tmp_path / "part" / PARTIAL_FOLDER).exists()
    there = collect(tmp_path / "part")  # already
    assert {name: each.settings for name, each in there.items()} == {
        name: each.settings for name, each in whole.items()
    }
    with pytest.raises(InputError, match="is not empty"):
        collect(tmp_path / "part", n_examples=7)


def test_a_folder_that_was_not_finished_or_is_in_use(
    context: ModelContext, corpus: TokenCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = Sentences.cut(corpus, 9)
    subject = {"d": FactorDictionary(dictionary(), PLACES)}

    def stop(self: FactorExamples, folder: Path) -> None:
        (folder / "x").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # killed when it had written one of its two files
        patch.setattr(FactorExamples, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            collect_examples(context, subject, sentences, tmp_path / "out", n_examples=2)
    assert (tmp_path / "out" / "x").exists()
    (found,) = collect_examples(
        context, subject, sentences, tmp_path / "out", n_examples=2
    ).values()
    assert FactorExamples.load(tmp_path / "out").rms == found.rms
    (tmp_path / "busy").mkdir()
    with (
        filelock.FileLock(tmp_path / "busy" / ".lock"),
        pytest.raises(InputError, match="another process writes to it"),
    ):
        collect_examples(context, subject, sentences, tmp_path / "busy")


def _stops_after(n: int) -> Any:
    from neuron_explainer.analysis.factors.collect import _Pass

    add = _Pass.add
    calls: list[Any] = []

    def stop(self: Any, batch: Any) -> None:
        if len(calls) == n:
            raise KeyboardInterrupt
        calls.append(batch)
        add(self, batch)

    return stop


def test_sentences_that_are_too_long(context: ModelContext, corpus: TokenCorpus) -> None:
    subject = {"d": FactorDictionary(dictionary(), PLACES)}
    with pytest.raises(InputError, match="sentence_length=11 is the most"):
        collect_examples(context, subject, Sentences.cut(corpus, 12, 0))


# ---- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    """A model that reads bytes."""
    model = make_model(seed=5, n_vocab=257, ctx_window=60)
    model.tokenizer = byte_tokenizer
    folder = tmp_path_factory.mktemp("words")
    model.save(folder)
    return StandardModelContext(folder, "cpu")


TEXTS = [
    "A <b>cat</b> & a dog.",
    "Ein Käse für 3 €, bitte!",
    "A <b>cat</b> & a dog.",
    "\x1b[31m\n♥",
]


@pytest.fixture(scope="module")
def found(words: ModelContext) -> FactorExamples:
    corpus = TokenCorpus.of([words.encode(text) for text in TEXTS], "texts")
    subject = {"d": FactorDictionary(dictionary(), PLACES)}
    sentences = Sentences.cut(corpus, 40, 256)
    return collect_examples(words, subject, sentences, n_examples=30)["d"]


def test_records_are_sorted_and_saved(
    found: FactorExamples, words: ModelContext, tmp_path: Path
) -> None:
    found.save(tmp_path)
    again = FactorExamples.load(tmp_path)
    assert again.settings == found.settings
    assert again.rms == found.rms
    assert (again.n_factors, again.n_examples, again.n_tokens) == (12, 30, found.n_tokens)
    everything = {}
    for factor in range(12):
        records = again.records(factor, PLACES[1], words)
        assert records == found.records(factor, PLACES[1], words)
        assert [r["score"] for r in records] == sorted((r["score"] for r in records), reverse=True)
        for record in records:
            assert list(record) == ["word", "index", "sent_index", "score", "sent"]
            assert record["sent"] == TEXTS[record["sent_index"]]
            token = words.encode(record["sent"])[record["index"]]
            assert record["word"] == words.decode_token(token)
        everything[factor] = records
    assert {r["sent_index"] for records in everything.values() for r in records} == {0, 1, 2, 3}
    write_records(tmp_path / "r.jsonl", everything)
    assert read_records(tmp_path / "r.jsonl") == {f: r for f, r in everything.items() if r}
    first = found.examples(0, PLACES[1], each_sentence_once=True)
    assert len({each.tokens for each in first}) == len(first) <= 3  # two texts are the same


def test_pickled_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "examples.npy"
    np.save(path, np.array({0: []}, dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"pickle, which can run any code .* JSON lines"):
        read_records(path)
    with pytest.raises(InputError, match="not written"):
        write_records(path, {})


@pytest.mark.parametrize("line", ["{", "[]", '{"factor": 1}', '{"factor": "1", "word": ""}'])
def test_lines_that_are_no_records(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text(f"{line}\n", "utf-8")
    with pytest.raises(CheckpointError, match="line 1: expected a record"):
        read_records(tmp_path / "r.jsonl")


def test_damaged_folders(found: FactorExamples, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no config\.json"):
        FactorExamples.load(tmp_path)
    found.save(tmp_path)
    data = (tmp_path / EXAMPLES_FILE).read_bytes()
    (tmp_path / EXAMPLES_FILE).write_bytes(data[:-1] + b"\x07")
    with pytest.raises(CheckpointError, match="damaged"):
        FactorExamples.load(tmp_path)
    (tmp_path / EXAMPLES_FILE).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        FactorExamples.load(tmp_path)
    found.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_factors": 2}), "utf-8")
    with pytest.raises(CheckpointError, match="none of 0 to 1"):
        FactorExamples.load(tmp_path)


def test_what_is_not_there(found: FactorExamples) -> None:
    with pytest.raises(InputError, match="numbered 0 to 11; found 12"):
        found.examples(12, PLACES[0])
    with pytest.raises(InputError, match=f"some at 0/{RESID}, 1/{RESID}"):
        found.examples(0, "1/mlp.post_act")


# ---- importance ------------------------------------------------------------------------------------


def planted_context(folder: Path, n_layers: int = 6) -> ModelContext:
    """A model whose MLP of layer k writes direction k, and less of its neighbours', at every token."""
    model = make_model(n_layers=n_layers)
    with torch.no_grad():
        layers: Any = model.xf_layers
        for k, layer in enumerate(layers):
            layer.mlp.out_layer.weight.zero_()
            layer.mlp.out_layer.bias.zero_()
            for direction in range(n_layers):
                layer.mlp.out_layer.bias[direction] = 4.0 / (1 + abs(k - direction))
    model.save(folder)
    return StandardModelContext(folder, "cpu")


def test_a_factor_planted_in_a_layer_peaks_there(tmp_path: Path, corpus: TokenCorpus) -> None:
    context = planted_context(tmp_path)
    subject = dictionary(n=8)
    with torch.no_grad():
        subject.encoder.weight.copy_(torch.eye(8, TINY.d_model))
    places = [ActivationLocation("resid.torso.delta_mlp", layer) for layer in range(6)]
    (examples,) = collect_examples(
        context, {"d": FactorDictionary(subject, places)}, Sentences.cut(corpus, 9), n_examples=10
    ).values()
    found = importance(examples)
    assert found.values.shape == (8, 6)
    assert found.peak[:6].tolist() == [0, 1, 2, 3, 4, 5]
    expected = [[max(0, 4 / (1 + abs(k - c)) - 0.3) for k in range(6)] for c in range(6)]
    np.testing.assert_allclose(found.values[:6], expected, atol=1e-4)
    assert found.levels == ["low", "low", "mid", "mid", "high", "high", "silent", "silent"]
    assert set(found.strongest()) == set(range(6))
    lines = found.to_csv().splitlines()
    assert lines[0].startswith("factor,level,peak,0/resid.torso.delta_mlp")
    assert lines[3].startswith("2,mid,2/resid.torso.delta_mlp,")
    assert lines[7].startswith("6,silent,,0.0")
    relative = importance(examples, relative=True)
    rms = [examples.rms[place] for place in places]
    np.testing.assert_allclose(relative.values, found.values / rms)


def test_tokens_without_the_factor_count_as_zero(found: FactorExamples) -> None:
    for n in (1, 7, 30):
        curves = importance(found, n).values
        for factor in range(12):
            for column, place in enumerate(PLACES):
                scores = [each.score for each in found.examples(factor, place, n)]
                assert curves[factor, column] == pytest.approx(sum(scores) / n)
    with pytest.raises(InputError, match="n must lie in 1 to 30"):
        importance(found, 31)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_curves_are_drawn(found: FactorExamples, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"curves.{ending}"
    plot_importance(path, importance(found), [0, 1])
    assert path.stat().st_size > 1000
    with pytest.raises(InputError, match=r"\.svg, \.png or \.pdf"):
        plot_importance(tmp_path / "curves.txt", importance(found), [0])


# ---- saliency --------------------------------------------------------------------------------------


class Toy:
    """A model whose activation is 2 if the token in place 1 is 11, plus 3 if that in place 4 is 14, plus 6
    if both are."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def get_or_create_model(self) -> "Toy":
        return self

    def encode(self, text: str) -> list[int]:
        return [0]

    def get_encoding(self) -> object:
        return object()

    def capture(self, tokens: torch.Tensor, place: ActivationLocation, bos: int | bool) -> Any:
        assert bos == 99
        assert bos is not True
        self.batches.append(len(tokens))
        first, second = (tokens[:, 1] == 11).float(), (tokens[:, 4] == 14).float()
        y = 2 * first + 3 * second + 6 * first * second
        return {place: y[:, None, None].expand(-1, tokens.shape[1], 1)}


def identity() -> Autoencoder:
    found = Autoencoder(1, 1, tied=True)
    with torch.no_grad():
        found.encoder.weight.fill_(1.0)
    return found.requires_grad_(False)


def example(n: int = 12, index: int = 9) -> FactorExample:
    return FactorExample(0, PLACES[0], 11.0, 200 + index, 3, index, tuple(range(10, 10 + n)))


def test_the_two_tokens_that_matter_get_the_two_largest_weights() -> None:
    toy: Any = Toy()
    config = SaliencyConfig(num_samples=500, replacement=" ")
    found = saliency_of(toy, identity(), example(), config, bos=99)
    assert found.score == 11.0
    assert len(found.weights) == 10  # those after the target cannot matter
    order = np.argsort(-np.abs(found.weights))
    assert set(order[:2]) == {1, 4}
    assert min(found.weights[1], found.weights[4]) > 5 * abs(found.weights[order[2]])
    assert found.r2 is not None
    assert 0.5 < found.r2 <= 1
    assert key_of(found) == (0, PLACES[0], 209)
    for size in (1, 7, 1000):  # the same whatever goes through the model at once
        assert saliency_of(toy, identity(), example(), config, bos=99, batch_size=size) == found
    other = SaliencyConfig(num_samples=500, replacement=" ", saliency_seed=1)
    assert saliency_of(toy, identity(), example(), other, bos=99) != found
    few = SaliencyConfig(num_samples=500, replacement=" ", num_features=2)
    weights = saliency_of(toy, identity(), example(), few, bos=99).weights
    assert np.flatnonzero(weights).tolist() == [1, 4]


def test_equal_copies_are_run_once() -> None:
    toy: Any = Toy()
    config = SaliencyConfig(num_samples=2001, replacement=" ")
    saliency_of(toy, identity(), example(index=4), config, bos=99, batch_size=1000)
    assert sum(toy.batches) <= 2**5


def test_a_factor_that_never_changes_has_no_weights() -> None:
    toy: Any = Toy()
    still = FactorExample(0, PLACES[0], 0.0, 200, 3, 5, (1, 2, 3, 4, 5, 6))
    found = saliency_of(toy, identity(), still, SaliencyConfig(replacement=" "), bos=99)
    assert found.r2 is None
    assert not np.any(found.weights)


def test_samples_remove_a_uniform_number_of_random_tokens() -> None:
    kept = samples(8, SaliencyConfig(num_samples=8001), 3, 1)
    assert kept[0].all()
    removed = (~kept[1:]).sum(1)
    assert np.bincount(removed, minlength=9)[0] == 0
    np.testing.assert_allclose(np.bincount(removed, minlength=9)[1:] / 8000, 1 / 8, atol=0.02)
    np.testing.assert_allclose((~kept[1:]).mean(0), 4.5 / 8, atol=0.02)
    assert not np.array_equal(kept, samples(8, SaliencyConfig(num_samples=8001), 3, 2))


def test_the_ridge_is_scikit_learns() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y, w = rng.integers(0, 2, (60, 9)).astype(float), rng.normal(size=60), rng.random(60)
    for alpha in (0.01, 1.0, 30.0):
        theirs = linear_model.Ridge(alpha=alpha).fit(x, y, sample_weight=w)
        coefficients, intercept = weighted_ridge(x, y, w, alpha)
        np.testing.assert_allclose(coefficients, theirs.coef_, atol=1e-10)
        assert intercept == pytest.approx(theirs.intercept_)


def test_the_steps_are_those_of_lime() -> None:
    """The kernel, the choice of features and the last fit, written out as LIME has them."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    pairwise_distances = pytest.importorskip("sklearn.metrics").pairwise_distances
    config = SaliencyConfig(num_samples=80, num_features=3)
    z = samples(7, config)
    z = z[z.any(1)]
    y = z @ np.array([0.1, -3.0, 0.2, 2.0, 0.0, 0.5, -0.1]) + 0.3 * (z[:, 0] & z[:, 3])
    distances = pairwise_distances(z.astype(float), z[:1].astype(float), "cosine").ravel() * 100
    w = np.sqrt(np.exp(-(distances**2) / 25**2))
    first = linear_model.Ridge(alpha=0.01).fit(z, y, sample_weight=w)
    features = sorted(range(7), key=lambda i: -abs(first.coef_[i]))[:3]
    last = linear_model.Ridge(alpha=1).fit(z[:, features], y, sample_weight=w)
    weights, intercept, r2 = explain(z, y, config)
    np.testing.assert_allclose(weights[features], last.coef_, atol=1e-9)
    assert np.flatnonzero(weights).tolist() == sorted(features)
    assert intercept == pytest.approx(last.intercept_)
    assert r2 == pytest.approx(last.score(z[:, features], y, sample_weight=w))


def test_what_stands_for_a_removed_token(words: ModelContext) -> None:
    assert replacement_token(words, "neutral") == ord(" ")
    assert replacement_token(words, "start") == 256
    assert replacement_token(words, "_") == ord("_")
    with pytest.raises(InputError, match="has no unknown token; give replacement='neutral'"):
        replacement_token(words, "unknown")
    with pytest.raises(InputError, match="'two' is 3 tokens"):
        replacement_token(words, "two")

    class HuggingFaces:
        tokenizer = type("T", (), {"unk_token_id": 7, "pad_token_id": 5})
        bos_token = 0

    named: Any = type(
        "C", (), {"get_encoding": lambda self: HuggingFaces(), "encode": words.encode}
    )()
    assert [replacement_token(named, name) for name in ("neutral", "unknown", "pad")] == [7, 7, 5]
    HuggingFaces.bos_token = 7  # GPT-2's tokenizer of transformers calls <|endoftext|> unknown
    assert replacement_token(named, "neutral") == ord(" ")


def test_saliencies_are_added_to_a_file(tmp_path: Path) -> None:
    file, config = SaliencyFile(tmp_path), SaliencyConfig(num_samples=9)
    one = Saliency(3, str(PLACES[0]), 77, 1, 2.5, (0.5, -1.0), 0.25, 0.5)
    assert file.read() == file.begin(config, 32) == []
    file.add([one])
    with file.path.open("a") as out:
        out.write('{"factor": 4, "loca')  # the process was killed
    assert file.read() == [one]
    assert file.begin(config, 32) == [one]
    file.add([one])
    assert file.read() == [one, one]
    with pytest.raises(InputError, match="num_samples 9 there, 10 now"):
        file.begin(SaliencyConfig(num_samples=10), 32)
    file.path.write_text("{}\n")
    with pytest.raises(CheckpointError, match="does not begin with the settings"):
        file.read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 1}, "num_samples must be at least 2"),
        ({"num_features": 0}, "num_features must be at least 1"),
        ({"alpha": 0.0}, "alpha must be above 0"),
        ({"saliency_seed": -1}, "saliency_seed must lie in 0 to"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SaliencyConfig(**changes)


# ---- pages -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags of a page, and the text in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_colours_are_as_strong_as_the_published_rule_says() -> None:
    assert opacities([0.2, -0.4, 9.0, 0.1], 2) == pytest.approx([0.5, -1.0, 1.0, 0.25])
    assert opacities([0.2, -0.4, -9.0], 2) == pytest.approx([0.5, -1.0, -1.0])
    assert opacities([0.001, -0.002], 5) == pytest.approx([0.1, -0.2])  # the floor of 0.01
    assert opacities([3.0], 0) == [1.0]


def test_a_sentence_in_colours(words: ModelContext) -> None:
    ids = tuple(words.encode("a<b>&c"))
    shown = FactorExample(0, PLACES[0], 1.0, 0, 0, 3, ids)
    page = Page(html := sentence_html(words, shown, [0.5, -1.0, 0.0, 7.0]))
    assert page.text == "a<b>&c"
    assert "&lt;" in html
    assert "&gt;" in html
    assert "&amp;" in html
    assert [(attrs["class"], attrs.get("style")) for _, attrs in page.tags] == [
        ("up", "--w:0.500"),
        ("down", "--w:1.000"),
        ("target up", "--w:1.000"),
    ]
    (_, target) = Page(sentence_html(words, shown)).tags[0]
    assert target == {"class": "target"}


def test_characters_of_several_tokens_are_shown_once(words: ModelContext) -> None:
    ids = words.encode("é€x\ufffd")
    assert pieces(words, ids) == ["", "é", "", "", "€", "x", "", "", "\ufffd"]
    assert "".join(pieces(words, ids[:-1])) == words.decode(ids[:-1])
    shown = FactorExample(0, PLACES[0], 1.0, 0, 0, 1, tuple(ids))
    html = sentence_html(words, shown, [1.0, 0.5])
    assert '<span class="target up" style="--w:0.500" title="+0.5">é</span>' in html
    assert Page(html).text == "·é··€x··\ufffd"


def test_invisible_characters_are_shown() -> None:
    assert visible("a\n\x1b[31m\u202e\u2028é") == "a↵\\x1b[31m\\u202e\\u2028é"


@pytest.fixture(scope="module")
def pages(
    words: ModelContext, found: FactorExamples, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    curves = importance(found)
    subject = dictionary()
    config = SaliencyConfig(num_samples=40)
    explained = [
        saliency_of(words, subject, each, config, bos=256)
        for factor in curves.strongest(2)
        for each in found.examples(factor, PLACES[curves.peak[factor]], 3, each_sentence_once=True)
    ]
    for each in explained:
        where = found.at(each.location).of(each.factor)
        score = where.score[where.position.tolist().index(each.position)]
        assert each.score == pytest.approx(float(score), abs=1e-3)
    nasty = dict(found.settings, model='<script>x</script>"', corpus={"name": "<i>&"})
    told = FactorExamples(**{**vars(found), "settings": nasty})
    written = write_pages(folder, words, told, curves, curves.strongest(5), explained)
    assert [path.name for path in written] == [
        "index.html",
        *(page_name(factor) for factor in curves.strongest(5)),
    ]
    return folder


def test_pages_are_whole_and_run_nothing(pages: Path) -> None:
    for path in pages.iterdir():
        text = path.read_text("utf-8")
        page = Page(text)
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "img", "link", "iframe", "i"}
        assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
        for _, attrs in page.tags:  # the only styles are numbers
            assert re.fullmatch(r"--w:\d\.\d{1,3}", attrs.get("style") or "--w:0.000")
        assert not re.search(r"https?:|url\(|@import", text)
        assert "default-src 'none'" in text
        assert "\x1b" not in text


def test_a_page_shows_its_factor(found: FactorExamples, pages: Path) -> None:
    curves = importance(found)
    factor = curves.strongest(1)[0]
    page = Page((pages / page_name(factor)).read_text("utf-8"))
    assert f"Factor {factor}" in page.text
    assert curves.levels[factor] in page.text
    assert "<b>cat</b>" in page.text
    circles = [attrs for tag, attrs in page.tags if tag == "circle"]
    assert len(circles) == len(PLACES)
    opened = [i for i, a in enumerate(a for t, a in page.tags if t == "details") if "open" in a]
    assert opened == [curves.peak[factor]]
    assert any("up" in (attrs.get("class") or "") for _, attrs in page.tags)


def test_the_index_links_to_every_page(pages: Path) -> None:
    page = Page((pages / "index.html").read_text("utf-8"))
    links = {attrs["href"] for tag, attrs in page.tags if tag == "a"}
    assert links == {path.name for path in pages.iterdir()} - {"index.html"}
    assert "<i>&" in page.text


def test_a_factor_that_is_active_nowhere_has_a_page(
    words: ModelContext, found: FactorExamples, tmp_path: Path
) -> None:
    empty = {place: Entries.empty() for place in PLACES}
    silent = FactorExamples(**{**vars(found), "entries": empty})
    curves: Importance = importance(silent)
    assert curves.strongest() == []
    (_, path) = write_pages(tmp_path, words, silent, curves, [3])
    assert "active nowhere" in path.read_text("utf-8")


def test_another_dictionary_has_another_hash() -> None:
    assert hash_of(dictionary()) == hash_of(dictionary())
    assert hash_of(dictionary()) != hash_of(dictionary(penalty=0.31))
