"""The training of the embedded model: data, arithmetic, resuming, figures. Tiny sizes."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import neuron_explainer
from neuron_explainer.activations import TokenCorpus
from neuron_explainer.analysis import ExampleStore, open_stores
from neuron_explainer.errors import InputError, SourceError
from neuron_explainer.evaluation import measure
from neuron_explainer.evaluation.figures import Losses
from neuron_explainer.evaluation.metrics import fvu
from neuron_explainer.experiments.tiny_tales import (
    autoencoder_training,
    evaluation,
    model_training,
    reach,
    stores,
)
from neuron_explainer.experiments.tiny_tales.__main__ import main
from neuron_explainer.experiments.tiny_tales.autoencoder_training import (
    Size,
    activations_of_books,
    places,
    record_statistics,
    size_of,
    train_config,
)
from neuron_explainer.experiments.tiny_tales.data import (
    HELD_OUT_BOOKS,
    ModelBatches,
    evaluation_windows,
    read_corpus,
)
from neuron_explainer.experiments.tiny_tales.fused_loss import linear_cross_entropy
from neuron_explainer.experiments.tiny_tales.model_training import (
    ModelStep,
    ModelTrainer,
    ModelTrainingConfig,
    final_hidden,
)
from neuron_explainer.experiments.tiny_tales.tokenizer import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_spec,
    train_tokenizer,
)
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoders.nonlinearities import TopK
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import StandardModelContext
from neuron_explainer.models.transformer import Transformer, TransformerConfig

CTX = 8
VOCAB = 40
BOS = VOCAB - 1
SENTENCES = "The fox ran home. It didn't stop, and nobody saw it — not even the 7 owls!\n\n"


def tiny_model(seed: int = 0) -> Transformer:
    cfg = TransformerConfig(
        enc="none", ctx_window=CTX, d_model=16, n_layers=2, n_heads=2, n_vocab=VOCAB
    )
    return Transformer(cfg, seed=seed)


def tiny_corpus(n_tokens: int = 300) -> TokenCorpus:
    return TokenCorpus.of([np.random.default_rng(3).integers(0, BOS, n_tokens).tolist()])


def tiny_batches(
    batch_size: int = 4, corpus: TokenCorpus | None = None, seed: int = 0
) -> ModelBatches:
    return ModelBatches(corpus or tiny_corpus(), CTX, batch_size, seed, BOS)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    folder.mkdir()
    for title in (*HELD_OUT_BOOKS, "a_training_book", "another"):
        (folder / f"{title}.txt").write_text(f"{title} " + SENTENCES * 30, encoding="utf-8")
    return folder


# --- data ---


def test_held_out_books_are_never_in_the_training_data(corpus: Path) -> None:
    read = read_corpus(corpus)
    assert set(read.training) == {"a_training_book", "another"}
    assert set(read.held_out) == set(HELD_OUT_BOOKS)


def test_a_corpus_without_its_held_out_books_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No corpus at"):
        read_corpus(tmp_path / "nowhere")
    (corpus / f"{HELD_OUT_BOOKS[1]}.txt").unlink()
    with pytest.raises(SourceError, match=HELD_OUT_BOOKS[1]):
        read_corpus(corpus)


def test_an_epoch_shows_each_token_once_at_most_and_each_cuts_elsewhere() -> None:
    batches = tiny_batches(corpus=TokenCorpus.of([range(300)]))
    per_epoch = batches.n_windows // 4
    orders, offsets = [], set()
    for epoch in range(4):
        plain = [n for n in range(epoch * per_epoch, (epoch + 1) * per_epoch) if n % 4]
        inputs = torch.cat([batches.batch(n)[0] for n in plain])
        assert len(set(inputs.flatten().tolist())) == inputs.numel()
        orders.append(inputs[:, 0].tolist())
        offsets |= {first % (CTX + 1) for first in orders[-1]}
        assert orders[-1] != sorted(orders[-1])
    assert len(offsets) > 1


def test_targets_are_the_next_tokens_also_behind_the_start_token() -> None:
    batches = tiny_batches(corpus=TokenCorpus.of([range(1000, 1300)]))
    for number in range(30):
        inputs, targets = batches.batch(number)
        assert inputs.shape == targets.shape == (4, CTX)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(targets[:, 1:], targets[:, :-1] + 1)
        assert bool((inputs[:, 0] == BOS).all() if number % 4 == 0 else (inputs >= 1000).all())


def test_batches_depend_on_seed_and_number_alone() -> None:
    one, other = tiny_batches(), tiny_batches()
    for number in (100, 3):
        other.batch(number)
    assert torch.equal(one.batch(7)[0], other.batch(7)[0])
    assert not torch.equal(one.batch(7)[0], tiny_batches(seed=1).batch(7)[0])
    iterator = iter(one)
    first = [next(iterator)[0] for _ in range(3)]
    other.load_state_dict({"next": 2})
    assert torch.equal(next(iter(other))[0], first[2])
    assert one.state_dict() == other.state_dict() == {"next": 3}


def test_a_corpus_too_short_for_a_batch_is_refused() -> None:
    with pytest.raises(InputError, match=r"too short .* at least 44 are needed"):
        tiny_batches(corpus=tiny_corpus(43))
    tiny_batches(corpus=tiny_corpus(44)).batch(0)


@pytest.mark.parametrize("n_tokens", [1, CTX - 1, CTX, CTX + 1, 5 * CTX + 3])
@pytest.mark.parametrize("stride", [1, 3, CTX])
def test_evaluation_predicts_every_token_of_a_book_once(n_tokens: int, stride: int) -> None:
    tokens = np.arange(n_tokens)
    predicted: list[int] = []
    for window in evaluation_windows(tokens, CTX, stride, BOS):
        assert 2 <= len(window.tokens) <= CTX + 1
        if predicted:
            assert window.count_from >= min(CTX - stride, len(predicted))
        predicted.extend(window.tokens[1:][window.count_from :])
    assert predicted == list(tokens)


def test_evaluation_refuses_a_stride_beyond_the_window() -> None:
    with pytest.raises(InputError, match="stride"):
        list(evaluation_windows(np.arange(5), CTX, CTX + 1, BOS))


# --- tokenizer ---


def test_tiktoken_reads_the_trained_tokenizer_and_agrees_with_its_trainer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    ranks = train_tokenizer([SENTENCES * 3, "Über den Fluß, naïve café\n"], vocabulary_size=300)
    save_tokenizer(ranks, tmp_path / "tokenizer.tiktoken")
    enc = load_tokenizer(tmp_path / "tokenizer.tiktoken")
    assert enc.n_vocab == len(ranks) + 1 <= 300
    assert enc.eot_token == len(ranks)
    text = SENTENCES + "Words   never seen: zebra's café, 1234\t\n\n  ¿\U0001f98a?"
    assert enc.decode(enc.encode_ordinary(text)) == text
    reference = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=_as_text(ranks), merges=_merges(ranks))
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert reference.encode(text).ids == enc.encode_ordinary(text)


def _as_text(ranks: dict[bytes, int]) -> dict[str, int]:
    from neuron_explainer.models.tokenizer_files import BYTE_OF_LETTER

    character = {byte: text for text, byte in BYTE_OF_LETTER.items()}
    return {"".join(character[b] for b in token): rank for token, rank in ranks.items()}


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """The pair that each token was merged from: the split into the two lowest ranks that BPE makes."""
    from tiktoken._educational import bpe_encode

    names = {rank: text for text, rank in _as_text(ranks).items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            smaller = {t: r for t, r in ranks.items() if r < rank}
            left, right = bpe_encode(smaller, token, visualise=None)
            merges.append((names[left], names[right]))
    return merges


def test_a_missing_tokenizer_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="tiny_tales tokenizer"):
        tokenizer_spec(tmp_path / "tokenizer.tiktoken")


# --- the loops ---


def test_fused_loss_is_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1100, 24, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 24, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCAB, (1100,), generator=generator)
    loss = linear_cross_entropy(x, weight, targets)
    expected = F.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    grads = torch.autograd.grad(loss, [x, weight])
    for found, right in zip(grads, torch.autograd.grad(expected, [x, weight]), strict=True):
        assert float((found - right).norm() / right.norm()) < 2e-2  # bfloat16 products


def test_training_arithmetic_is_the_models_own() -> None:
    model, (tokens, _) = tiny_model(), tiny_batches().batch(0)
    with torch.no_grad():
        ours = model.unembed(final_hidden(model, tokens))
        logits, _ = model(tokens)
    assert float((ours - logits).norm() / logits.norm()) < 2e-2  # bfloat16 products


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_learning_rates_are_finite(number: float) -> None:
    with pytest.raises(InputError, match="muon_lr: expected a finite number"):
        ModelTrainingConfig(steps=12, decay_steps=4, muon_lr=number)


def test_model_training_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = ModelTrainingConfig(steps=12, decay_steps=4, warmup_steps=2, batch_size=4)

    class Stopped(ModelTrainer):
        """Ends like a killed process."""

        def learn(self, batch: tuple[torch.Tensor, torch.Tensor], step: int) -> ModelStep:
            if step == 7:
                raise RuntimeError("killed")
            return super().learn(batch, step)

    def run(folder: Path, kind: type[ModelTrainer] = ModelTrainer, seed: int = 0) -> ModelTrainer:
        trainer = kind(tiny_model(seed), config, folder / "model")
        model_training.train(trainer, tiny_batches(), folder / "run", 5, progress=False)
        return trainer

    whole = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", Stopped)
    resumed = run(tmp_path / "parts", seed=99)  # whose first weights do not matter
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert whole.model.unembed.weight is whole.model.tok_embed.weight
    assert Transformer.load(tmp_path / "parts" / "model", device="cpu").dtype == torch.float16
    fresh, batch = ModelTrainer(tiny_model(), config), tiny_batches().batch(1)
    assert whole.loss is not None
    assert whole.loss < fresh.learn(batch, 0).loss


def test_autoencoders_of_all_layers_are_learnt_together(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "model")
    context = StandardModelContext(tmp_path / "model", device="cpu")
    sizes = {"mlp.post_act": Size(96, 4, 1e-2), "1/resid.torso.delta_attn": Size(64, 2, 1e-2)}

    def trained(
        steps: int, folder: Path | None, locations: list[str] | None = None
    ) -> dict[str, Autoencoder]:
        configs = {
            str(place): train_config(place, size_of(place, sizes), steps, steps // 2, 0, 64)
            for place in places(context, locations or list(sizes))
        }
        source = activations_of_books(context, tiny_corpus(), list(configs), seed=0)
        return autoencoder_training.train(source, configs, folder, buffer=512)

    little, much = trained(1, None), trained(60, tmp_path / "run")
    assert set(much) == {"0/mlp.post_act", "1/mlp.post_act", "1/resid.torso.delta_attn"}
    tokens = tiny_batches(32).batch(1)[0]
    captured = context.get_or_create_model().capture(tokens, list(much))
    for location, autoencoder in much.items():
        x = captured[ActivationLocation.parse(location)]
        assert fvu(x, autoencoder.reconstruct(x)) < 0.8 * fvu(x, little[location].reconstruct(x))
        assert str(autoencoder.location) == location
        assert autoencoder.model_name == "tiny-tales"
    (alone,) = trained(60, None, ["0/mlp.post_act"]).values()
    assert torch.equal(alone.encoder.weight, much["0/mlp.post_act"].encoder.weight)
    again = trained(60, tmp_path / "run")  # a finished run is read, not refused
    assert torch.equal(alone.encoder.weight, again["0/mlp.post_act"].encoder.weight)
    source = activations_of_books(context, tiny_corpus(), list(much), seed=0)
    record_statistics(source, much, n_chunks=4)
    for location, autoencoder in much.items():
        active = (autoencoder.latents_activation_frequency > 0).float()
        assert (
            autoencoder.latents_activation_frequency.sum()
            <= size_of(ActivationLocation.parse(location), sizes).k
        )
        assert torch.equal(active, (autoencoder.latents_mean_square > 0).float())


# --- figures ---


def test_figures_are_recorded_under_the_names_of_the_stored_ones() -> None:
    autoencoder, x = Autoencoder(64, 16, TopK(4)), torch.randn(50, 16)
    measured = measure(autoencoder, [x])
    losses = Losses(40, 1.0, 2.0, 4.0, 3.0, 2 / 3, 0.5, 0.1, 0.2, 0.3)
    found = evaluation.held_out_figures(replace(measured, losses=losses))
    assert found["fvu"] == measured.fvu
    assert found["loss_recovered_zero"] == 2 / 3
    assert (found["tokens"], found["loss_tokens"]) == (50, 40)
    stored = evaluation.load_autoencoders(ASSETS / "autoencoders").values()
    for _, each in stored:
        assert set(found) <= set(each.metadata["held_out"])
    assert evaluation.rounded({"a": 0.123456789, "b": 7}) == {"a": 0.12346, "b": 7}


def test_reach_of_a_decoder_that_needs_no_more_than_it_may_use() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
    autoencoder = Autoencoder(12, 12, TopK(3))
    with torch.no_grad():
        autoencoder.decoder.weight.copy_(directions.t())
        autoencoder.encoder.weight.copy_(
            directions + 0.3 * torch.randn(12, 12, generator=generator)
        )
    codes = torch.rand(200, 12, generator=generator).topk(3, dim=1)
    x = torch.zeros(200, 12).scatter(1, codes.indices, codes.values) @ directions
    found = reach.reach(autoencoder, x, 3)
    assert found.pursuit < 1e-6  # orthogonal directions: the pursuit finds the very ones
    assert found.pursuit < found.refit < found.encoder


def test_bits_per_byte_of_a_model_that_knows_nothing(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    books = read_corpus(corpus)
    save_tokenizer(train_tokenizer(books.training.values(), 300), tmp_path / "t.tiktoken")
    enc = load_tokenizer(tmp_path / "t.tiktoken")
    cfg = TransformerConfig(
        enc="none", ctx_window=CTX, d_model=16, n_layers=1, n_heads=2, n_vocab=enc.n_vocab
    )
    model = Transformer(cfg, seed=0)
    with torch.no_grad():
        model.unembed.weight.zero_()
    text = {"book": SENTENCES * 3}
    figures = evaluation.measure_model(model, text, enc)
    n_tokens, n_bytes = len(enc.encode_ordinary(text["book"])), len(text["book"].encode())
    assert (figures.tokens, figures.bytes) == (n_tokens, n_bytes)
    assert figures.bits_per_byte == pytest.approx(n_tokens * math.log2(enc.n_vocab) / n_bytes)
    assert figures.bits_per_byte_side_by_side == pytest.approx(figures.bits_per_byte)


# --- the commands ---


def test_commands_from_books_to_figures(
    corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("tokenizers")

    def small(n_vocab: int) -> TransformerConfig:
        return TransformerConfig(
            enc="tiny-tales", ctx_window=32, d_model=16, n_layers=1, n_heads=2, n_vocab=n_vocab
        )

    run, stored = tmp_path / "run", tmp_path / "run" / "tiny-tales"
    common = ["--corpus", str(corpus), "--run", str(run)]
    main(["tokenizer", *common])
    main(["train", *common, "--steps", "2", "--decay-steps", "1"], small)
    main(
        [
            "autoencoders",
            *common,
            "--locations",
            "mlp.post_act",
            "--steps",
            "2",
            "--decay-steps",
            "1",
            "--batch-size",
            "16",
        ]
    )
    main(["evaluate", "--corpus", str(corpus), "--model", str(stored)])
    assert "0/mlp.post_act" in capsys.readouterr().out
    main(["reach", "--corpus", str(corpus), "--model", str(stored), "--windows", "2"])
    assert "0/mlp.post_act" in capsys.readouterr().out
    model = Transformer.load(stored, device="cpu")
    assert model.dtype == torch.float16
    assert model.metadata["training"]["held_out_books"] == list(HELD_OUT_BOOKS)
    assert model.metadata["held_out"]["bits_per_byte"] > 0
    location = ActivationLocation.parse("0/mlp.post_act")
    autoencoders = evaluation.load_autoencoders(stored / "autoencoders")
    assert autoencoders[location][1].metadata["held_out"]["fvu"] > 0


def test_commands_say_in_one_line_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No corpus at"):
        main(["tokenizer", "--corpus", str(tmp_path / "none"), "--run", str(tmp_path)])


def test_evaluating_a_model_without_autoencoders_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="train them first"):
        evaluation.load_autoencoders(tmp_path)


def test_what_a_killed_process_left_is_no_autoencoder(tmp_path: Path) -> None:
    autoencoder = Autoencoder(12, 12, TopK(3), location="0/mlp.post_act")
    autoencoder.save(tmp_path / "mlp.post_act" / "0")
    autoencoder.save(tmp_path / "mlp.post_act" / ".0.0123456789ab.tmp")
    found = evaluation.load_autoencoders(tmp_path)
    assert [folder.name for folder, _ in found.values()] == ["0"]


# --- what the wheel carries ---

ASSETS = Path(neuron_explainer.__file__).parent / "assets" / "tiny-tales"


def test_stored_assets_are_complete_and_small() -> None:
    sizes = {path: path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()}
    of_stores = sum(size for path, size in sizes.items() if path.is_relative_to(ASSETS / "stores"))
    assert of_stores <= 10_000_000
    assert sum(sizes.values()) - of_stores <= 40_000_000
    model = Transformer.load(ASSETS, device="cpu")
    assert model.dtype == torch.float16
    assert model.metadata["training"]["held_out_books"] == list(HELD_OUT_BOOKS)
    assert model.metadata["held_out"]["bits_per_byte"] <= 1.55
    assert model.enc.decode(model.enc.encode("A fox, at last!")) == "A fox, at last!"
    autoencoders = evaluation.load_autoencoders(ASSETS / "autoencoders")
    places = {(location.path, location.layer) for location in autoencoders}
    assert places == {(path, layer) for path in autoencoder_training.PATHS for layer in range(4)}


def test_stored_autoencoders_have_recorded_figures() -> None:
    for location, (_, autoencoder) in evaluation.load_autoencoders(ASSETS / "autoencoders").items():
        figures = autoencoder.metadata["held_out"]
        wide = location.path == "mlp.post_act"
        assert figures["l0"] <= (32 if wide else 16), location
        assert figures["dead_share"] <= 0.1, location
        assert figures["fvu"] <= 0.17, location
        assert figures["loss_recovered_zero"] >= 0.93, location
        # but for those that were left out because they next to never fire
        assert autoencoder.n_latents >= (1.8 if wide else 3.8) * autoencoder.n_inputs, location
        assert autoencoder.model_name == "tiny-tales"
        assert float(autoencoder.latents_activation_frequency.sum()) == pytest.approx(
            figures["l0"], rel=0.05
        )


# --- stores over text that the model wrote ---


def test_stored_examples_are_those_of_the_stored_model_and_autoencoders() -> None:
    context = StandardModelContext("tiny-tales", device="cpu")
    model = context.get_or_create_model()
    assert len(open_stores("tiny-tales")) == 12 + 4
    autoencoders = evaluation.load_autoencoders(ASSETS / "autoencoders")
    for place, (_, autoencoder) in autoencoders.items():
        short = place.path.removeprefix("resid.torso.").replace("_", "-").replace(".", "-")
        prefix = "ae-" if place.path == "mlp.post_act" else "ae-resid-"
        store = ExampleStore.open(f"tiny-tales/{prefix}{short}/{place.layer}")
        assert store.location == str(place)
        assert store.tokens.corpus.name == "text written by tiny-tales (temperature 0.9, seed 0)"
        store.check_autoencoder(autoencoder.float())
        store.verify()
    store.check_model(context)
    store = ExampleStore.open("tiny-tales/ae-resid-delta-mlp/2")
    record = store[1234]
    assert [example.group for example in record.all_examples] == ["top"] * 5 + ["uniform"] * 3
    assert all(len(example.tokens) <= 32 for example in record.all_examples)
    first, place = record.top[0], ActivationLocation.parse(store.location)
    document = store.tokens.corpus.document(first.document).tolist()
    x = model.capture([[model.enc.eot_token, *document]], place)[place][0].detach()
    autoencoder = autoencoders[place][1].float()
    values = autoencoder.encode(x)[1:, 1234].detach()
    assert float(values.max()) == pytest.approx(first.value, rel=1e-4)
    assert int(values.argmax()) == first.position + first.peak
    neurons = ExampleStore.open("tiny-tales/3/mlp.post_act.neurons")
    assert [example.group for example in neurons[5].all_examples] == ["top"] * 8


def test_store_writes_text_and_collates_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.tiktoken"):
        shutil.copy(ASSETS / name, tmp_path / name)
    kept = "autoencoders/resid.torso.delta_attn/0"
    shutil.copytree(ASSETS / kept, tmp_path / kept)
    argv = ["store", "--model", str(tmp_path), "--documents", "3", "--length", "9", "--seed", "4"]
    main(argv)
    assert "27 tokens" in capsys.readouterr().out
    found = open_stores(tmp_path / "stores")
    assert len(found) == 1 + 4
    store = found["ae-resid-delta-attn.0"]
    assert store.provenance["autoencoder"] == "ae-resid-delta-attn/0"
    corpus = store.tokens.corpus
    context = StandardModelContext("tiny-tales", device="cpu")
    again = stores.written_corpus(context, 3, 9, 4)
    assert again.tokens.tolist() == corpus.tokens.tolist()
    more = stores.written_corpus(context, 3, 9, 4, batch_size=2)
    assert more.n_tokens == 27
    written = {name: each.path.read_bytes() for name, each in found.items()}
    for name in written:
        if name.endswith("neurons"):
            (tmp_path / "stores" / f"{name}.store").unlink()
    main(argv)  # it goes on with the neurons, as after an interruption
    for name, each in open_stores(tmp_path / "stores").items():
        assert each.path.read_bytes() == written[name]
    with pytest.raises(InputError, match="documents must be"):
        stores.written_corpus(context, 0, 9, 4)
