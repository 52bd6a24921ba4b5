"""The benchmarks run: a small smoke of each, no time is judged."""

from benchmarks import import_time, parity


def test_import_prints_its_table() -> None:
    table = import_time.run(1)
    assert "models beyond torch" in table
    assert len(table.splitlines()) == 6


def test_parity_is_a_difference_over_the_largest_value() -> None:
    import torch

    expected = torch.tensor([1.0, -4.0, float("-inf")])
    assert parity.relative(torch.tensor([1.0, -3.0, 7.0]), expected) == 0.25
