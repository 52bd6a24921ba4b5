"""Two collations of different texts as one: :func:`merge`, and :func:`merge_stores` for files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neuron_explainer import files
from neuron_explainer.activations.corpus import TokenCorpus
from neuron_explainer.analysis.collation.reservoirs import interval_of
from neuron_explainer.analysis.records import (
    GROUPS,
    Collected,
    Doubles,
    ExampleTable,
    Floats,
    Ints,
    UnitStatistics,
    group_number,
)
from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import write_store
from neuron_explainer.analysis.token_store import TOKENS_FOLDER, TokenStore
from neuron_explainer.errors import InputError

_SAME = ("kind", "location", "name", "signed", "n_units")


def merge(first: Collected, second: Collected, offset: int) -> Collected:
    """What both collations found out about the same units, as if one had read both texts.

    Counts, extremes and sums are those of both texts, and so are the examples of every group. An interval
    of the group "stratum" gets a uniform sample of its contexts in both texts, which may have fewer examples
    than one pass would have found. Other examples of any group that are in the interval fill it up; their
    keys are above its limit. A context of one text that repeats one of the other is not recognised.

    Pairs of units that are active together are left out: their samples of tokens cannot be merged exactly.
    ``settings["left_out"]`` of the result says so if one of the two had them.

    Args:
        first: a collation.
        second: another one, of other text, with the same model, dictionary and settings.
        offset: number of tokens of the first corpus. Positions in the second are counted on from
            there; the two corpora have to be put together in the same way.
    """
    _check_same(first, second)
    a, b = first.examples, second.examples
    b = replace(b, start=b.start + offset)
    config = first.settings["config"]
    counts = {name: config[name] for name in ("top", "uniform", "weighted", "inactive")}
    counts["bottom"] = config["top"]
    statistics = _merge_statistics(first.statistics, second.statistics, offset)
    heads = first.kind == "head"
    tables = [_first_of(a, b, name, counts[name], heads) for name in GROUPS if name != "stratum"]
    limits = None
    if config["intervals"] and config["per_interval"]:
        strata, limits = _merge_strata(first, replace(second, examples=b))
        tables.append(strata)
    settings = {**first.settings, "key_seed": None, "merged": _list(first, second, "settings")}
    left_out = [each.settings.get("left_out") for each in (first, second)]
    if any(left_out) or first.coactivation is not None or second.coactivation is not None:
        settings["left_out"] = ["coactivation"]
    return replace(
        first,
        statistics=statistics,
        examples=ExampleTable.concatenate(tables),
        coactivation=None,
        settings=settings,
        provenance={**first.provenance, "merged": _list(first, second, "provenance")},
        stratum_limits=limits,
    )


def _check_same(first: Collected, second: Collected) -> None:
    for name in _SAME:
        if getattr(first, name) != getattr(second, name):
            raise InputError(
                f"cannot merge: {name} is {getattr(first, name)!r} of one and "
                f"{getattr(second, name)!r} of the other."
            )
    for name in ("model_sha256", "autoencoder_sha256"):
        if first.provenance.get(name) != second.provenance.get(name):
            raise InputError(f"cannot merge: {name} differs, so these are not the same units.")
    if _text(first.settings["config"]) != _text(second.settings["config"]):
        raise InputError("cannot merge: the two were collated with different settings (config).")
    seeds = [part["key_seed"] for part in _list(first, second, "settings")]
    if len(set(seeds)) < len(seeds):
        raise InputError(
            "cannot merge: both are of the same text, or of parts of one text, which have the same "
            "sampling keys. Collate the whole text in one run."
        )
    if not first.settings["config"]["top"]:
        raise InputError("cannot merge: without top examples the largest values are not known.")


def _list(first: Collected, second: Collected, what: str) -> list[dict[str, Any]]:
    """The settings or the provenance of all that has been merged."""
    found: list[dict[str, Any]] = []
    for each in (first, second):
        own = getattr(each, what)
        found += own.get("merged", [own])
    return found


def _text(config: Any) -> str:
    return json.dumps(config, sort_keys=True)


def _merge_statistics(a: UnitStatistics, b: UnitStatistics, offset: int) -> UnitStatistics:
    last = np.where(b.last_active >= 0, b.last_active + offset, a.last_active)
    return UnitStatistics(
        n_tokens=a.n_tokens + b.n_tokens,
        active=a.active.merge(b.active),
        all=a.all.merge(b.all),
        max=np.maximum(a.max, b.max),
        min=np.minimum(a.min, b.min),
        last_active=last,
        histogram=a.histogram + b.histogram,
    )


def _order(table: ExampleTable, group: str, interval: Ints, heads: bool) -> Ints:
    """The examples of a group by unit and interval, in the order of their ranks."""
    key = -table.key if group in ("top", "weighted") else table.key
    order: Ints = np.lexsort((_position(table, heads), key, interval, table.unit))
    return order


def _position(table: ExampleTable, heads: bool) -> Ints:
    """Corpus position of each example's peak; of a pair of tokens, that of the query."""
    peak = table.peak.astype(np.int64)
    if heads:
        peak = (np.sqrt(8 * peak + 1).astype(np.int64) - 1) // 2
    return table.start + peak


def _first_of(
    a: ExampleTable, b: ExampleTable, group: str, count: int, heads: bool
) -> ExampleTable:
    """The first ``count`` examples of a group of each unit of two tables."""
    number = group_number(group)
    both = ExampleTable.concatenate([t.rows(t.group == number) for t in (a, b)])
    return _ranked(both, group, np.zeros(len(both), np.int64), count, heads)


def _ranked(
    table: ExampleTable, group: str, interval: Ints, count: int, heads: bool
) -> ExampleTable:
    order = _order(table, group, interval, heads)
    table, interval = table.rows(order), interval[order]
    label = table.unit.astype(np.int64) * 256 + interval
    starts = np.flatnonzero(np.diff(label, prepend=-1))
    rank = np.arange(len(label)) - np.repeat(starts, np.diff(starts, append=len(label)))
    table = replace(table, rank=rank.astype(np.uint16), interval=interval.astype(np.uint8))
    return table.rows(rank < count)


def _merge_strata(first: Collected, second: Collected) -> tuple[ExampleTable, Doubles]:
    """The old intervals are the bins from which the new ones take their members."""
    parts = (first, second)
    limits_of: list[tuple[Doubles, Ints, Ints, npt.NDArray[np.bool_]]] = []
    largest = np.maximum(*(_largest(each) for each in parts))
    config = first.settings["config"]
    n, count = config["intervals"], config["per_interval"]
    limits = np.full((first.n_units, n), np.inf)
    for each in parts:
        if each.stratum_limits is None:
            raise InputError(f"cannot merge: {each.name} has no limits of its intervals.")
        own = _largest(each)
        for old in range(n):
            # A little more than the old interval, because of rounding.
            upper = own * np.float64((n - old) / n * (1 + 1e-6))
            lower = own * np.float64((n - old - 1) / n * (1 - 1e-6))
            touched = interval_of(upper, largest, n), interval_of(lower, largest, n)
            limits_of.append((each.stratum_limits[:, old], *touched, own > 0))
    for limit, begin, end, there in limits_of:
        for new in range(n):
            inside = there & (begin <= new) & (new <= end)
            limits[inside, new] = np.minimum(limits[inside, new], limit[inside])
    heads = first.kind == "head"
    both = _kept([each.examples for each in parts], heads)
    interval = interval_of(both.value, largest[both.unit], n)
    table = _ranked(both, "stratum", interval, len(both), heads)
    let_in = table.key <= limits[table.unit, table.interval]
    cut = np.zeros(limits.shape, bool)
    more = table.rows(let_in & (table.rank >= count))
    cut[more.unit, more.interval] = True
    last = table.rows(table.rank == count - 1)
    where = last.unit, last.interval
    limits[where] = np.where(cut[where], last.key, limits[where])
    return table.rows(table.rank < count), limits


def _kept(tables: list[ExampleTable], heads: bool) -> ExampleTable:
    """The examples of all groups with positive values, each once and as one of a stratum.

    Those of a uniform sample have the keys of strata. The others get the key 1, which no limit lets in but
    that of an interval of which all examples are known.
    """
    positive = [group_number(name) for name in ("stratum", "uniform", "top", "weighted")]
    both = ExampleTable.concatenate([t.rows(np.isin(t.group, positive)) for t in tables])
    key = np.where(np.isin(both.group, positive[:2]), both.key, 1.0)
    stratum = np.full(len(both), group_number("stratum"), np.uint8)
    both = replace(both, key=key, group=stratum)
    position = _position(both, heads)
    order = np.lexsort((key, position, both.unit))
    new = np.diff(both.unit[order].astype(np.int64), prepend=-1) != 0
    new |= np.diff(position[order], prepend=-1) != 0
    return both.rows(order[new])


def _largest(collected: Collected) -> Floats:
    """``[u]``: the largest value of any context that may give examples."""
    found = np.zeros(collected.n_units, np.float32)
    positive = collected.examples.rows(collected.examples.group != group_number("bottom"))
    np.maximum.at(found, positive.unit, positive.value)
    return found


def merge_stores(first: str | Path, second: str | Path, out: str | Path) -> Path:
    """Merge two stores of the same units on different texts into the folder ``out``.

    The texts are put one after the other. The folder may hold stores merged from the same two texts.

    Returns:
        the file of the store.
    """
    with ExampleStore.open(first) as a, ExampleStore.open(second) as b:
        texts = [store.tokens.corpus for store in (a, b)]
        found = merge(a.collected(), b.collected(), len(texts[0].tokens))
        if (a.tokens.tokenizer, a.tokens.text) != (b.tokens.tokenizer, b.tokens.text):
            raise InputError(f"cannot merge: {first} and {second} have different tokenizers.")
        starts = np.concatenate([texts[0].starts, texts[1].starts[1:] + len(texts[0].tokens)])
        corpus = TokenCorpus(
            np.concatenate([text.tokens for text in texts]),
            starts,
            np.arange(len(starts) - 1),
            " + ".join(text.name for text in texts),
        )
        vocabulary = a.tokens.pieces(range(len(a.tokens.offsets) - 1))
        folder = files.local_path(out)
        tokens = TokenStore.write(folder / TOKENS_FOLDER, corpus, vocabulary, a.tokens.tokenizer)
        name = Path(first).name
    own = {"corpus": corpus.name, "corpus_fingerprint": corpus.fingerprint}
    found = replace(found, provenance={**found.provenance, **own})
    write_store(folder / name, found, tokens)
    return folder / name
