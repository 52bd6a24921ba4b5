"""The benchmarks of what is learned run: a small smoke of each, and what they measure by."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__, planted, quality, recovery
from benchmarks.contestants.quality_runs import Run
from benchmarks.quality import Comparison, Failure, Found, Library, Sizes, at_l0
from neuron_explainer.models.autoencoder import Autoencoder

RUN = Run("", "", steps=100, batch=10, width=4, latents=8, lr=1e-3, l1=4.0)
SIZES = Sizes(tokens=64 * 20, batch=64, latents=64, k=4, held_out=(1, 1))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        text = f"Once upon a time there were {number} little mice who lived in a mill. " * 20
        (folder / f"{number}.txt").write_text(text, "utf-8")
    return folder


def trainer(exponent: float, at_one: float) -> Any:
    """A library whose L0 is a power of the coefficient."""

    def trained(run: Run) -> Found:
        l0 = at_one * run.l1**exponent
        evaluation: Any = SimpleNamespace(l0=l0)
        return Found(run, evaluation, 1, 0.0)

    return trained


@pytest.mark.parametrize("near", [quality.NEAR, quality.CLOSE])
@pytest.mark.parametrize(("exponent", "at_one"), [(-1.5, 300.0), (-0.7, 100.0), (-3.0, 900.0)])
def test_the_search_for_a_coefficient_ends_near(
    exponent: float, at_one: float, near: float
) -> None:
    found = at_l0(trainer(exponent, at_one), RUN, 32.0, near)
    assert found.evaluation.l0 == pytest.approx(32, rel=near)
    assert 1 < found.trainings <= quality.ATTEMPTS


def test_the_search_gives_up_where_nothing_helps() -> None:
    found = at_l0(trainer(0.0, 100.0), RUN, 32.0, quality.NEAR)
    assert (found.trainings, found.evaluation.l0) == (quality.ATTEMPTS, 100.0)


def test_what_all_libraries_share() -> None:
    assert (RUN.warmup, RUN.decay, RUN.dead_after) == (5, 20, 10)


def test_ours_is_trained_in_a_process_of_its_own(corpus: Path, tmp_path: Path) -> None:
    comparison = Comparison(corpus, tmp_path, SIZES)
    batches = list(comparison.run(1e-3, k=4))
    assert [list(x.shape) for x in batches] == [[64, 192]] * 20
    library = Library("quality_ours", sys.executable)
    try:
        pilot = replace(comparison.run(3e-3, k=4), steps=10)
        few, many = (comparison.attempt(library, r, "") for r in (pilot, replace(pilot, steps=20)))
        assert many.evaluation.fvu < few.evaluation.fvu
        assert many.evaluation.l0 == pytest.approx(4, abs=0.1)
        assert many.run.folder != few.run.folder
        with pytest.raises(Failure, match="lr must be above 0"):
            library.train(replace(pilot, lr=-1.0))
    finally:
        library.close()


def test_who_does_not_start_is_listed_with_the_reason() -> None:
    comparison: Any = None
    line = quality._line(comparison, "absent", "quality_ours", "no-such-python", 4)
    assert "its interpreter does not start" in line
    assert line.count("|") == quality.HEAD.count("|")


def test_planted_directions_and_their_count() -> None:
    rows, atoms = planted.planted(50)
    again, same = planted.planted(50, seed=1)
    torch.testing.assert_close(atoms, same)
    assert not torch.equal(rows, again)
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(planted.ATOMS))
    autoencoder = Autoencoder(planted.ATOMS, planted.WIDTH)
    with torch.no_grad():
        autoencoder.decoder.weight.copy_(3 * atoms.t())
        autoencoder.decoder.weight[:, :32] = -autoencoder.decoder.weight[:, :32]
    assert planted.recovered(atoms, autoencoder) == pytest.approx(0.75)


def test_recovery_prints_its_tables() -> None:
    text = recovery.run(quick=True)
    for name in [*recovery.OBJECTIVES, "true features", "random", "permuted decoder"]:
        assert f"\n| {name} | " in text
    assert "| true features | 1.000 | 1.000 | 1.000 |" in text
    assert text.count("BatchTopK ~ JumpReLU") == 1


@pytest.mark.parametrize(
    ("l1", "verdict"),
    [((0.5, 0.52), "holds"), ((0.68, 0.7), "not told apart"), ((0.9, 0.92), recovery.REVERSED)],
)
def test_an_order_holds_only_beyond_two_standard_deviations(
    l1: tuple[float, float], verdict: str
) -> None:
    f1 = dict.fromkeys(recovery.OBJECTIVES, (0.7, 0.72)) | {"ReLU + L1": l1}
    found: Any = {name: [{"f1": x} for x in values] for name, values in f1.items()}
    lines = recovery.order(found).splitlines()
    (line,) = [line for line in lines if line.startswith("| BatchTopK > ReLU + L1 ")]
    assert line.endswith(f"| {verdict} |")


def test_planted_prints_its_table() -> None:
    lines = planted.run(quick=True).splitlines()
    assert [line.split(" | ")[0] for line in lines[4:]] == [
        "| TopK, k = 5",
        "| ReLU + L1",
        "| sparse coding (FISTA)",
    ]


def test_end_to_end_accounts_for_all_its_time(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    __main__.main(["end_to_end", "--quick", "--corpus", str(corpus)])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-3:-1]]
    in_turn, in_a_thread = ([float(cell.rstrip("%")) for cell in row[2:6]] for row in rows)
    assert sum(in_turn) == pytest.approx(100, abs=0.2)
    assert in_turn[2] == 0  # nothing to wait for
    step, forward, waiting, taking = in_a_thread
    assert step + waiting + taking == pytest.approx(100, abs=0.2)
    assert forward >= 0  # none, where all activations had been computed when the clock started
    assert all(math.isfinite(float(cell)) for row in rows for cell in row[-2:])
    assert rows[0][-2:] == rows[1][-2:]  # the same dictionary


def test_a_corpus_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["quality", "end_to_end"])
    assert "quality and end_to_end need --corpus" in capsys.readouterr().err
