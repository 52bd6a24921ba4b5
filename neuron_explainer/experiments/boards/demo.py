"""A look at the models of the package in a few seconds: a board, a probe table, an edit, a sentence."""

from collections.abc import Callable

import numpy as np

from neuron_explainer.experiments.boards import edits
from neuron_explainer.experiments.boards.drawing import Board, hide
from neuron_explainer.experiments.boards.measures import accuracy_by_kind, predict
from neuron_explainer.experiments.boards.objects import EMPTY, KINDS
from neuron_explainer.experiments.boards.probes import probe_everywhere, probe_table
from neuron_explainer.experiments.boards.recording import record, stream_points
from neuron_explainer.experiments.boards.speech import draw_from_words, sentences
from neuron_explainer.experiments.boards.study import Study, short
from neuron_explainer.models.locations import ActivationLocation
from neuron_explainer.tables import text_table


def run_demo(study: Study, say: Callable[[str], None] = print) -> None:
    """Show, in words and text pictures, what the models of a study do."""
    _reconstruction(study, say)
    _probes(study, say)
    _edit(study, say)
    _sentence(study, say)


def side_by_side(boards: dict[str, Board]) -> str:
    """Boards next to each other, each under its title."""
    parts = [[title, *repr(board).splitlines()] for title, board in boards.items()]
    widths = [max(map(len, part)) + 4 for part in parts]
    rows = zip(*parts, strict=True)
    return "\n".join(
        "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _reconstruction(study: Study, say: Callable[[str], None]) -> None:
    rng, config = np.random.default_rng(study.seed), study.dataset.config
    boards = study.dataset.draw("composite", "test", 1, rng)
    masked = hide(boards, 0.25, 1.0, rng)
    drawn = predict(study.model, masked)[0]
    say("A test board with a composite; a quarter of its cells and one whole root are hidden:\n")
    wrong = drawn != boards.tokens[0]
    say(
        side_by_side(
            {
                "board": boards.board(0),
                "what the model sees": Board(masked[0], config),
                "what it draws (! wrong)": Board(drawn, config, wrong),
            }
        )
    )
    own, n = (study.model, study.dataset), study.n(100)
    by_kind = accuracy_by_kind(*own, "test", n=n, seed=study.seed)
    rows = [[k, f"{100 * a.hidden:.1f}", f"{100 * a.boards:.1f}"] for k, a in by_kind.items()]
    say("\nTest boards, a fifth of their cells hidden, in per cent:\n")
    say(text_table(["kind", "hidden cells right", "boards wholly right"], rows, rule=True))


def _probes(study: Study, say: Callable[[str], None]) -> None:
    places = stream_points(study.n_layers)
    n, cells = study.n(100), study.n(800)
    recording = record(study.model, study.dataset, places, kinds=KINDS, n=n, seed=study.seed)
    results = probe_everywhere(recording, ["root", "cell", "composite"], cells=cells)
    say("\nWhat a linear probe reads from hidden cells, on boards held out, in per cent:\n")
    say(probe_table(results))


def _edit(study: Study, say: Callable[[str], None]) -> None:
    pair = edits.root_pairs(study.dataset, study.n(100), hidden=0.35, seed=study.seed)
    place, config = (
        ActivationLocation("resid.torso.post_mlp", study.n_layers - 2),
        study.dataset.config,
    )
    on_root = pair.before.roots != EMPTY
    (result,) = edits.swap_roots(study.model, pair, [place], on_root)
    values = edits.values_at(study.model, pair.masked_after, place)
    drawn = edits.draw_with(
        study.model, pair.masked_before, place, edits.replace_cells(on_root, values)
    )
    i = int(((drawn == pair.after.tokens) | ~on_root).all(1).argmax())
    say(
        f"\nAn edit: at {short(place)}, the root's cells get the activations of another root's board:\n"
    )
    say(
        side_by_side(
            {
                "board": pair.before.board(i),
                "seen": Board(pair.masked_before[i], config),
                "other board": pair.after.board(i),
                "drawn after the edit": Board(drawn[i], config),
            }
        )
    )
    say(
        f"\n{100 * result.flipped:.0f}% of {result.n_boards} boards turn in all their hidden cells; with the "
        f"cells' own activations {100 * result.control:.0f}% do."
    )


def _sentence(study: Study, say: Callable[[str], None]) -> None:
    rng, config = np.random.default_rng(study.seed), study.lea_dataset.config
    boards = study.lea_dataset.draw("single", "test", 1, rng)
    words = sentences(study.lea, boards.tokens)
    drawn = draw_from_words(study.lea, words)[0]
    say("\nLEA says in 16 words what is on a board, and draws it from the words alone:\n")
    say(" ".join(map(str, words[0])) + "\n")
    wrong = drawn != boards.tokens[0]
    say(side_by_side({"board": boards.board(0), "drawn (! wrong)": Board(drawn, config, wrong)}))
