"""Small dictionaries written, and applied, by other libraries themselves: what ours must agree with.

Run inside each peer's own environment, which has nothing of this package installed:

    python -m venv peer && peer/bin/pip install -r benchmarks/peers/sae-lens.txt
    peer/bin/python benchmarks/peers/make_fixtures.py sae-lens

Likewise ``dictionary-learning``, ``e2e_sae``, and ``sparsify`` with ``benchmarks/peers/eai-sparsify.txt``.

Each class of the peer gets ``tests/fixtures/peers/<peer>/<class>/saved/``, in the peer's own format
and written by the peer's own code, and ``expected.safetensors`` beside it with inputs ``x``, the
``latents`` and reconstruction ``recons`` of the peer's own loader and methods. All numbers come from
seeds. ``expected.json`` says which version of the peer it was, and what a loader has to be told.

The other direction: folders that this package wrote, read by the peers' own loaders.

    python -m benchmarks.peers.write_ours DIR                             # in our environment
    peer/bin/python benchmarks/peers/make_fixtures.py sae-lens --check-ours DIR
"""

import argparse
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures" / "peers"
D_IN, D_OUT, N_LATENTS, ROWS, K = 8, 6, 24, 6, 4
TOLERANCE = 1e-5  # of the largest value


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers from a seed, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * scale


def inputs() -> torch.Tensor:
    """``[rows, d_in]`` with a mean and a scale of their own in every row."""
    return random(ROWS, D_IN, seed=99, scale=2.0) + random(ROWS, 1, seed=98)


def fill(module: torch.nn.Module) -> None:
    """Every parameter gets values of its own; thresholds are positive and matter."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(module.named_parameters())):
            value = random(*parameter.shape, seed=seed, scale=0.5)
            parameter.copy_(value.abs() + 0.1 if name == "threshold" else value)


def write(
    folder: Path,
    peer: str,
    x: torch.Tensor,
    latents: torch.Tensor,
    recons: torch.Tensor,
    told: dict[str, Any] | None = None,
    **more: torch.Tensor,
) -> None:
    """``expected.safetensors`` and ``expected.json`` beside what the peer saved."""
    tensors = {"x": x, "latents": latents, "recons": recons, **more}
    save_file(
        {name: value.detach().float().contiguous() for name, value in tensors.items()},
        folder / "expected.safetensors",
    )
    facts = {"peer": peer, "version": metadata.version(peer), "load_args": told or {}}
    (folder / "expected.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


# ---- SAELens -------------------------------------------------------------------------------------

METADATA = {
    "model_name": "gpt2-small",
    "hook_name": "blocks.3.hook_mlp_out",
    "hook_head_index": None,
    "context_size": 128,
    "prepend_bos": True,
    "model_from_pretrained_kwargs": None,
}
SAELENS: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard"},
    "standard-no-b_dec": {"architecture": "standard", "apply_b_dec_to_input": False},
    "standard-layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "standard-constant_norm_rescale": {
        "architecture": "standard",
        "normalize_activations": "constant_norm_rescale",
    },
    "standard-expected_average_only_in": {
        "architecture": "standard",
        "normalize_activations": "expected_average_only_in",
    },
    "standard-hook_z": {"architecture": "standard", "reshape_activations": "hook_z"},
    "topk": {"architecture": "topk", "k": K},
    "topk-layer_norm": {"architecture": "topk", "k": K, "normalize_activations": "layer_norm"},
    "topk-rescaled": {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "jumprelu-b_dec": {"architecture": "jumprelu"},
    "gated": {"architecture": "gated"},
    "gated-no-b_dec": {"architecture": "gated", "apply_b_dec_to_input": False},
    "transcoder": {"architecture": "transcoder", "d_out": D_OUT},
    "transcoder-layer_norm": {
        "architecture": "transcoder",
        "d_out": D_OUT,
        "normalize_activations": "layer_norm",
    },
    "skip_transcoder": {"architecture": "skip_transcoder", "d_out": D_OUT},
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder", "d_out": D_OUT},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu_skip_transcoder", "d_out": D_OUT},
}
OLD = {
    "d_in": D_IN,
    "d_sae": N_LATENTS,
    "dtype": "torch.float32",
    "device": "cpu",
    "model_name": "gpt2-small",
    "hook_point": "blocks.5.hook_resid_pre",
    "hook_point_layer": 5,
    "hook_point_head_index": None,
    "prepend_bos": True,
    "dataset_path": "Skylion007/openwebtext",
    "context_size": 128,
    "l1_coefficient": 8e-05,
    "lr": 0.0004,
    "use_ghost_grads": False,
}
# Folders as they were written before 6.0: fields flat in one object, some under earlier names.
SAELENS_OLD: dict[str, dict[str, Any]] = {
    "old-standard": OLD,
    "old-topk-layer_norm": {
        **OLD,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": False,
        "prepend_bos": False,
        "sae_lens_training_version": None,
    },
    "old-jumprelu": {
        **OLD,
        "architecture": "jumprelu",
        "activation_fn_str": "relu",
        "finetuning_scaling_factor": False,
        "normalize_activations": "none",
        "hook_layer": 5,
    },
    "old-bool-normalize": {**OLD, "normalize_activations": True},
}
NORM_FACTOR = 1.75


def make_sae_lens(root: Path) -> None:
    """Every architecture that SAELens can save for use, and folders from before 6.0."""
    sae_lens = importlib.import_module("sae_lens")
    warnings.simplefilter("ignore")
    for name, fields in SAELENS.items():
        cfg = {"d_in": D_IN, "d_sae": N_LATENTS, "metadata": METADATA, **fields}
        if "transcoder" in cfg["architecture"]:
            cfg["apply_b_dec_to_input"] = False
            cfg["metadata"] = METADATA | {
                "hook_name": "blocks.3.ln2.hook_normalized",
                "hook_name_out": "blocks.3.hook_mlp_out",
            }
        if name == "standard-hook_z":
            cfg["metadata"] = METADATA | {"hook_name": "blocks.3.attn.hook_z"}
        sae = sae_lens.SAE.from_dict(cfg)
        fill(sae)
        sae.save_model(root / name / "saved")
        finish_sae_lens(root / name)
    for name, cfg in SAELENS_OLD.items():
        architecture = "jumprelu" if "jumprelu" in name else "standard"
        sae = sae_lens.SAE.from_dict(
            {"architecture": architecture, "d_in": D_IN, "d_sae": N_LATENTS}
        )
        fill(sae)
        sae.save_model(root / name / "saved")
        (root / name / "saved" / "cfg.json").write_text(json.dumps(cfg))
        finish_sae_lens(root / name)
    make_sae_lens_batchtopk(root / "batchtopk")


def make_sae_lens_batchtopk(folder: Path) -> None:
    """Trained as BatchTopK, saved for use: it becomes a JumpReLU."""
    saes = importlib.import_module("sae_lens.saes.batchtopk_sae")
    cfg = saes.BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=N_LATENTS, k=K)
    sae = saes.BatchTopKTrainingSAE(cfg)
    fill(sae)
    sae.topk_threshold.fill_(0.8)
    sae.save_inference_model(folder / "saved")
    finish_sae_lens(folder)


def finish_sae_lens(folder: Path) -> None:
    """Load the folder with SAELens and note what it makes of the inputs."""
    sae, x = load_sae_lens(folder / "saved"), inputs()
    told = {}
    if sae.cfg.normalize_activations == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(NORM_FACTOR)
        told = {"norm_factor": NORM_FACTOR}
        write(folder, "sae-lens", x, sae.encode(x), sae(x), told)
    else:
        write(folder, "sae-lens", x, *apply_sae_lens(folder / "saved", x), told)


def load_sae_lens(saved: Path) -> Any:
    sae_lens = importlib.import_module("sae_lens")
    cfg = json.loads((saved / "cfg.json").read_text())
    transcoders = importlib.import_module("sae_lens.saes.transcoder")
    classes = {
        "transcoder": transcoders.Transcoder,
        "skip_transcoder": transcoders.SkipTranscoder,
        "jumprelu_transcoder": transcoders.JumpReLUTranscoder,
        "jumprelu_skip_transcoder": transcoders.JumpReLUSkipTranscoder,
    }
    return classes.get(cfg.get("architecture"), sae_lens.SAE).load_from_disk(saved)


def apply_sae_lens(saved: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sae = load_sae_lens(saved)
    if sae.cfg.reshape_activations == "hook_z":
        x = x.unflatten(-1, (2, -1))
        return sae.encode(x), sae(x).flatten(-2)
    return sae.encode(x), sae(x)


# ---- dictionary_learning -------------------------------------------------------------------------

DICTIONARY_LEARNING: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoEncoder": ("dictionary", {}),
    "AutoEncoderNew": ("dictionary", {}),
    "GatedAutoEncoder": ("dictionary", {}),
    "JumpReluAutoEncoder": ("dictionary", {}),
    "AutoEncoderTopK": ("trainers.top_k", {"k": K}),
    "BatchTopKSAE": ("trainers.batch_top_k", {"k": K}),
    "MatryoshkaBatchTopKSAE": (
        "trainers.matryoshka_batch_top_k",
        {"k": K, "group_sizes": [4, 8, N_LATENTS - 12]},
    ),
}


def make_dictionary_learning(root: Path) -> None:
    """All seven classes, saved as its training loop saves them."""
    for name, (module, arguments) in DICTIONARY_LEARNING.items():
        library = importlib.import_module(f"dictionary_learning.{module}")
        dictionary = getattr(library, name)(D_IN, N_LATENTS, **arguments)
        fill(dictionary)
        if hasattr(dictionary, "k"):
            dictionary.threshold.fill_(0.8)
        saved = root / name / "saved"
        saved.mkdir(parents=True, exist_ok=True)
        torch.save(dictionary.state_dict(), saved / "ae.pt")
        config = {"trainer": trainer_config(name, arguments), "buffer": BUFFER}
        (saved / "config.json").write_text(json.dumps(config, indent=1))
        x = inputs()
        latents, recons = apply_dictionary_learning(saved, x)
        # What is stored, without the norms of the decoder moved into the encoder on loading.
        raw = dictionary.encode(x)
        write(root / name, "dictionary-learning", x, latents, recons, raw_latents=raw)


BUFFER = {"d_submodule": D_IN, "io": "out", "n_ctxs": 3000, "ctx_len": 128, "device": "cpu"}


def trainer_config(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The fields that the trainers note, with values of no importance but for the sizes."""
    return {
        "dict_class": name,
        "trainer_class": "SomeTrainer",
        "activation_dim": D_IN,
        "dict_size": N_LATENTS,
        "lr": 0.0003,
        "steps": 100,
        "warmup_steps": 10,
        "seed": 42,
        "device": "cpu",
        "layer": 3,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "wandb_name": "run",
        "submodule_name": "resid_post_layer_3",
        **arguments,
    }


def apply_dictionary_learning(saved: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    utils = importlib.import_module("dictionary_learning.utils")
    dictionary, _ = utils.load_dictionary(str(saved), "cpu")
    latents = dictionary.encode(x)
    return latents, dictionary.decode(latents)


# ---- sparsify ------------------------------------------------------------------------------------

SPARSIFY: dict[str, dict[str, Any]] = {
    "plain": {},
    "groupmax": {"activation": "groupmax"},
    "skip": {"skip_connection": True},
    "transcoder": {"transcode": True},
    "skip-transcoder": {"transcode": True, "skip_connection": True},
    "expansion-factor": {"num_latents": 0, "expansion_factor": N_LATENTS // D_IN},
}


def make_sparsify(root: Path) -> None:
    """Sparse coders of every kind that ``SparseCoderConfig`` can say."""
    sparsify = importlib.import_module("sparsify")
    for name, fields in SPARSIFY.items():
        cfg = sparsify.SparseCoderConfig(**{"num_latents": N_LATENTS, "k": K, **fields})
        coder = sparsify.SparseCoder(D_IN, cfg)
        fill(coder)
        coder.save_to_disk(root / name / "saved")
        x = inputs()
        write(root / name, "eai-sparsify", x, *apply_sparsify(root / name / "saved", x))


def apply_sparsify(saved: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sparsify = importlib.import_module("sparsify")
    coder = sparsify.SparseCoder.load_from_disk(saved)
    code = coder.encode(x)
    zeros = torch.zeros(len(x), coder.num_latents)
    latents = zeros.scatter(-1, code.top_indices, code.top_acts)
    return latents, coder(x).sae_out


# ---- e2e_sae -------------------------------------------------------------------------------------

E2E_PLACES = ("blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre")


def make_e2e(root: Path) -> None:
    """The dictionaries of one run in one file, as its training script saves them."""
    classes, x = e2e_classes(), inputs()
    saes = torch.nn.ModuleDict(
        {place.replace(".", "-"): classes.SAE(D_IN, N_LATENTS) for place in E2E_PLACES}
    )
    fill(saes)
    for index, place in enumerate(E2E_PLACES):
        saved = root / f"SAE-{index}" / "saved"
        saved.mkdir(parents=True, exist_ok=True)
        torch.save(saes.state_dict(), saved / "samples_400000.pt")
        recons, latents = saes[place.replace(".", "-")](x)
        write(
            saved.parent,
            "e2e_sae",
            x,
            latents,
            recons,
            {"location": place, "input_normalization": "none"},
        )


def e2e_classes() -> Any:
    """The module with the classes, by itself: the package as a whole cannot be imported."""
    package = importlib.util.find_spec("e2e_sae")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / "models" / "sparsifiers.py"
    spec = importlib.util.spec_from_file_location("e2e_sparsifiers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def apply_none(saved: Path, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise SystemExit("this package does not write the format of this peer")


# ---- both directions -----------------------------------------------------------------------------

Make = Callable[[Path], None]
Apply = Callable[[Path, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
PEERS: dict[str, tuple[Make, Apply]] = {
    "sae-lens": (make_sae_lens, apply_sae_lens),
    "dictionary-learning": (make_dictionary_learning, apply_dictionary_learning),
    "sparsify": (make_sparsify, apply_sparsify),
    "e2e_sae": (make_e2e, apply_none),
}


def check_ours(folder: Path, apply: Apply) -> bool:
    """Whether the peer makes of each folder under ``folder`` what this package made of it."""
    right = True
    cases = sorted(path for path in folder.iterdir() if path.is_dir())
    if not cases:
        print(f"{folder}: nothing to check")
        return False
    for case in cases:
        expected = load_file(case / "expected.safetensors")
        latents, recons = apply(case / "saved", expected["x"])
        for what, found in (("latents", latents), ("recons", recons)):
            error = (found - expected[what]).abs().max() / expected[what].abs().max()
            right = right and bool(error < TOLERANCE)
            print(f"{case.name:40} {what:8} largest error {float(error):.1e} of the largest value")
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--check-ours", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    make, apply = PEERS[arguments.peer]
    with torch.no_grad():
        if arguments.check_ours:
            return 0 if check_ours(arguments.check_ours / arguments.peer, apply) else 1
        make(FIXTURES / arguments.peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
