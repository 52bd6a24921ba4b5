"""A setting that is one of several dataclasses: dict, flags and errors of any family."""

import argparse
from dataclasses import dataclass, field

import pytest

from neuron_explainer.errors import InputError
from neuron_explainer.settings import Variant, from_dict, split_fields, to_dict
from neuron_explainer.settings.flags import add_flags, from_flags


@dataclass(frozen=True)
class Scorer(Variant, noun="scorer"):
    pass


@dataclass(frozen=True)
class Detection(Scorer):
    examples: int = 10
    """Examples shown."""


@dataclass(frozen=True)
class Fuzzing(Scorer):
    share: float = 0.5
    """Share of changed examples."""


@dataclass(frozen=True)
class Plot(Variant, noun="plot"):
    pass


@dataclass(frozen=True)
class Histogram(Plot):
    bins: int = 50
    """Number of bins."""


Scorer.add("detection", Detection)
Scorer.add("fuzzing", Fuzzing)
Plot.add("histogram", Histogram)


@dataclass(frozen=True)
class Settings:
    """Two families in one config."""

    seed: int = 0
    """Of the draw."""
    scorer: Scorer = field(default_factory=Fuzzing)
    """How explanations are scored."""
    plot: Plot = Histogram(bins=20)
    """What is drawn."""


def test_families_keep_their_own_names() -> None:
    assert (Scorer.names(), Plot.names()) == (["detection", "fuzzing"], ["histogram"])
    assert (Fuzzing().name, Histogram().name) == ("fuzzing", "histogram")


def test_round_trip() -> None:
    settings = Settings(scorer=Detection(examples=3), plot=Histogram(bins=7))
    assert to_dict(settings)["scorer"] == {"name": "detection", "examples": 3}
    assert from_dict(Settings, to_dict(settings)) == settings
    assert from_dict(Settings, {"scorer": "detection"}).scorer == Detection()


def test_flags_of_both() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    assert from_flags(parser.parse_args([]), Settings) == Settings()
    line = "--scorer detection --examples 4 --bins 9"
    found = from_flags(parser.parse_args(line.split()), Settings)
    assert found == Settings(scorer=Detection(4), plot=Histogram(9))
    with pytest.raises(InputError, match="--examples is no setting of the scorer fuzzing"):
        from_flags(parser.parse_args(["--examples", "4"]), Settings)


def test_errors_name_the_family() -> None:
    with pytest.raises(InputError, match=r"unknown scorer 'fuzing'\. Did you mean 'fuzzing'"):
        from_dict(Settings, {"scorer": "fuzing"})
    with pytest.raises(InputError, match=r"setting of plots: plot = \{ name = 'histogram', bins"):
        split_fields({"bins": 3}, [Settings], "run.toml")

    @dataclass(frozen=True)
    class Unknown(Scorer):
        pass

    with pytest.raises(InputError, match=r"Unknown is not registered .* scorer"):
        _ = Unknown().name
