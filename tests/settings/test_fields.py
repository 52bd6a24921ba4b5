"""The one checker of fields: strict types, all problems in one error, no input that takes seconds."""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from neuron_explainer import files
from neuron_explainer.errors import CheckpointError, InputError, did_you_mean
from neuron_explainer.settings import check_types, read_config, read_fields


@dataclass(frozen=True)
class Inner:
    rows: int


@dataclass(frozen=True)
class Config:
    steps: int
    lr: float = 1e-3
    tied: bool = False
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()
    shards: list[Inner] | None = None
    widths: dict[str, int] | None = None


def test_what_is_right_is_read() -> None:
    values = {
        "steps": 3,
        "lr": 1,
        "kind": "b",
        "sizes": [1, 2],
        "shards": [{"rows": 4}],
        "widths": {"x": 5},
    }
    found = read_fields(Config, values)
    assert found == Config(3, 1.0, kind="b", sizes=(1, 2), shards=[Inner(4)], widths={"x": 5})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": True}, "steps: expected a whole number, found True"),
        ({"steps": 1.0}, r"steps: expected a whole number, found 1\.0"),
        ({"steps": "1"}, "steps: expected a whole number, found '1'"),
        ({"steps": None}, "steps: expected a whole number, found None"),
        ({"steps": 2**64}, "steps: expected a whole number, found 18446744073709551616"),
        ({"steps": 10**5000}, "steps: expected a whole number, found a value of type int"),
        ({"steps": 1, "lr": math.nan}, "lr: expected a finite number, found nan"),
        ({"steps": 1, "lr": -math.inf}, "lr: expected a finite number, found -inf"),
        ({"steps": 1, "lr": False}, "lr: expected a finite number, found False"),
        ({"steps": 1, "tied": 1}, "tied: expected true or false, found 1"),
        ({"steps": 1, "name": 3}, "name: expected text, found 3"),
        ({"steps": 1, "kind": True}, "kind: expected one of a, b, found True"),
        ({"steps": 1, "kind": []}, r"kind: expected one of a, b, found \[\]"),
        ({"steps": 1, "sizes": "12"}, "sizes: expected a list, found '12'"),
        ({"steps": 1, "sizes": [1, 2.0]}, r"sizes\[1\]: expected a whole number, found 2\.0"),
        ({"steps": 1, "shards": [{}]}, r"shards\[0\]: the field 'rows' is missing"),
        ({"steps": 1, "shards": {}}, r"shards: expected a list, found \{\}"),
        ({"steps": 1, "widths": {"x": "y"}}, r"widths\.x: expected a whole number, found 'y'"),
        ({"steps": 1, "widths": {3: 3}}, "widths: expected an object"),
        ({"stps": 1}, "the field 'steps' is missing"),
        ({"stps": 1}, r"unknown field 'stps'\. Did you mean 'steps'\? Known: steps, lr"),
        ({"steps": 1, 3: 1}, "unknown field 3"),
        ([1], r"expected an object, found \[1\]"),
        (None, "expected an object, found None"),
    ],
)
def test_what_is_wrong_is_named(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_fields(Config, values)
    with pytest.raises(CheckpointError, match=r"^config\.json: "):
        read_fields(Config, values, "config.json", error=CheckpointError)


def test_all_problems_stand_in_one_error() -> None:
    with pytest.raises(InputError) as caught:
        read_fields(Config, {"step": 1, "lr": "x", "tied": 0}, "run.toml")
    assert str(caught.value).splitlines() == [
        "run.toml: 4 problems:",
        "  the field 'steps' is missing.",
        "  unknown field 'step'. Did you mean 'steps'? Known: steps, lr, tied, name, kind, sizes, "
        "shards, widths.",
        "  lr: expected a finite number, found 'x'.",
        "  tied: expected true or false, found 0.",
    ]


def test_a_typed_dict_has_fields_that_may_be_absent() -> None:
    class Stored(TypedDict):
        n_latents: int
        group_sizes: NotRequired[list[int]]

    assert read_fields(Stored, {"n_latents": 3}) == {"n_latents": 3}
    with pytest.raises(InputError, match=r"group_sizes\[0\]: expected a whole number"):
        read_fields(Stored, {"n_latents": 3, "group_sizes": [True]})
    with pytest.raises(InputError, match="the field 'n_latents' is missing"):
        read_fields(Stored, {})


def test_only_some_fields_which_then_are_all_needed() -> None:
    assert read_fields(Config, {"steps": 1, "lr": 2.0}, only=["steps", "lr"]) == Config(1, 2.0)
    with pytest.raises(InputError, match="the field 'lr' is missing"):
        read_fields(Config, {"steps": 1}, only=["steps", "lr"])
    with pytest.raises(InputError, match="unknown field 'tied'"):
        read_fields(Config, {"steps": 1, "lr": 1.0, "tied": True}, only=["steps", "lr"])


def test_configs_made_in_python_are_held_to_their_types() -> None:
    check_types(Config(1, 2))
    for config, message in (
        (Config(1.0), r"Config: steps: expected a whole number, found 1\.0"),  # type: ignore[arg-type]  # the point
        (Config(1, shards=[3]), r"shards\[0\]: expected an object, found 3"),  # type: ignore[list-item]  # the point
    ):
        with pytest.raises(InputError, match=message):
            check_types(config)


def test_foreign_files_cost_no_time(tmp_path: Path) -> None:
    """60,000 unknown or repeated names were compared with all others, for 39 s."""
    began = time.perf_counter()
    many = {f"{'unknown_field'}{i}": i for i in range(60_000)}
    with pytest.raises(InputError) as caught:
        read_fields(Config, many, "config.json")
    assert "60001 problems" in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).endswith("… and 59991 more.")
    twice = tmp_path / "twice.json"
    twice.write_text("{" + ",".join(f'"k{i}": 1, "k{i}": 2' for i in range(60_000)) + "}")
    with pytest.raises(CheckpointError, match="'k0', 'k1', 'k10', … stands twice"):
        files.read_json(twice)
    assert did_you_mean("x" * 1_000_000, many) == ""
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("digits.json", f'{{"steps": {"9" * 5000}}}'),
        ("deep.json", f'{{"steps": {"[" * 100_000}1{"]" * 100_000}}}'),
        ("deep_field.json", f'{{"steps": {"[" * 500}1{"]" * 500}}}'),
        ("list.json", "[1, 2]"),
        ("digits.toml", f"steps = {'9' * 5000}"),
        ("deep.toml", f"steps = {'[' * 100_000}1{']' * 100_000}"),
    ],
)
def test_files_that_no_reader_can_hold(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises((InputError, CheckpointError), match=name):
        read_config(Config, path)


def test_what_json_itself_can_hold_is_never_a_foreign_error() -> None:
    odd: list[Any] = [
        None,
        True,
        0,
        -1,
        2**70,
        1e400,
        "",
        "ü\ud800",
        [],
        [[]],
        {},
        {"name": 1},
        {"name": "a"},
    ]
    for value in map(json.loads, map(json.dumps, odd)):
        for field in ("steps", "lr", "tied", "name", "kind", "sizes", "shards", "widths"):
            with contextlib.suppress(InputError):
                read_fields(Config, {"steps": 1, field: value}, "config.json")


def test_only_what_is_near_is_suggested() -> None:
    assert did_you_mean("nothere", ["intr"]) == ""
    assert did_you_mean("SAELENS", ["saelens", "sparsify"]) == " Did you mean 'saelens'?"
    assert did_you_mean("stps", ["steps", "lr"]) == " Did you mean 'steps'?"
