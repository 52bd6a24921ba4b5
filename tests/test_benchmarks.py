"""The benchmarks run: a small smoke of each, no time is judged."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    __main__,
    child,
    collate,
    harness,
    import_time,
    judge,
    parity,
    sample,
    viewer,
    viewer_pages,
)
from benchmarks.contestants import BRIDGE_4, FLOOR, OURS, PLAIN, ours, plain
from benchmarks.harness import Contestant, Entry, Harness, Race, Result
from benchmarks.workloads import Prepared, Setup


@pytest.fixture(scope="module")
def running() -> Iterator[Harness]:
    with Harness(rounds=2, threads=1) as harness:
        yield harness


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("benchmarks"), quick=True)


def test_contestants_run_and_agree(running: Harness, setup: Setup) -> None:
    race = sample.races(setup)[1]
    chosen = [entry for entry in race.entries if entry.contestant in (OURS, PLAIN, FLOOR)]
    race = Race(race.title, chosen, OURS.name)
    first, second, floor = results = running.run(race)
    assert not any(result.error for result in results), results
    assert [len(result.seconds) for result in results] == [2, 2, 2]
    assert len(first.checksum["ids"]) == setup.new_tokens
    assert first.checksum == second.checksum
    assert not floor.checksum
    assert "| plain torch | " in harness.table(race, results)
    assert all(result.peak_mib is not None and result.peak_mib >= 0 for result in results)


def test_slow_contestants_are_called_once(setup: Setup) -> None:
    race = sample.races(setup)[1]
    chosen = [entry for entry in race.entries if entry.contestant is OURS]
    with Harness(rounds=2, threads=1, slow_s=0.0) as running:
        (result,) = running.run(Race(race.title, chosen, OURS.name))
    assert len(set(result.seconds)) == 1
    assert len(result.seconds) == 2
    assert result.peak_mib is None
    assert result.checksum


@pytest.mark.parametrize("module", [ours, plain])
def test_workloads_do_what_they_say(module: Any, setup: Setup) -> None:
    """And the ablated neuron shows: otherwise one that ablates nothing would pass."""
    work = {"folder": setup.folder, "tokens": setup.tokens(2, 12)}
    with torch.no_grad():
        logits = module.logits(**work)()["logits"]
        assert logits.shape == (2, 12, setup.sizes["vocab_size"])
        ablated = module.ablated_logits(**work, **setup.ablated)()["logits"]
        kept = module.keep_post_act(**work)
        kept = kept.work() if isinstance(kept, Prepared) else kept()
        loaded = module.load_and_run(**work, first_folder=setup.folder)()["logits"]
    checksum = {"x": child.checksum(logits)}
    pair = [Result("a", checksum=checksum), Result("b", checksum={"x": child.checksum(ablated)})]
    assert harness.agreement(pair, "a")["b"] == "**DIFFERS: x**"
    assert torch.equal(kept["logits"], logits)
    assert [x.shape for x in kept["post_act"]] == [(2, 12, 4 * setup.sizes["n_embd"])] * 2
    assert torch.equal(loaded, logits)


def test_who_is_missing_is_listed_with_the_reason(running: Harness) -> None:
    absent = Contestant("absent", "ours", distribution="no-such-distribution")
    old = Contestant("old", "ours", distribution="torch", major="0.")
    race = Race(
        "a race",
        [Entry(absent, "logits"), Entry(old, "logits"), Entry(OURS, "no_such_workload")],
        OURS.name,
    )
    absent_, old_, lacking = running.run(race)
    assert absent_.error == "not installed"
    assert old_.error.startswith("not installed (version")
    assert lacking.error == "not offered"
    assert "| absent | - | - | - | - | not installed |" in harness.table(race, running.run(race))


def test_how_a_process_ended_is_said() -> None:
    killed = harness.Process(OURS, sys.executable, 1)
    killed._child.kill()
    with pytest.raises(harness.ContestantError, match="It was killed; where memory is short"):
        killed.ask("hello", module="ours", distribution="", major="", threads=1)
    killed.close()


def test_collating_is_compared_with_its_forward_pass(running: Harness, setup: Setup) -> None:
    race = collate.races(setup)[1]
    chosen = [entry for entry in race.entries if not entry.contestant.optional]
    floor, ours = results = running.run(dataclasses.replace(race, entries=chosen, rounds=1))
    assert not any(result.error for result in results), results
    assert ours.note == "512 latents were active"
    assert len(floor.seconds) == len(ours.seconds) == 1
    assert [entry.contestant.name for entry in race.entries[2:]] == ["SAEDashboard"]


def test_peers_take_part_only_when_asked_for() -> None:
    with Harness(rounds=1, with_peers=False, threads=1) as alone:
        assert alone.run(
            Race("a race", [Entry(OURS, "nothing"), Entry(BRIDGE_4, "nothing")], "")
        ) == [Result(OURS.name, error="not offered")]


def test_different_results_are_flagged() -> None:
    def result(label: str, **checksum: list[float]) -> Result:
        return Result(label, [1.0], checksum=checksum)

    race = Race("a race", [], "a")
    results = [
        result("a", logits=[1.0, 2.0]),
        result("b", logits=[1.0, 2.0001], more=[3.0]),
        result("c", logits=[1.0, 2.1]),
        result("d", logits=[1.0, math.nan]),
        result("e", logits=[1.0]),
    ]
    assert harness.agreement(results, race.reference) == {
        "a": "logits 1.5",
        "b": "logits 1.5001",
        "c": "**DIFFERS: logits**",
        "d": "**DIFFERS: logits**",
        "e": "**DIFFERS: logits**",
    }


def test_a_checksum_depends_on_every_element_and_its_place() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert child.checksum(x)[0] == 2.5
    assert child.checksum(x) == child.checksum([x[0], x[1]])
    assert child.checksum(x) != child.checksum(x.flip(0))
    assert child.checksum([[5, 7], [3]]) == [5.0, 7.0, 3.0]
    logits = torch.randn(4, 128, 500, generator=torch.Generator().manual_seed(0))
    one_row = logits.clone()
    one_row[2, 77] = 0
    results = [
        Result(label, checksum={"x": child.checksum(x)})
        for label, x in (("a", logits), ("b", one_row))
    ]
    verdicts = harness.agreement(results, "a")
    assert verdicts["b"] == "**DIFFERS: x**"


def test_ratios_are_taken_within_a_round() -> None:
    race = Race("a race", [], "a", calls=1000)
    results = [Result("a", [1.0, 4.0, 2.0]), Result("b", [3.0, 8.0, 2.0], peak_mib=7.4, note="so")]
    line = harness.table(race, results).splitlines()[-1]
    assert line == "| b (so) | 3000 | 2000-8000 | 2.000 | 7 | - |"


def test_the_command_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["--peers", "transformer-lens-4=no-such"]
    entries = ["--entries", OURS.name, BRIDGE_4.name]
    __main__.main(["forward", "--rounds", "1", "--quick", *peers, *entries])
    out = capsys.readouterr().out
    assert out.count("| neuron_explainer | ") == 2
    assert "its interpreter does not start" in out


def test_unknown_peers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["forward", "--peers", "transformer-lens=python"])
    assert "transformer-lens-4" in capsys.readouterr().err


def test_import_prints_its_table() -> None:
    imports = {
        "ours": ("", "neuron_explainer"),
        "beyond torch": ("", "torch, json"),
        "broken": ("", "no_such_module"),
        "no interpreter": ("nnsight", "torch"),
        "not asked for": ("sae-lens", "torch"),
    }
    table = import_time.run(1, {"nnsight": "no-such-interpreter"}, imports).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| broken",
        "| no interpreter",
        "| ours",
        "| beyond torch",
    ]
    assert "No module named 'no_such_module'" in table[2]
    assert table[4].endswith("| does not import it |")
    assert float(table[5].split(" | ")[1]) > 0.05


def test_parity_is_a_difference_over_the_largest_value() -> None:
    expected = torch.tensor([1.0, -4.0, float("-inf")])
    assert parity.relative(torch.tensor([1.0, -3.0, 7.0]), expected) == 0.25


def test_weights_are_the_same_every_time(tmp_path: Path) -> None:
    files = [Path(Setup(tmp_path / str(i), quick=True).folder, "model.safetensors") for i in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_asking_an_endpoint_is_measured() -> None:
    rows = judge.run(quick=True).splitlines()
    assert len(rows) == 8
    assert sum("requests" in row for row in rows) == 2


def test_the_pages_are_weighed_without_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no Chromium the table says so; what needs none is measured all the same."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NEURON_EXPLAINER_CHROMIUM", raising=False)
    large = viewer._large(tmp_path / "large", 20)
    rows = viewer_pages.run(tmp_path, large, quick=True).splitlines()
    found = {row.split(" | ")[0].removeprefix("| "): row.split(" | ")[1] for row in rows[2:]}
    assert int(found["npm packages shipped"]) <= 3 < int(found["npm packages in the lock file"])
    assert int(found["lines of JavaScript"].replace(",", "")) > 1000
    assert int(found["a feature as one file, bytes, tiny-tales"].replace(",", "")) <= 60_000
    assert found["everything that a browser shows"] == "-"
    assert "Chromium" in rows[-1] or "playwright" in rows[-1]


def test_times_of_a_page_are_a_median_and_a_95th_percentile() -> None:
    rows = viewer_pages.Rows()
    rows.times("a step", [float(x) for x in range(101)], "50", "; so")
    assert rows.lines == ["| a step, ms | 50 | 95 | 50 | n = 101; so |"]
