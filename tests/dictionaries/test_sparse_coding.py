"""Training dictionaries: planted ones are found, a model's states are coded, results are usable."""

import pytest
import torch

from neuron_explainer.activations.corpus import tokenize
from neuron_explainer.activations.harvest import Harvester, LiveSource
from neuron_explainer.activations.windows import TokenWindows
from neuron_explainer.dictionaries.sparse_coding import (
    SparseCodingConfig,
    count_tokens,
    frequency_weights,
    train_sparse_coding,
)
from neuron_explainer.dictionaries.sparse_coding.dictionary_update import normalize_columns
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
from neuron_explainer.models.autoencoders.fista import fista
from neuron_explainer.models.autoencoders.nonlinearities import Fista
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from tests.dictionaries.sparse_coding_runs import log_of

RESID, ATTN = "resid.torso.post_mlp", "resid.torso.delta_attn"


# ---- planted dictionaries --------------------------------------------------------------------------


def planted(n_batches, rows=100, n=64, n_atoms=128, active=5, noise=0.01, seed=0):
    """``x = Φ a + noise`` of 1 % of x's size, a of a few entries between ½ and 1½."""
    generator = torch.Generator().manual_seed(seed)
    atoms = normalize_columns(torch.randn(n, n_atoms, generator=generator))
    batches = []
    for _ in range(n_batches):
        where = torch.rand(rows, n_atoms, generator=generator).topk(active).indices
        sizes = torch.rand(rows, active, generator=generator) + 0.5
        x = torch.zeros(rows, n_atoms).scatter_(1, where, sizes) @ atoms.T
        scale = noise * x.square().mean().sqrt()
        batches.append(x + scale * torch.randn(x.shape, generator=generator))
    return atoms, batches


def test_planted_atoms_are_found():
    atoms, batches = planted(200)
    config = SparseCodingConfig(128, 0.4, step_size=0.05, tolerance=1e-2)
    autoencoder = train_sparse_coding(config, batches)
    found = (atoms.T @ autoencoder.decoder.weight).amax(dim=1) > 0.95
    assert found.float().mean() >= 0.95
    assert autoencoder.metadata["snr"] > 4
    # and the codes are those that were planted, but for the penalty: 5 of 128
    assert autoencoder.metadata["l0"] == pytest.approx(5, abs=1)


def test_ista_learns_the_same_dictionary():
    batches = planted(10, rows=30, n=12, n_atoms=16, active=2)[1]
    fista_found, ista_found = (
        train_sparse_coding(
            SparseCodingConfig(
                16, 0.4, step_size=0.05, max_iterations=5000, tolerance=1e-6, solver=solver
            ),
            batches,
        ).encoder.weight
        for solver in ("fista", "ista")
    )
    assert not torch.equal(fista_found, ista_found)
    torch.testing.assert_close(fista_found, ista_found, atol=1e-3, rtol=0)


def test_a_random_dictionary_has_none_of_them():
    atoms, batches = planted(1)
    config = SparseCodingConfig(128, 0.4, step_size=1e-6, tolerance=1e-2)
    untrained = train_sparse_coding(config, batches).decoder.weight
    assert ((atoms.T @ untrained).amax(dim=1) > 0.95).float().mean() < 0.05


# ---- what comes out --------------------------------------------------------------------------------


def small(n_batches=4, rows=30, n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, n, generator=generator) for _ in range(n_batches)]


def test_the_result_is_an_autoencoder_whose_latents_are_the_codes(tmp_path):
    batches = small()
    config = SparseCodingConfig(10, 0.25, max_iterations=300, tolerance=1e-4, batch_size=7)
    autoencoder = train_sparse_coding(config, batches, tmp_path / "run", model_name="some")
    assert isinstance(autoencoder.activation, Fista)
    assert autoencoder.tied
    assert autoencoder.input_normalization == "none"
    assert not autoencoder.pre_bias.any()
    assert not autoencoder.latent_bias.any()
    torch.testing.assert_close(
        autoencoder.decoder.weight.norm(dim=0), torch.ones(10), atol=1e-5, rtol=0
    )
    x = batches[0]
    code = fista(x, autoencoder.decoder.weight, 0.25, max_iterations=300, tolerance=1e-4)
    assert torch.equal(autoencoder.encode(x), code.latents)
    torch.testing.assert_close(
        autoencoder.reconstruct(x), code.latents @ autoencoder.decoder.weight.T
    )
    assert autoencoder.metadata["config"]["penalty"] == 0.25
    assert autoencoder.metadata["rows"] == 120
    loaded = Autoencoder.load(tmp_path / "run" / "autoencoder")
    assert loaded.model_name == "some"
    assert loaded.metadata == autoencoder.metadata
    assert repr(loaded.activation) == "Fista(penalty=0.25, max_iterations=300, tolerance=0.0001)"
    assert torch.equal(loaded.encode(x), autoencoder.encode(x))
    for name, value in autoencoder.named_buffers():
        assert torch.equal(loaded.get_buffer(name), value)


def test_every_row_is_learned_from_once_in_parts_of_one_size():
    autoencoder = train_sparse_coding(SparseCodingConfig(10, 0.25, batch_size=8), small(3, rows=20))
    assert autoencoder.metadata["rows"] == 60
    # 20 rows make parts of 7, 7 and 6; a latent that never fired would have rested for all of them
    assert autoencoder.stats_last_nonzero.max() <= 9
    plain = train_sparse_coding(SparseCodingConfig(10, 0.25, epochs=2), small(3, rows=20))
    assert plain.metadata["rows"] == 120


def test_frequent_tokens_move_the_dictionary_less():
    x, tokens = torch.eye(2).repeat(20, 1), torch.tensor([0, 1] * 20)
    config = SparseCodingConfig(2, 0.1, step_size=0.05, batch_size=10, seed=3)
    counts = torch.tensor([1_000_000, 1])
    start = train_sparse_coding(SparseCodingConfig(2, 0.1, step_size=1e-9), [x]).decoder.weight
    plain = train_sparse_coding(config, [(x, None)]).decoder.weight
    weighted = train_sparse_coding(config, [(x, tokens)], token_counts=counts).decoder.weight
    assert not torch.equal(plain, weighted)
    ones = train_sparse_coding(config, [(x, tokens)], token_counts=torch.tensor([1, 1]))
    assert torch.equal(ones.decoder.weight, plain)
    assert ones.metadata["frequency_weights"]
    assert start.shape == weighted.shape


def test_locations_share_a_dictionary_or_have_their_own(tmp_path):
    first, second, third = small(3)
    batches = [{ActivationLocation(RESID, 0): first, ActivationLocation(RESID, 2): second,
                ActivationLocation(ATTN, 1): third}]  # fmt: skip
    config = SparseCodingConfig(10, 0.25)
    shared = train_sparse_coding(config, batches, tmp_path / "shared", model_name="m")
    assert list(map(str, shared)) == [RESID, f"1/{ATTN}"]
    both = shared[ActivationLocation(RESID)]
    assert both.location == ActivationLocation(RESID)
    assert both.metadata["locations"] == [f"0/{RESID}", f"2/{RESID}"]
    assert both.metadata["rows"] == 60
    assert torch.equal(
        both.encoder.weight,
        train_sparse_coding(config, [torch.cat([first, second])]).encoder.weight,
    )
    own = train_sparse_coding(
        SparseCodingConfig(10, 0.25, across_layers=False), batches, tmp_path / "own"
    )
    assert list(map(str, own)) == [f"0/{RESID}", f"2/{RESID}", f"1/{ATTN}"]
    for location, x in batches[0].items():
        alone = train_sparse_coding(config, [x])
        assert torch.equal(own[location].encoder.weight, alone.encoder.weight)
        folder = tmp_path / "own" / "autoencoders" / f"{location.layer}-{location.path}"
        assert Autoencoder.load(folder).location == location
    # one file serves both layers of a context
    path = tmp_path / "shared" / "autoencoders" / RESID
    context = AutoencoderContext(AutoencoderConfig(RESID, {0: path, 2: path}), "cpu")
    assert torch.equal(context.get_autoencoder(2).encode(second), both.encode(second))


def test_float64_stays_and_half_becomes_float32():
    config = SparseCodingConfig(4, 0.1)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        found = train_sparse_coding(config, [x.to(dtype) for x in small()])
        assert found.dtype == expected


# ---- a model's states ------------------------------------------------------------------------------

TEXT = (
    "Once upon a time there was a little girl. She had a big red ball. ",
    "The dog ran to the park. He saw a cat under the tree and they played all day. ",
    "One day Tom was sad.",
)


@pytest.fixture(scope="module")
def context():
    return ModelContext.from_model_type("tiny-tales", device="cpu")


@pytest.fixture(scope="module")
def windows(context):
    return TokenWindows(tokenize(TEXT * 8, context), 32, 4, seed=None)


def test_the_signal_rises_over_the_noise_on_a_models_states(context, windows, tmp_path):
    source = LiveSource(Harvester(context, [f"1/{RESID}", f"3/{RESID}", f"2/{ATTN}"]), windows)
    counts = count_tokens(windows, context.n_vocab)
    the, rare = (context.encode(text)[0] for text in (" the", " sad"))
    weights = frequency_weights(torch.tensor([the, rare]), counts)
    assert weights[0] < weights[1] < 1
    config = SparseCodingConfig(
        96, 3.0, epochs=3, step_size=0.05, tolerance=1e-2, log_every=1, history=20
    )
    found = train_sparse_coding(config, source, tmp_path, token_counts=counts)
    assert list(map(str, found)) == [RESID, f"2/{ATTN}"]
    for name in map(str, found):
        snr = [line["dictionaries"][name]["snr"] for line in log_of(tmp_path)]
        assert len(snr) == 3 * windows.batches_per_epoch
        assert snr[-1] > 1.5 * snr[0]
        assert snr[-1] > snr[len(snr) // 2] > snr[0]


@pytest.mark.parametrize("place", ["0/attn.v_out", "mlp.post_act", "resid.post_emb"])
def test_any_hook_path_will_do(context, windows, place):
    batches = map(Harvester(context, place), [windows.batch(0)])
    found = train_sparse_coding(SparseCodingConfig(24, 2.0, tolerance=1e-2), batches)
    (autoencoder,) = found.values()
    assert autoencoder.location == ActivationLocation.parse(place)
    assert len(autoencoder.metadata["locations"]) == (4 if place == "mlp.post_act" else 1)


def test_a_sentence_has_the_codes_that_it_has_alone(context, windows):
    """Padded beside a longer sentence, or not: the same activations, and so the same codes."""
    place = ActivationLocation(RESID, 2)
    batches = map(Harvester(context, place), [windows.batch(0)])
    config = SparseCodingConfig(64, 2.0, tolerance=1e-2)
    dictionary = train_sparse_coding(config, batches)[place].double()
    dictionary.activation = Fista(2.0, max_iterations=5000, tolerance=1e-6)

    def codes(*texts):
        rows = TokenWindows(tokenize(texts, context), 32, len(texts), concat=False, seed=None)
        (batch,) = map(Harvester(context, place), rows)
        return [
            dictionary.encode(batch.activations[place][batch.document == i].double())
            for i in range(len(texts))
        ]

    together = codes(*TEXT)
    assert len({len(code) for code in together}) > 1
    for text, code in zip(TEXT, together, strict=True):
        (alone,) = codes(text)
        assert (alone > 0).any(dim=1).all()
        torch.testing.assert_close(alone, code, atol=1e-3, rtol=1e-4)


# ---- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_latents": 0}, "n_latents must be at least 1, found 0"),
        ({"penalty": -1.0}, "penalty must be a number >= 0, found -1.0"),
        ({"epochs": True}, "epochs: expected a whole number, found True"),
        ({"batch_size": 2.0}, "batch_size: expected a whole number, found 2.0"),
        ({"step_size": 0}, "step_size must be above 0, found 0"),
        ({"hessian_floor": float("nan")}, "hessian_floor: expected a finite number, found nan"),
        ({"solver": "lars"}, "solver: expected one of fista, ista, found 'lars'"),
        ({"seed": -1}, "seed must be in 0 to"),
        ({"across_layers": 1}, "across_layers: expected true or false, found 1"),
    ],
)
def test_settings_that_mean_nothing(changes, message):
    with pytest.raises(InputError, match=message):
        SparseCodingConfig(**({"n_latents": 4, "penalty": 0.1} | changes))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches to train on"),
        ([torch.zeros(0, 3)], "no rows of activations in any batch"),
        ([torch.zeros(3)], r"must be floating point, \[r, n\].* found \[3\]"),
        ([torch.zeros(3, 3, dtype=torch.int64)], "found .* of torch.int64"),
        ([torch.tensor([[1.0, float("inf")]])], "hold NaN or infinity"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "expected rows of width 3 .* found width 4"),
        ([(torch.ones(2, 3), torch.zeros(3))], r"one token id a row, \[2\], found \[3\]"),
        ([{}], "activations of no location"),
        ([{"logits": torch.ones(2, 3)}, {"1/mlp.post_act": torch.ones(2, 3)}], "same locations"),
        (["text"], "found str"),
    ],
)
def test_batches_that_are_none(batches, message):
    with pytest.raises(InputError, match=message):
        train_sparse_coding(SparseCodingConfig(4, 0.1), batches)


def test_weights_need_token_ids():
    with pytest.raises(InputError, match="the batches come without token ids"):
        train_sparse_coding(SparseCodingConfig(4, 0.1), small(), token_counts=torch.ones(3))


def test_a_generator_serves_one_epoch():
    batches = small()
    once = train_sparse_coding(SparseCodingConfig(4, 0.1), iter(batches))
    assert torch.equal(
        once.encoder.weight, train_sparse_coding(SparseCodingConfig(4, 0.1), batches).encoder.weight
    )
    with pytest.raises(InputError, match="come to an end and cannot be started again"):
        train_sparse_coding(SparseCodingConfig(4, 0.1, epochs=2), iter(batches))
