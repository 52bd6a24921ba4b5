"""Settings: checked when made, read strictly from files and flags, documented where they stand."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_explainer.dictionaries import (
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaConfig,
    ObjectiveConfig,
    PAnnealConfig,
    ReLUConfig,
    TopKConfig,
    TrainConfig,
    read_config,
    train,
)
from neuron_explainer.dictionaries.params_json import read_params
from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig
from neuron_explainer.errors import CheckpointError, InputError, LocationError
from neuron_explainer.settings import from_dict, read_values, to_dict
from neuron_explainer.settings.flags import add_flags, field_docs, from_flags


def test_every_field_has_a_docstring() -> None:
    classes: list[type[Any]] = [TrainConfig, *map(ObjectiveConfig.member, ObjectiveConfig.names())]
    for cls in classes:
        assert [name for name, doc in field_docs(cls).items() if not doc] == [], cls


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "one of steps and num_tokens"),
        ({"steps": 5, "num_tokens": 5}, "one of steps and num_tokens"),
        ({"num_tokens": 10_000, "batch_size": 16_384}, "less than one batch of 16384"),
        ({"steps": 5, "n_latents": 8, "expansion": 2.0}, "not both"),
        ({"steps": 5, "lr": 0.0}, "lr must be above 0"),
        ({"steps": 5, "beta2": 1.0}, "beta2 must be"),
        ({"steps": 5, "grad_clip": 0.0}, "grad_clip must be above 0"),
        ({"steps": 5, "log_every": 0}, "log_every must be at least 1"),
        ({"steps": 5, "warmup_steps": 6}, "warmup_steps = 6 is more than the 5 steps"),
        ({"steps": 5, "sparsity_warmup_steps": 6}, "sparsity_warmup_steps = 6 is more than the 5"),
        (
            {"steps": 5, "warmup_steps": 3, "decay_steps": 3},
            "warmup_steps = 3 and decay_steps = 3 are together more than the 5 steps",
        ),
        (
            {"steps": 5, "objective": TopKConfig(k_anneal_steps=6)},
            "k_anneal_steps = 6 is more than the 5 steps",
        ),
        (
            {"steps": 5, "objective": PAnnealConfig(anneal_start=5)},
            "anneal_start = 5 is not less than the 5 steps",
        ),
        *(
            ({"steps": 5, "decoder_norm": "free", "objective": objective}, "directions would grow")
            for objective in (ReLUConfig(), PAnnealConfig(), GatedConfig())
        ),
        ({"steps": 5, "decay": "none", "decay_steps": 2}, "needs decay"),
        ({"steps": 5, "transcoder": True, "tied": True}, "cannot be tied"),
        ({"steps": 5, "skip": True}, "transcoder = true"),
        (
            {"steps": 5, "transcoder": True, "skip": True, "input_normalization": "rms"},
            "takes activations without normalisation",
        ),
        (
            {"steps": 50, "remedy": "resample", "resample_every": 30, "decay_steps": 30},
            "decays before the first resampling",
        ),
        (
            {"steps": 50, "remedy": "resample", "resample_every": 50, "decay": "none"},
            "resample_every = 50 is not less than the 50 steps",
        ),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainConfig(**fields)


WHOLE_NUMBERS = [
    (cls, field.name)
    for cls in (
        TrainConfig,
        SparseCodingConfig,
        *map(ObjectiveConfig.member, ObjectiveConfig.names()),
    )
    for field in dataclasses.fields(cls)
    if "int" in str(field.type)
]
WRONG = [1.5, 1.0, True, "3", -1, 2**70]


def least(cls: type[Any]) -> dict[str, Any]:
    """The fields that have to be given."""
    if cls is SparseCodingConfig:
        return {"n_latents": 4, "penalty": 0.1}
    return {"steps": 5} if cls is TrainConfig else {}


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_whole_numbers_in_python(value: Any) -> None:
    assert len(WHOLE_NUMBERS) > 30
    for cls, name in WHOLE_NUMBERS:
        with pytest.raises(InputError, match=rf"\b{name}\b"):
            cls(**least(cls) | {name: value})


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_whole_numbers_in_files(value: Any, tmp_path: Path) -> None:
    for cls, name in WHOLE_NUMBERS:
        fields: dict[str, Any] = {"steps": 5, name: value}
        if issubclass(cls, ObjectiveConfig):
            objective = next(n for n in ObjectiveConfig.names() if ObjectiveConfig.member(n) is cls)
            fields = {"steps": 5, "objective": {"name": objective, name: value}}
        if cls is SparseCodingConfig:
            continue  # it has neither
        (tmp_path / "c.json").write_text(json.dumps(fields))
        with pytest.raises(InputError, match=rf"\b{name}\b"):
            read_config(TrainConfig, tmp_path / "c.json")


@pytest.mark.parametrize("seed", [2**31, 2**63, 2**64 - 1])
def test_seeds_of_64_bits(seed: int) -> None:
    rows = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(TopKConfig(k=1), n_latents=8, steps=3, batch_size=32, seed=seed)
    one, other = (train(config, rows, progress=False) for _ in range(2))
    assert torch.equal(one.encoder.weight, other.encoder.weight)


def test_what_is_not_given_goes_by_the_size_of_the_run() -> None:
    short, long = TrainConfig(steps=200), TrainConfig(steps=200_000)
    assert (short.n_warmup_steps, short.n_decay_steps, short.resample_interval) == (10, 40, 50)
    assert (long.n_warmup_steps, long.n_decay_steps, long.resample_interval) == (
        1000,
        40_000,
        25_000,
    )
    assert short.dead_after(100) == 2000
    assert long.dead_after(4096) == 10_000_000
    assert short.lr_for(2**14) == 2e-4
    assert short.lr_for(2**10) == pytest.approx(8e-4)
    one = TrainConfig(steps=1)
    assert (one.n_warmup_steps, one.n_decay_steps, one.dead_after(5)) == (0, 1, 1)
    assert TrainConfig(steps=200, decay_steps=195).n_warmup_steps == 5
    assert TrainConfig(steps=200, warmup_steps=190).n_decay_steps == 10


def test_what_is_given_stays() -> None:
    given = TrainConfig(
        steps=200,
        lr=1e-3,
        warmup_steps=0,
        decay_steps=0,
        dead_after_tokens=7,
        resample_every=3,
    )
    assert given.lr_for(2**14) == 1e-3
    assert (given.n_warmup_steps, given.n_decay_steps, given.resample_interval) == (0, 200, 3)
    assert given.dead_after(4096) == 7


def test_penalties_that_cannot_be_escaped() -> None:
    for objective, tied in (
        (ReLUConfig(weighted=True), False),
        (ReLUConfig(), True),
        (TopKConfig(), False),
    ):
        assert TrainConfig(objective, steps=5, decoder_norm="free", tied=tied).total_steps == 5


def test_a_location_is_checked_when_the_config_is_made() -> None:
    with pytest.raises(LocationError, match=r"mlp\.post_act"):
        TrainConfig(steps=1, location="3/mlp.post_akt")


FULL = TrainConfig(
    MatryoshkaConfig(k=8, group_fractions=(0.25, 0.75)), n_latents=96, steps=7, lr=1e-3, tied=True
)


def test_round_trip_through_json() -> None:
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(FULL)))) == FULL


def test_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        "n_latents = 96\nsteps = 7\nlr = 1e-3\ntied = true\n"
        '[objective]\nname = "matryoshka"\nk = 8\ngroup_fractions = [0.25, 0.75]\n'
    )
    assert read_config(TrainConfig, path) == FULL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"steps": 5, "n_latent": 4}, r"unknown field 'n_latent'\. Did you mean 'n_latents'"),
        ({"steps": 5, "objective": "topc"}, r"unknown objective 'topc'\. Did you mean 'topk'"),
        ({"steps": 5, "objective": {"name": "topk", "kk": 1}}, r"\(topk\): unknown field 'kk'"),
        ({"steps": 5, "objective": 3}, "expected a name"),
        ({"steps": "5"}, "steps: expected a whole number, found '5'"),
        ({"steps": 5, "tied": 1}, "tied: expected true or false"),
        ({"steps": 5, "decay": "liner"}, "Did you mean 'linear'"),
        (
            {"steps": 5, "objective": {"name": "matryoshka", "group_fractions": 1}},
            "expected a list",
        ),
    ],
)
def test_files_are_read_strictly(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_config(TrainConfig, path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("steps = ")
    with pytest.raises(InputError, match="not valid TOML"):
        read_config(TrainConfig, tmp_path / "run.toml")
    with pytest.raises(InputError, match="cannot be read"):
        read_config(TrainConfig, tmp_path / "absent.toml")
    with pytest.raises(InputError, match=r"expected a \.toml or \.json"):
        read_config(TrainConfig, tmp_path / "run.yaml")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(TrainConfig, tmp_path / "run.json")


# ---- flags -------------------------------------------------------------------------------------


def parsed(line: str, file: Path | None = None) -> TrainConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    base = None if file is None else read_values(file)
    return from_flags(parser.parse_args(line.split()), TrainConfig, base)


def test_flags() -> None:
    line = "--objective matryoshka --k 8 --group-fractions 0.25 0.75 --n-latents 96 --steps 7"
    assert parsed(line + " --lr 1e-3 --tied") == FULL
    assert parsed("--steps 7") == TrainConfig(steps=7)


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(to_dict(FULL)))
    assert parsed("", path) == FULL
    assert parsed("--lr 0.5 --no-tied", path) == dataclasses.replace(FULL, lr=0.5, tied=False)
    assert parsed("--k 3", path).objective == MatryoshkaConfig(k=3, group_fractions=(0.25, 0.75))
    other = parsed("--objective jumprelu --target-l0 5", path).objective
    assert other == JumpReLUConfig(target_l0=5.0)


def test_a_flag_takes_the_place_of_its_alternative(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 7\nexpansion = 2.0")
    assert parsed("--num-tokens 8192", path) == TrainConfig(num_tokens=8192, expansion=2.0)
    assert parsed("--n-latents 6", path) == TrainConfig(steps=7, n_latents=6)


def test_a_setting_of_another_objective_is_an_error() -> None:
    with pytest.raises(InputError, match="--target-l0 is no setting of the objective topk"):
        parsed("--steps 5 --target-l0 4")


@pytest.mark.parametrize(
    "value",
    [None, 3, 1.5, True, [], ["topk"], {}, {"name": 3}, {"name": None}, {"k": 8}, "", {"value": 1}],
)
def test_a_file_with_an_objective_of_another_type(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"steps": 5, "objective": value}))
    for line in ("", "--k 3"):
        with pytest.raises(InputError, match="objective"):
            parsed(line, path)


def test_help_comes_from_the_docstrings() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, TrainConfig)
    text = " ".join(parser.format_help().split())
    assert (
        "Adam's learning rate after the warm-up. If not given: 2e-4 / sqrt(n_latents / 2**14)"
        in text
    )
    assert "Number of active latents of each token." in text


# ---- params.json -------------------------------------------------------------------------------


def test_params_json(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    entries = {
        "sae_batch_size": {"value": 512, "description": "activations in a batch"},
        "num_tokens": {"value": 100_000, "description": ""},
        "layer": {"value": 2, "description": "which block"},
        "random_seed": 7,
        "context_length": {"value": 64},
    }
    path.write_text(json.dumps(entries))
    params = read_params(path)
    assert params.config.total_steps == 195
    assert [params.config.lr_for(n) for n in (64, 4096)] == [3e-4, 3e-4]
    assert params.config.n_warmup_steps == 19
    assert params.config.decay == "none"
    assert params.config.seed == 7
    assert params.config.objective == ReLUConfig(l1_coefficient=2.0)
    assert params.config.latents_for(512) == 4096
    assert params.config.location == "2/resid.torso.post_mlp"
    assert params.values["context_length"] == 64
    assert params.values["model_name"] == "hf:EleutherAI/pythia-70m-deduped"
    assert params.text == "hf:monology/pile-uncopyrighted"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_token": {"value": 5, "description": ""}}, "Did you mean 'num_tokens'"),
        ({"layer": {"value": "3", "description": ""}}, "layer: expected a whole number, found '3'"),
        ({"num_tokens": {"value": 100, "description": ""}}, "less than one batch of 8192"),
    ],
)
def test_params_json_is_read_strictly(entries: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(InputError, match=message):
        assert read_params(path).config


def test_the_scripts_own_defaults_run(tmp_path: Path) -> None:
    """10,000 tokens in batches of 8192: one step, which the script itself divides by zero on."""
    (tmp_path / "params.json").write_text("{}")
    config = read_params(tmp_path / "params.json").config
    assert (config.total_steps, config.log_every, config.warmup_steps) == (1, 1, 0)


def test_config_of_values_with_descriptions() -> None:
    config = from_dict(TrainConfig, {"steps": {"value": 5, "description": "batches"}})
    assert config == TrainConfig(steps=5)
    assert config.objective == TopKConfig()
