"""Sentences as vectors: each alone and by hand, whatever it is batched with."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_explainer.analysis.sentences import (
    COLUMNS,
    SentenceSummary,
    VectorSummary,
    read_sentences,
    rows_of,
    summarize_sentences,
    to_csv,
    to_json,
    to_table,
)
from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.model_context import ModelContext, StandardModelContext
from neuron_explainer.models.transformer import Transformer

SENTENCES = [
    "A cat.",
    "The ferry left, a little after six.",
    "x",
    "This sentence is a good deal longer than the forty tokens of the model's context. " * 2,
]


@pytest.fixture(scope="module")
def context(text_model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> ModelContext:
    folder = tmp_path_factory.mktemp("model")
    text_model.save(folder / "model")
    return StandardModelContext(str(folder / "model"), "cpu", torch.float64)


def dictionary(location: str | None = "1/resid.torso.delta_mlp", seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    found = Autoencoder(40, 16, location=location, dtype=torch.float64)
    torch.nn.init.normal_(found.latent_bias, 0, 0.2)
    return found.requires_grad_(False)


def by_hand(context: ModelContext, autoencoder: Autoencoder, sentence: str, bos: bool):
    """Mean activation, mean code, code of the mean: one token after the other, without padding."""
    model = context.get_or_create_model()
    ids, size = context.encode(sentence), context.n_context - int(bos)
    xs = []
    for start in range(0, len(ids), size):
        window = ([256] if bos else []) + ids[start : start + size]
        place = str(autoencoder.location)
        with torch.no_grad():
            xs += list(model.capture(torch.tensor([window]), place)[place][0, int(bos) :])
    assert len(xs) == len(ids)
    mean = torch.stack(xs).mean(0)
    codes = torch.stack([autoencoder.encode(x) for x in xs]).mean(0)
    return len(ids), mean.numpy(), codes.numpy(), autoencoder.encode(mean).numpy()


def assert_summary(found: VectorSummary, vector: np.ndarray) -> None:
    assert found.mean == pytest.approx(vector.mean(), rel=1e-9)
    assert found.variance == pytest.approx(((vector - vector.mean()) ** 2).mean(), rel=1e-9)
    assert found.max == pytest.approx(vector.max(), rel=1e-9)
    assert found.position == vector.argmax()


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_numbers_are_those_of_each_sentence_alone(
    context: ModelContext, batch_size: int, bos: bool
) -> None:
    ae = dictionary()
    found = summarize_sentences(context, SENTENCES, {"d": ae}, bos=bos, batch_size=batch_size)
    assert [summary.sentence for summary in found] == SENTENCES
    for summary in found:
        n_tokens, mean, codes, code = by_hand(context, ae, summary.sentence, bos)
        assert summary.n_tokens == n_tokens
        assert summary.location == "1/resid.torso.delta_mlp"
        assert_summary(summary.activation, mean)
        assert_summary(summary.mean_of_codes, codes)
        assert_summary(summary.code_of_mean, code)
        assert summary.n_tokens == 1 or summary.mean_of_codes != summary.code_of_mean


def test_any_layer_or_all(context: ModelContext, tmp_path: Path) -> None:
    for layer in (0, 1):
        dictionary(None, seed=layer).save(tmp_path / str(layer))
    paths = {layer: str(tmp_path / str(layer)) for layer in (0, 1)}
    both = AutoencoderContext(
        AutoencoderConfig("resid_delta_mlp", paths), "cpu", dtype=torch.float64
    )
    found = summarize_sentences(context, SENTENCES[:2], both)
    places = [f"{layer}/resid.torso.delta_mlp" for layer in (0, 0, 1, 1)]
    assert [summary.location for summary in found] == places
    alone = summarize_sentences(context, SENTENCES[:2], {places[2]: dictionary(None, seed=1)})
    assert [s.row() for s in found[2:]] == [pytest.approx(s.row()) for s in alone]
    assert [next(iter(row)) for row in rows_of(found)] == ["Location"] * 4
    assert [list(row) for row in rows_of(alone)] == [list(COLUMNS)] * 2


def summary(sentence: str) -> SentenceSummary:
    a, b, c = (VectorSummary(i + 0.5, i + 1 / 3, i + 2.25, i) for i in range(3))
    return SentenceSummary(sentence, "3/mlp.post_act", 4, a, b, c)


def test_vectors_are_summarised_by_hand() -> None:
    found = VectorSummary.of(torch.tensor([1.0, 4.0, 4.0, -1.0]))
    assert found == VectorSummary(2.0, 4.5, 4.0, 1)


def test_the_table_has_nine_columns() -> None:
    rows = rows_of([summary("one")])
    assert len(COLUMNS) == 9
    assert list(rows[0].values()) == ["one", 0.5, 1 / 3, 2.25, 0, 1.5, 4 / 3, 3.25, 1]
    other = rows_of([summary("one")], "code_of_mean")[0]
    assert list(other.values())[5:] == [2.5, 7 / 3, 4.25, 2]
    lines = to_table([summary("one"), summary("two\nlines " * 9)]).splitlines()
    assert len(lines) == 4
    assert lines[0].split("  ")[0].strip() == "Sentence"
    assert lines[2].split() == [
        "one",
        "0.5",
        "0.333333",
        "2.25",
        "0",
        "1.5",
        "1.33333",
        "3.25",
        "1",
    ]
    assert lines[3].startswith("two lines two lines two lines two lines…")


def test_csv_and_json_keep_everything() -> None:
    summaries = [summary('a "quoted", text\nof two lines'), summary("ü")]
    rows = list(csv.DictReader(io.StringIO(to_csv(summaries))))
    again = json.loads(to_json(summaries))
    assert again == rows_of(summaries)
    for read, row in zip(rows, again, strict=True):
        assert list(read) == list(COLUMNS)
        assert read["Sentence"] == row["Sentence"]
        assert float(read["Sparse Var"]) == row["Sparse Var"]
    assert to_csv([]) == ",".join(COLUMNS) + "\n"
    assert "ü" in to_json(summaries)


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "sentences.csv"
    path.write_text('\ufeffid,sentence\n1,"One, two."\n2,"of two\nlines"\n', encoding="utf-8")
    assert read_sentences(path) == ["One, two.", "of two\nlines"]
    assert read_sentences(path, "id") == ["1", "2"]
    with pytest.raises(InputError, match="the column 'text', found 'id', 'sentence'"):
        read_sentences(path, "text")
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        read_sentences(tmp_path / "none.csv")
    path.write_text("sentence,id\nyes,1\n ,2\n")
    with pytest.raises(InputError, match="line 3: the sentence is empty"):
        read_sentences(path)
    path.write_text("")
    with pytest.raises(InputError, match="found nothing"):
        read_sentences(path)
    path.write_bytes(b"sentence\n\xff\n")
    with pytest.raises(InputError, match="expected UTF-8, but byte 9"):
        read_sentences(path)


def test_bad_input(context: ModelContext) -> None:
    with pytest.raises(InputError, match="sentence 2 is empty"):
        summarize_sentences(context, ["a", ""], {"d": dictionary()})
    with pytest.raises(InputError, match="there are no sentences"):
        summarize_sentences(context, [], {"d": dictionary()})
    with pytest.raises(InputError, match="batch_size"):
        summarize_sentences(context, ["a"], {"d": dictionary()}, batch_size=0)
