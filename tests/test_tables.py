"""The printer of tables, and foreign text made safe to print."""

import pytest

from neuron_explainer.tables import escaped, text_table


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
