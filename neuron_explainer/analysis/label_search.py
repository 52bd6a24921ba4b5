"""Searching labels by their words, in the file of a store or in a workspace.

Labels that hold all words as they were typed come first, then those where the last word is the beginning of
a longer one; among each of the two, short labels come first. All labels found hold the same words, so that
BM25 would put them in nearly the same order, but it counts how often each word occurs in the whole file:
over a million labels, that alone takes longer than everything else.

Of a word that thousands of labels hold, the first :data:`CANDIDATES` are looked at.
"""

from collections.abc import Callable, Sequence
from typing import Any

Query = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]
CANDIDATES = 2000
_SHORTEST_BEGINNING = 2
"""Letters from which on a word is completed: nearly every label has a word with a given first letter."""


def fts_query(text: str, *, prefix: bool = True) -> str:
    """A text that somebody typed as a query of FTS5: all words, the last one perhaps unfinished.

    Each word is quoted, so that nothing in it is read as an operator. Empty if there is no word; with
    ``prefix``, also if the last word is too short to be completed.
    """
    text = text.encode(errors="replace").decode()  # half a surrogate pair has no form in SQLite
    words = [word.replace('"', '""') for word in text.replace("\0", " ").split()]
    words = [word for word in words if any(letter.isalnum() for letter in word)]
    if not words or (prefix and len(words[-1]) < _SHORTEST_BEGINNING):
        return ""
    return " ".join(f'"{word}"' for word in words) + "*" * prefix


def find_labels(
    query: Query,
    text: str,
    limit: int,
    *,
    prefix: bool,
    columns: str = "unit, text, source, score",
    where: str = "",
    values: Sequence[Any] = (),
    candidates: int = CANDIDATES,
) -> list[tuple[Any, ...]]:
    """Rows of the table ``labels`` that hold all words, short labels first.

    Args:
        query: runs SQL on a file with the tables ``labels`` and ``labels_fts``.
        text: what somebody typed.
        limit: how many rows.
        prefix: the last word may be the beginning of a word.
        columns: what is returned of each row.
        where: a further condition on the rows of ``labels``, with a leading ``AND``.
        values: for the condition.
        candidates: how many rows are looked at.
    """
    match = fts_query(text, prefix=prefix)
    if not match:
        return []
    # CROSS JOIN: SQLite goes through what the index finds, one by one, until it has enough.
    sql = (
        f"SELECT {columns} FROM (SELECT labels.* FROM labels_fts CROSS JOIN labels "
        f"ON labels.id = labels_fts.rowid WHERE labels_fts MATCH ? {where} LIMIT ?) "
        "ORDER BY length(text), id LIMIT ?"
    )
    return query(sql, (match, *values, candidates, limit))
