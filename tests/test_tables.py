"""The printer of tables, and foreign text made safe to print."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_explainer.tables import escaped, percent, text_table
from tests.test_layering import modules


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [["a", "1.5", "x"], ["longer", "20.25", "-"]]
    assert text_table(["name", "value", ""], rows) == (
        "name    value\n"  # nothing behind the last cell
        "a         1.5  x\n"
        "longer  20.25  -"
    )
    assert text_table(["name", "value", "?"], rows, n_left=2, rule=True).splitlines() == [
        "name    value  ?",
        "------  -----  -",
        "a       1.5    x",
        "longer  20.25  -",
    ]


def test_without_titles_or_rows() -> None:
    assert text_table([], [["fvu", "0.1"], ["l0", "16"]], n_left=2) == "fvu  0.1\nl0   16"
    assert text_table(["name", "value"], []) == "name  value"
    assert text_table([], []) == ""
    with pytest.raises(ValueError, match="zip"):
        text_table(["one"], [["1", "2"]])


def test_control_characters_are_escaped() -> None:
    assert escaped("a\x1b[2J\x9b\u202eb\tc\nd\u2028") == "a\\x1b[2J\\x9b\\u202eb\tc\nd\\u2028"


@given(st.floats(), st.integers(0, 3))
def test_percent_is_a_number_or_words(share: float, digits: int) -> None:
    found = percent(share, digits)
    assert found == "an undefined share" or re.fullmatch(rf"-?\d+(\.\d{{{digits}}})?%", found)
    assert (found[0] == "a") == (not math.isfinite(100 * share))
    assert not re.fullmatch(r"-0(\.0*)?%", found)


def test_every_share_is_printed_by_percent() -> None:
    """A format such as ``:.0%`` writes nan% where a total is 0."""
    found = [
        f"{name}: {use}"
        for name, path in modules().items()
        if name != "neuron_explainer.tables"
        for use in re.findall(r"\{[^{}]*:[^{}]*%\}|[\"'][+,.\d]*\d%[\"']", path.read_text("utf-8"))
    ]
    assert not found
