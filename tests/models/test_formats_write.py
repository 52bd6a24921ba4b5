"""Written in other libraries' formats and read back: the same numbers, or a refusal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.peers.write_ours import fixtures, source_in
from neuron_explainer.errors import InputError
from neuron_explainer.models.autoencoder import Autoencoder, BatchTopK, JumpReLU, TopK
from neuron_explainer.models.autoencoders.convert import convert, save_as
from neuron_explainer.models.autoencoders.nonlinearities import Fista, Gated, GroupMax
from neuron_explainer.models.checkpoints.autoencoders import WRITTEN_FORMATS

CASES = {name: (folder, told) for name, folder, told in fixtures()}
OWN = {"saelens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "sparsify"}
N, L = 5, 12


def load(name: str) -> tuple[Autoencoder, torch.Tensor]:
    folder, told = CASES[name]
    x = load_file(folder / "expected.safetensors")["x"]
    return Autoencoder.load(source_in(folder), **told), x


def assert_same_function(a: Autoencoder, b: Autoencoder, x: torch.Tensor) -> None:
    with torch.no_grad():
        for found, expected in zip(b(x)[1:], a(x)[1:], strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def plain(autoencoder: Autoencoder) -> dict[str, Any]:
    """The state dict as values that ``==`` compares."""

    def value_of(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: value_of(inner) for key, inner in value.items()}
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return {key: value_of(value) for key, value in autoencoder.state_dict().items()}


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("e2e")])
def test_written_in_its_own_format_it_is_read_back_equal(tmp_path, name):
    ae, x = load(name)
    form = ae.metadata["format"]
    save_as(ae, tmp_path / "folder", form)
    new = Autoencoder.load(tmp_path / "folder")
    assert_same_function(ae, new, x)
    for fact in ("location", "output_location", "model_name", "input_normalization", "group_sizes"):
        if form == "sparsify" and fact == "location":
            continue  # its folders do not say
        assert getattr(new, fact) == getattr(ae, fact)
    if "AutoEncoder" not in name or "TopK" in name:
        assert plain(new) == plain(ae)
    save_as(new, tmp_path / "again", form)
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in (tmp_path / "folder").iterdir()
    )
    assert plain(Autoencoder.load(tmp_path / "again")) == plain(new)


@pytest.mark.parametrize("form", WRITTEN_FORMATS)
@pytest.mark.parametrize("name", CASES)
def test_in_every_format_the_same_function_or_a_refusal(tmp_path, name, form):
    ae, x = load(name)
    refusal = ""
    try:
        save_as(ae, tmp_path / "folder", form)
    except InputError as error:
        refusal = str(error)
    if not refusal:
        assert_same_function(ae, Autoencoder.load(tmp_path / "folder"), x)
        return
    assert f"the format {form!r} cannot express" in refusal
    assert not (tmp_path / "folder").exists()
    assert not name.startswith(OWN[form])


def make(activation: nn.Module | None = None, tied: bool = False, **kwargs: Any) -> Autoencoder:
    torch.manual_seed(0)
    ae = Autoencoder(L, N, activation, tied, **kwargs)
    with torch.no_grad():
        for parameter in ae.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return ae


def gated() -> Gated:
    return Gated(*(torch.randn(L) for _ in range(3)))


@pytest.mark.parametrize(
    ("form", "ae"),
    [
        ("saelens", make()),
        ("saelens", make(tied=True)),
        ("saelens", make(post_bias=True)),  # both biases: the first is folded into the encoder
        ("saelens", make(gated(), post_bias=True, input_normalization="rms")),
        ("saelens", make(BatchTopK(0.4, k=3), group_sizes=[4, 8])),
        ("saelens", make(n_outputs=3, skip=True, input_normalization="layer_norm")),
        ("saelens", make(JumpReLU(torch.rand(L)), n_outputs=N)),
        ("dictionary_learning", make()),
        ("dictionary_learning", make(tied=True)),
        ("dictionary_learning", make(post_bias=True)),
        ("dictionary_learning", make(gated())),
        ("dictionary_learning", make(JumpReLU(torch.rand(L)))),
        ("dictionary_learning", make(JumpReLU(torch.rand(L)), post_bias=True)),
        ("dictionary_learning", make(BatchTopK(0.4, k=3), group_sizes=[4, 8])),
        ("dictionary_learning", make(n_outputs=N)),
        ("sparsify", make(TopK(3))),
        ("sparsify", make(TopK(3), tied=True)),
        ("sparsify", make(GroupMax(3), n_outputs=N, skip=True)),
    ],
)
def test_what_has_no_fixture(tmp_path, form, ae):
    save_as(ae, tmp_path / "folder", form)
    x = torch.randn(7, N, generator=torch.Generator().manual_seed(1))
    assert_same_function(ae, Autoencoder.load(tmp_path / "folder"), x)


@pytest.mark.parametrize(
    ("form", "ae", "what"),
    [
        ("saelens", make(input_normalization="center"), "input_normalization 'center'"),
        ("saelens", make(glu=True), "a GLU encoder"),
        ("saelens", make(skip=True), "a skip connection outside of a transcoder"),
        ("saelens", make(nn.Identity()), "the nonlinearity Identity"),
        ("saelens", make(TopK(3, nn.Identity())), "the nonlinearity TopK"),
        ("saelens", make(TopK(3), n_outputs=3), "a transcoder with TopK"),
        ("saelens", make(Fista(0.1), tied=True), "the nonlinearity Fista"),
        ("dictionary_learning", make(input_normalization="rms"), "input_normalization 'rms'"),
        ("dictionary_learning", make(skip=True), "a skip connection"),
        ("dictionary_learning", make(n_outputs=3), "input and output differ in width"),
        ("dictionary_learning", make(TopK(3), post_bias=True), "TopK with an output bias"),
        ("dictionary_learning", make(TopK(3), group_sizes=[4, 8]), "groups with TopK"),
        ("dictionary_learning", make(group_sizes=[4, 8]), "groups with ReLU"),
        ("dictionary_learning", make(BatchTopK(0.4)), "k is not known"),
        ("dictionary_learning", make(BatchTopK(-1.0, k=3)), "a threshold below zero"),
        ("dictionary_learning", make(GroupMax(3)), "the nonlinearity GroupMax"),
        ("sparsify", make(), "the nonlinearity ReLU"),
        ("sparsify", make(TopK(3), glu=True), "a GLU encoder"),
        ("sparsify", make(TopK(3), post_bias=True), "an output bias"),
        ("sparsify", make(TopK(3), n_outputs=3), "input and output differ in width"),
        ("sparsify", make(TopK(3), input_normalization="layer_norm"), "'layer_norm'"),
        ("sparsify", make(TopK(3), group_sizes=[4, 8]), "Matryoshka groups"),
    ],
)
def test_refusals(tmp_path, form, ae, what):
    with pytest.raises(InputError, match=f"format '{form}' cannot express .*{what}.*nothing was"):
        save_as(ae, tmp_path / "folder", form)
    assert not (tmp_path / "folder").exists()


def test_nan_is_not_written(tmp_path):
    ae = make()
    with torch.no_grad():
        ae.encoder.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="cannot express W_enc with NaN or infinity"):
        save_as(ae, tmp_path / "folder", "saelens")


def test_what_is_written_for_saelens(tmp_path):
    ae = make(TopK(3), location="3/resid_delta_mlp", model_name="gpt2-small").half()
    save_as(ae, tmp_path / "folder", "saelens")
    config = json.loads((tmp_path / "folder" / "cfg.json").read_text())
    assert config == {
        "architecture": "topk",
        "k": 3,
        "rescale_acts_by_decoder_norm": False,
        "d_in": N,
        "d_sae": L,
        "dtype": "float16",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "sae_lens_training_version": None,
            "model_name": "gpt2-small",
            "hook_name": "blocks.3.hook_mlp_out",
        },
    }
    tensors = load_file(tmp_path / "folder" / "sae_weights.safetensors")
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {
        "W_enc": (N, L),
        "W_dec": (L, N),
        "b_enc": (L,),
        "b_dec": (N,),
    }


def test_overwriting(tmp_path):
    save_as(make(), tmp_path / "folder", "saelens")
    with pytest.raises(InputError, match="overwrite"):
        save_as(make(TopK(3)), tmp_path / "folder", "sparsify")
    save_as(make(TopK(3)), tmp_path / "folder", "sparsify", overwrite=True)
    assert Autoencoder.load(tmp_path / "folder").metadata["format"] == "sparsify"


def test_an_unknown_format(tmp_path):
    with pytest.raises(InputError, match=r"'SAELens' is not written\. Did you mean 'saelens'"):
        save_as(make(), tmp_path / "folder", "SAELens")


@pytest.mark.parametrize("form", ["native", "saelens"])
def test_convert(tmp_path, form):
    folder, _ = CASES["sparsify-plain"]
    ae = convert(folder / "saved", tmp_path / "new", form, location="blocks.2.hook_mlp_out")
    new = Autoencoder.load(tmp_path / "new")
    assert str(new.location) == "2/resid.torso.delta_mlp"
    assert_same_function(ae, new, load_file(folder / "expected.safetensors")["x"])
    again = convert(tmp_path / "new", tmp_path / "again", "sparsify")
    assert plain(again) == plain(Autoencoder.load(tmp_path / "again"))


def test_convert_keeps_the_stored_dtype(tmp_path):
    make().half().save(tmp_path / "half")
    convert(tmp_path / "half", tmp_path / "new", "saelens")
    stored = load_file(Path(tmp_path, "new", "sae_weights.safetensors"))
    assert {value.dtype for value in stored.values()} == {torch.float16}


HALF_CASES: list[tuple[str, Any]] = [
    ("saelens", lambda: make(post_bias=True)),
    ("saelens", lambda: make(gated(), post_bias=True, input_normalization="rms")),
    ("saelens", lambda: make(JumpReLU(torch.rand(L)), n_outputs=N)),
    ("dictionary_learning", lambda: make(post_bias=True)),
    ("dictionary_learning", lambda: make()),
    ("dictionary_learning", lambda: make(gated())),
    ("dictionary_learning", lambda: make(JumpReLU(torch.rand(L)))),
    ("sparsify", lambda: make(TopK(3), n_outputs=N)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("form", "made"), HALF_CASES)
def test_biases_of_half_precision_are_folded_and_written_in_float32(tmp_path, form, made, dtype):
    """The weights are as they were, and what is computed from several of them is not rounded."""
    ae = made().to(dtype)
    with torch.no_grad():  # far from zero: the folded bias is beyond what float16 holds
        ae.pre_bias += 300
        ae.encoder.weight *= 100
    save_as(ae, tmp_path / "folder", form)
    new = Autoencoder.load(tmp_path / "folder", dtype=torch.float64)
    x = 300 + torch.randn(7, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        for found, expected in zip(new(x)[1:], copy.deepcopy(ae).double()(x)[1:], strict=True):
            # A bias of 1e5 is rounded to 0.01 in float32, to 64 or infinity in half precision.
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_saelens_is_told_a_dtype_that_holds_every_tensor(tmp_path):
    """Its loader casts all tensors to the one dtype of the config."""
    for activation, dtype in ((None, "float16"), (BatchTopK(0.1234567, k=3), "float32")):
        ae = make(activation).half()
        if activation is not None:
            ae.activation = BatchTopK(0.1234567, k=3)
        save_as(ae, tmp_path / dtype, "saelens")
        assert json.loads((tmp_path / dtype / "cfg.json").read_text())["dtype"] == dtype
        stored = load_file(tmp_path / dtype / "sae_weights.safetensors")
        assert stored["W_enc"].dtype == torch.float16
    assert (stored["threshold"] == torch.tensor(0.1234567)).all()


@pytest.mark.parametrize("form", ["native", "saelens", "dictionary_learning"])
def test_convert_rounds_nothing(tmp_path, form):
    """Our own folders of half precision hold biases in float32, here beyond what float16 holds."""
    ae = make(post_bias=True)
    with torch.no_grad():
        ae.latent_bias.add_(1e5)
    ae.save(tmp_path / "half", torch.float16)
    convert(tmp_path / "half", tmp_path / "new", form)
    x = torch.randn(7, N, generator=torch.Generator().manual_seed(1))
    assert_same_function(Autoencoder.load(tmp_path / "half"), Autoencoder.load(tmp_path / "new"), x)
