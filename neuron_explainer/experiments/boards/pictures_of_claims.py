"""One picture for each claim of the paper, with the number that supports or weakens it."""

from typing import Any

import numpy as np

from neuron_explainer.experiments.boards import edits
from neuron_explainer.experiments.boards.drawing import Board, Flags, hide
from neuron_explainer.experiments.boards.geometry import plane, spreads, variance_shares
from neuron_explainer.experiments.boards.measures import accuracy_by_kind, code_entropy, predict
from neuron_explainer.experiments.boards.objects import EMPTY, KINDS
from neuron_explainer.experiments.boards.probes import ProbeResult, fit, probe_everywhere
from neuron_explainer.experiments.boards.recording import Recording, Target, record
from neuron_explainer.experiments.boards.speech import (
    ATTRIBUTES,
    draw_from_words,
    sentences,
    swap_words,
    word_information,
)
from neuron_explainer.experiments.boards.study import (
    Picture,
    Study,
    label,
    legend_above,
    new_figure,
    short,
)
from neuron_explainer.models.locations import ActivationLocation

_MODULE = "pictures_of_claims"
_COLOURS = {"root": "#4477aa", "cell": "#ee6677", "composite": "#228833", "background": "#aa3377"}
_SHOWN: tuple[Target, ...] = ("root", "cell")
_PROBED: tuple[Target, ...] = ("root", "cell", "composite", "background")


def _picture(name: str, title: str, text: str, number: str, figure: Any) -> Picture:
    return Picture(name, title, text, number, figure, _MODULE)


def _last(study: Study, path: str = "resid.torso.post_mlp") -> ActivationLocation:
    return ActivationLocation(path, study.n_layers - 1)


# ---- claim 1: abstractions hold all semantic features ----------------------------------------------


def probe_results(study: Study) -> list[ProbeResult]:
    """Probes for every feature at every record point, two splits each."""
    return probe_everywhere(study.recording, _PROBED, seeds=(0, 1), cells=study.n(1500))


def probes(study: Study) -> Picture:
    """What linear probes read from hidden cells along depth."""
    results = probe_results(study)
    figure, axes = new_figure(7.2, 3.4)
    axis, places = axes[0, 0], list(study.recording.activations)
    for target in _PROBED:
        found = [r for r in results if r.target == target]
        mean, spread = (np.array([getattr(r, n) for r in found]) for n in ("accuracy", "spread"))
        axis.plot(mean, "o-", ms=3, lw=1.2, color=_COLOURS[target], label=target)
        axis.fill_between(
            range(len(mean)), mean - spread, mean + spread, alpha=0.2, color=_COLOURS[target]
        )
        axis.axhline(np.mean([r.chance for r in found]), color=_COLOURS[target], lw=0.7, ls=":")
    axis.set_xticks(range(len(places)), [short(p) for p in places], rotation=90, fontsize=6)
    axis.set_ylim(0, 1.02)
    label(axis, "", "accuracy on held-out boards", "dotted: chance (most frequent class)")
    legend_above(axis, len(_PROBED))
    last = {r.target: r for r in results if r.place == _last(study)}
    text = ", ".join(_beside_chance(r) for r in last.values())
    return _picture(
        "probes",
        "Claim: abstractions hold the semantic features of what is hidden",
        "Only hidden cells are probed: the model has to infer what they are part of. A linear "
        "probe (multinomial "
        "logistic regression) reads the root, the position in the root, and the composite from cells of "
        "objects, and the background from all cells; it is tested on boards that it has not seen. At the "
        "embedding all hidden cells are the same vector, so probes are at chance there.",
        f"After the last block: {text}. At its best: {_best(results)}.",
        figure,
    )


def _best(results: list[ProbeResult]) -> str:
    """Where each feature is read best."""
    best = {
        t: max((r for r in results if r.target == t), key=lambda r: r.accuracy) for t in _PROBED
    }
    return ", ".join(f"{_beside_chance(r)} at {short(r.place)}" for r in best.values())


def _beside_chance(result: ProbeResult) -> str:
    """What a probe reads, and what always naming the most frequent class gets."""
    read, chance = 100 * result.accuracy, 100 * result.chance
    return f"{result.target} {read:.1f}% (chance {chance:.0f}%)"


# ---- claim 2: transient convergence to low-dimensional manifolds -----------------------------------


def seen_objects(recording: Recording) -> Flags:
    """Cells of roots that the model sees: their tokens differ, and yet they belong together."""
    return np.asarray(recording.on_objects & ~recording.hidden)


def convergence(study: Study) -> Picture:
    """Distances within and between the roots of a board along depth."""
    recording = study.stream
    figure, axes = new_figure(7.2, 2.9, 1, 2)
    chosen = {"visible": seen_objects(recording), "hidden": recording.on_objects & recording.hidden}
    found = {
        name: spreads(recording, "root", cells, same_board=True) for name, cells in chosen.items()
    }
    ticks = [short(s.place) for s in found["visible"]]
    for name, colour in (("visible", "#4477aa"), ("hidden", "#ee6677")):
        ratios = [s.ratio for s in found[name]]
        axes[0, 0].plot(ratios, "o-", ms=3, color=colour, label=f"{name} cells")
        dimensions = [s.dimensions if s.between else np.nan for s in found[name]]
        axes[0, 1].plot(dimensions, "o-", ms=3, color=colour, label=f"{name} cells")
    axes[0, 0].axhline(1, color="#888888", lw=0.7, ls=":")
    most = study.dataset.config.n_roots - 1
    axes[0, 1].set_ylim(0, most + 0.2)
    axes[0, 1].axhline(most, color="#888888", lw=0.7, ls=":")
    for axis in axes[0]:
        axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6)
    label(axes[0, 0], "", "within / between", "distance within a root ÷ between roots")
    label(
        axes[0, 1],
        "",
        "participation ratio",
        f"dimensions of the {most + 1} root means (of {most})",
    )
    for axis in axes[0]:
        legend_above(axis, 2)
    ratios = [s.ratio for s in found["visible"]]
    lowest = int(np.nanargmin(ratios))
    return _picture(
        "convergence",
        "Claim: cells of one object converge for a while, onto few dimensions",
        "Cells of one root have different tokens. In the middle of the network they come "
        "together all the same, "
        "because they are part of the same thing; towards the output they part again, because the model "
        "has to name a token for each. Compared are cells of one board: two of the same root, and two of "
        "different roots. The ratio is 1 where it makes no difference which root a cell belongs to. (At the "
        "embedding, hidden cells are all the same vector and have no ratio.)",
        f"Visible cells: {ratios[0]:.2f} at the embedding, {ratios[lowest]:.2f} at its lowest "
        f"({ticks[lowest]}), {ratios[-1]:.2f} after the last norm.",
        figure,
    )


def planes(study: Study) -> Picture:
    """Object cells on planes along depth: of their principal directions, of roots, and of positions."""
    recording = study.stream
    places = [p for p in recording.activations if p.path != "resid.torso.post_attn"]
    chosen, rng = recording.on_objects, np.random.default_rng(study.seed)
    order = rng.permutation(int(chosen.sum()))
    shown = study.n(1200)
    learned, kept = order[shown:], order[:shown]
    figure, axes = new_figure(7.6, 5.0, 3, len(places))
    shares = []
    for column, place in enumerate(places):
        x = recording.at(place)[chosen]
        found = plane(x[kept])
        shares.append(found.shares.sum())
        _scatter(axes[0, column], found.points, recording.roots[chosen][kept])
        label(axes[0, column], title=short(place))
        for axis, target in zip(axes[1:, column], _SHOWN, strict=True):
            labels = recording.labels(target)[chosen]
            means = plane(
                np.stack(
                    [x[learned][labels[learned] == y].mean(0) for y in np.unique(labels[learned])]
                )
            )
            _scatter(axis, (x[kept] - means.mean) @ means.directions.T, labels[kept])
    for axis, text in zip(
        axes[:, 0], ("principal plane", "plane of the roots", "plane of positions"), strict=True
    ):
        axis.set_ylabel(text, fontsize=8)
    text = ", ".join(f"{short(p)} {100 * s:.0f}%" for p, s in zip(places, shares, strict=True))
    return _picture(
        "planes",
        "Planes to look at",
        "Cells of objects, visible and hidden. Above: on the first two principal directions of "
        "each stage, coloured "
        "by root. Middle: on the principal plane of the root means, coloured by root. Below: "
        "on that of the "
        "means of positions in the root, coloured by position. The means are of other cells "
        "than those that "
        "are shown.",
        f"Share of the variance in the principal planes: {text}.",
        figure,
    )


def _scatter(axis: Any, points: Any, labels: Any) -> None:
    """Points of a plane, coloured by class, without ticks."""
    axis.scatter(*points.T, c=labels, s=2.5, cmap="tab10", lw=0)
    axis.set(xticks=[], yticks=[])


def lea_abstractions(study: Study) -> Picture:
    """Probes, distances and a plane of LEA's picture stream."""
    recording = study.lea_stream(0.25)
    results = probe_everywhere(recording, _PROBED, seeds=(0, 1), cells=study.n(1500))
    recording = study.lea_stream(0.5)
    found = spreads(recording, "root", seen_objects(recording), same_board=True)
    ratios, ticks = [s.ratio for s in found], [short(s.place) for s in found]
    lowest = int(np.nanargmin(ratios))
    figure, axes = new_figure(9.0, 3.0, 1, 3)
    for target in _PROBED:
        own = [r for r in results if r.target == target]
        axes[0, 0].plot([r.accuracy for r in own], "o-", ms=3, color=_COLOURS[target], label=target)
        axes[0, 0].axhline(np.mean([r.chance for r in own]), color=_COLOURS[target], lw=0.7, ls=":")
    axes[0, 1].plot(ratios, "o-", ms=3)
    axes[0, 1].axhline(1, color="#888888", lw=0.7, ls=":")
    for axis in axes[0, :2]:
        axis.set_xticks(range(len(ticks)), ticks, rotation=90, fontsize=6)
    shown = seen_objects(recording)
    flat = plane(recording.at(found[lowest].place)[shown])
    _scatter(axes[0, 2], flat.points, recording.roots[shown])
    label(axes[0, 0], "", "accuracy on held-out boards", "probes of hidden cells")
    legend_above(axes[0, 0], len(_PROBED))
    label(axes[0, 1], "", "within / between", "distance within a root ÷ between roots")
    label(axes[0, 2], title=f"principal plane, {ticks[lowest]}, by root")
    return _picture(
        "lea_abstractions",
        "The other architecture has them too",
        "The picture stream of LEA while it reads the masked board, measured as the factored "
        "transformer was: probes of hidden cells (dotted: chance), distances between visible cells of "
        "roots, and these cells on the principal plane of the stage where the ratio is lowest.",
        f"Probes at their best: {_best(results)}. Ratio: {ratios[0]:.2f} at the embedding, "
        f"{ratios[lowest]:.2f} at its lowest ({ticks[lowest]}), {ratios[-1]:.2f} after the last norm. "
        f"The principal plane there holds {100 * flat.shares.sum():.0f}% of the variance.",
        figure,
    )


# ---- claim 3: manipulating abstractions changes the prediction -------------------------------------


def _edit_places(study: Study) -> list[ActivationLocation]:
    """The stream before the blocks, and after each attention and MLP."""
    paths = ("resid.torso.post_attn", "resid.torso.post_mlp")
    inside = [ActivationLocation(path, layer) for layer in range(study.n_layers) for path in paths]
    return [ActivationLocation("resid.post_emb"), *inside]


def manipulation(study: Study) -> Picture:
    """Boards are made to show another root, by another board's activations and along probes."""
    pair = edits.root_pairs(study.dataset, study.n(300), hidden=0.35, seed=study.seed)
    places, on_root = _edit_places(study), pair.before.roots != EMPTY
    hidden = edits.swap_roots(study.model, pair, places)
    whole = edits.swap_roots(study.model, pair, places, on_root)
    figure, axes = new_figure(7.2, 2.9, 1, 2)
    for name, results, colour in (
        ("all cells of the root", whole, "#4477aa"),
        ("its hidden cells", hidden, "#ee6677"),
    ):
        axes[0, 0].plot([r.flipped for r in results], "o-", ms=3, color=colour, label=name)
    axes[0, 0].plot([r.control for r in whole], ":", color="#888888", label="by themselves")
    axes[0, 0].set_xticks(range(len(places)), [short(p) for p in places], rotation=90, fontsize=6)
    axes[0, 0].legend(fontsize=7)
    label(axes[0, 0], "", "share of boards that flip", "replaced by another root's activations")
    best = _along_probes(study, pair, axes[0, 1])
    after = [r for r in whole if r.place.path == "resid.torso.post_mlp"]
    text = ", ".join(f"block {i} {100 * r.flipped:.0f}%" for i, r in enumerate(after))
    last = hidden[-1]
    change = edits.largest_change(study.model, pair.masked_before, last.place, pair.cells)
    return _picture(
        "manipulation",
        "Claim: abstractions cause what is drawn",
        "A third of a root's cells are hidden. Activations are replaced by those of the same "
        "board with another "
        "root (left): of all cells of the root, or of the hidden ones alone, around visible "
        "cells that still show "
        "the first root. A board flips if every hidden cell in which the roots differ shows the "
        "other root. Or "
        "they are moved along the directions of a root probe, with no other board at hand (right).",
        f"All cells of the root replaced after {text}; the hidden ones alone after the last block "
        f"{100 * last.flipped:.0f}%. Moved along a probe's directions, at best "
        f"{100 * best.cells_flipped:.0f}% of the "
        f"cells flip (random steps as long: {100 * best.cells_control:.0f}%). Replacement by the cells' own "
        f"activations changes no logit by more than {change:.1g}.",
        figure,
    )


def _along_probes(study: Study, pair: edits.Pair, axis: Any) -> edits.EditResult:
    """Draw what edits along probes do at several places and strengths; the best result."""
    strengths, n = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0), study.n(4000)
    recording = study.recording
    on_root = pair.before.roots != EMPTY
    found: list[edits.EditResult] = []
    for place in _edit_places(study)[2:]:
        cells = recording.on_objects
        probe = fit(recording.at(place)[cells][:n], recording.roots[cells][:n])
        along = edits.swap_along_probe(study.model, pair, place, probe, strengths, on_root)
        line = axis.plot(
            strengths, [r.cells_flipped for _, r in along], "o-", ms=3, label=short(place)
        )
        axis.plot(strengths, [r.cells_control for _, r in along], ":", color=line[0].get_color())
        found += [result for _, result in along]
    axis.legend(fontsize=6)
    label(
        axis,
        "strength (1: mirrored)",
        "share of cells that flip",
        "along the root probe (dotted: random)",
    )
    return max(found, key=lambda result: result.cells_flipped)


def manipulation_example(study: Study) -> Picture:
    """One board, edited at one block."""
    pair = edits.root_pairs(study.dataset, 60, hidden=0.35, seed=study.seed + 1)
    place, config = (
        ActivationLocation("resid.torso.post_mlp", study.n_layers - 2),
        study.dataset.config,
    )
    values, on_root = (
        edits.values_at(study.model, pair.masked_after, place),
        pair.before.roots != EMPTY,
    )
    drawn = edits.draw_with(
        study.model, pair.masked_before, place, edits.replace_cells(on_root, values)
    )
    plain = predict(study.model, pair.masked_before)
    flipped = ((drawn == pair.after.tokens) | ~on_root).all(1)
    i = int(np.flatnonzero(flipped)[0]) if flipped.any() else 0
    figure, axes = new_figure(7.6, 1.9, 1, 5)
    shown = [pair.before.tokens, pair.masked_before, plain, pair.after.tokens, drawn]
    titles = ["board", "seen", "drawn", "other board", f"drawn after the edit\nat {short(place)}"]
    for axis, tokens, title in zip(axes[0], shown, titles, strict=True):
        Board(tokens[i], config).draw(axis, title)
    return _picture(
        "manipulation_example",
        "One such edit",
        "The cells of the root get the activations that they have on the other board, and the "
        "model, which sees "
        "the first board, draws the second.",
        f"{100 * flipped.mean():.0f}% of {len(flipped)} boards turn into the other one, in all cells "
        "of the root.",
        figure,
    )


# ---- claim 4: contextual independence --------------------------------------------------------------


def independence(study: Study) -> Picture:
    """A root is the same thing wherever it stands, whatever is around it."""
    places = _edit_places(study)[1:]
    own, seed = (study.model, study.dataset, places), study.seed
    single = record(*own, kinds=("single",), n=study.n(500), seed=seed)
    both = record(*own, n=study.boards, seed=seed + 1)
    side = study.dataset.config.board_size
    left = np.arange(side * side) % side < side // 2
    figure, axes = new_figure(7.2, 2.9, 1, 2)
    settings = ["other single boards", "double boards", "composite boards"]
    settings.append("left half → right half")
    lines: dict[str, list[float]] = {name: [] for name in settings}
    for place in places:
        cells, x = single.hidden & single.on_objects, single.at(place)
        half = np.arange(len(single)) % 2 == 0
        train = cells & half[:, None]
        probe = fit(x[train], single.roots[train])
        test = cells & ~half[:, None]
        lines[settings[0]].append(probe.accuracy(x[test], single.roots[test]))
        for name, kind in zip(settings[1:3], KINDS[1:], strict=True):
            there = both.hidden & both.on_objects & (both.kinds == KINDS.index(kind))[:, None]
            lines[name].append(probe.accuracy(both.at(place)[there], both.roots[there]))
        probe = fit(x[cells & left], single.roots[cells & left])
        lines[settings[3]].append(probe.accuracy(x[cells & ~left], single.roots[cells & ~left]))
    for name, line in lines.items():
        axes[0, 0].plot(line, "o-", ms=3, label=name)
    axes[0, 0].axhline(1 / study.dataset.config.n_roots, color="#888888", lw=0.7, ls=":")
    axes[0, 0].legend(fontsize=6)
    label(axes[0, 0], "", "accuracy of the root probe", "learned on single boards, read on …")
    cells = single.hidden & single.on_objects
    place_on_board = np.broadcast_to(np.arange(side * side), cells.shape)[cells]
    factors = {
        "root and position in it": single.roots[cells] * 100 + single.cells[cells],
        "place on the board": place_on_board,
        "background": single.labels("background")[cells],
    }
    found = [variance_shares(single.at(place)[cells], factors) for place in places]
    for name in factors:
        axes[0, 1].plot([f[name] for f in found], "o-", ms=3, label=name)
    axes[0, 1].legend(fontsize=6)
    label(axes[0, 1], "", "share of variance", "what the vectors of hidden cells depend on")
    for axis in axes[0]:
        axis.set_xticks(range(len(places)), [short(p) for p in places], rotation=90, fontsize=6)
    last = ", ".join(f"{name} {100 * line[-1]:.0f}%" for name, line in lines.items())
    return _picture(
        "independence",
        "Claim: an abstraction does not depend on its context",
        "Left: a probe for the root is learned on single boards (or on the left half of the "
        "board) and read on "
        "boards of other kinds (or on the right half). Right: how much of the variance of hidden cells lies "
        "between the combinations of root and position in it, between the places on the board, and "
        "between the backgrounds.",
        f"At the last stage: {last} (chance {100 / study.dataset.config.n_roots:.0f}%). Of the variance "
        "there, root and position in it account for "
        f"{100 * found[-1]['root and position in it']:.0f}%, "
        f"the background for {100 * found[-1]['background']:.0f}%.",
        figure,
    )


# ---- claim 5: part and whole -----------------------------------------------------------------------


def parts_and_wholes(study: Study) -> Picture:
    """A hidden constituent is known from the others, and can be exchanged alone."""
    pair = edits.composite_pairs(study.dataset, study.n(300), seed=study.seed)
    drawn = predict(study.model, pair.masked_before)
    wrong_anywhere = (drawn != pair.before.tokens) & pair.cells
    recovered = ~wrong_anywhere.any(1)
    lone = _lone_roots(study)
    places = _edit_places(study)
    results = edits.patch_constituent(study.model, pair, places)
    figure, axes = new_figure(7.6, 2.9, 1, 3, width_ratios=[0.8, 1.4, 1.4])
    bars = axes[0, 0].bar([0, 1], [recovered.mean(), lone], 0.6, color=["#228833", "#bbbbbb"])
    axes[0, 0].bar_label(bars, [f"{100 * recovered.mean():.0f}%", f"{100 * lone:.0f}%"], fontsize=7)
    axes[0, 0].set_xticks([0, 1], ["part of a\ncomposite", "alone"], fontsize=7)
    chance = 1 / study.dataset.config.n_roots
    axes[0, 0].axhline(chance, color="#888888", lw=0.7, ls=":")
    axes[0, 0].set_ylim(0, 1.1)
    label(axes[0, 0], "", "share drawn right", "root hidden whole")
    for name, told, colour in (
        ("flipped", "it shows the other root", "#4477aa"),
        ("kept", "it shows its own", "#ee6677"),
        ("elsewhere", "other cells stay right", "#228833"),
    ):
        axes[0, 1].plot([getattr(r, name) for r in results], "o-", ms=3, color=colour, label=told)
    axes[0, 1].set_xticks(range(len(places)), [short(p) for p in places], rotation=90, fontsize=6)
    axes[0, 1].legend(fontsize=6)
    label(axes[0, 1], "", "share", "one constituent patched")
    cells = study.n(1500)
    composite = probe_everywhere(study.recording, ["composite"], seeds=(0, 1), cells=cells)
    axes[0, 2].plot([r.accuracy for r in composite], "o-", ms=3, color="#228833")
    axes[0, 2].axhline(composite[0].chance, color="#228833", lw=0.7, ls=":")
    axes[0, 2].set_xticks(
        range(len(composite)), [short(r.place) for r in composite], rotation=90, fontsize=5
    )
    label(axes[0, 2], "", "accuracy", "composite, read from hidden cells")
    middle = next(r for r in results if r.place == ActivationLocation("resid.torso.post_mlp", 1))
    return _picture(
        "parts_and_wholes",
        "Claim: parts know the whole, and can be exchanged",
        "Left: a root that is hidden whole can be inferred if it is part of a composite, since "
        "the other three "
        "constituents tell which one; alone on its board it cannot. Middle: the hidden constituent's "
        "activations are replaced by those of another composite; it should become the other "
        "root, and all other "
        "cells should stay. Right: what a probe reads of the composite.",
        f"Drawn right: {100 * recovered.mean():.0f}% of hidden constituents, {100 * lone:.0f}% "
        f"of lone roots (chance {100 * chance:.0f}%). Patched after block 1: "
        f"{100 * middle.flipped:.0f}% flip, {100 * middle.elsewhere:.1f}% of all other "
        "cells stay right.",
        figure,
    )


def _lone_roots(study: Study) -> float:
    """The share of single boards that are drawn right when the whole root is hidden."""
    rng = np.random.default_rng([study.seed, 61])
    boards = study.dataset.draw("single", "train", study.n(300), rng)
    on_root = boards.roots != EMPTY
    masked = np.where(on_root, study.dataset.config.hidden_token, boards.tokens)
    return float(((predict(study.model, masked) == boards.tokens) | ~on_root).all(1).mean())


# ---- claim 6: words --------------------------------------------------------------------------------


def words(study: Study) -> Picture:
    """What the words of LEA tell about root, position and background."""
    boards, said = study.spoken
    found = word_information(said, boards, study.seed)
    figure, axes = new_figure(7.4, 2.6, 1, 2, width_ratios=[2, 1])
    shown = axes[0, 0].imshow(found.shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(shown, ax=axes[0, 0], shrink=0.8).ax.tick_params(labelsize=6)
    axes[0, 0].set_yticks(range(len(found.attributes)), found.attributes)
    axes[0, 0].set_xticks(range(said.shape[1]))
    label(axes[0, 0], "slot of the sentence", "", "mutual information ÷ entropy of the attribute")
    used, counts = np.unique(said, return_counts=True)
    axes[0, 1].bar(range(len(used)), np.sort(counts)[::-1], 1.0, color="#4477aa")
    label(
        axes[0, 1],
        "word, by frequency",
        "times said",
        f"{len(used)} of {study.lea.sizes.n_words} words",
    )
    by_kind = accuracy_by_kind(
        *(study.lea, study.lea_dataset, "test"), n=study.n(100), from_words=True, seed=study.seed
    )
    best = found.shares.max(1)
    floor = found.floor[np.arange(len(best)), found.shares.argmax(1)]
    text = ", ".join(
        f"{name} {b:.2f} (shuffled {f:.2f})"
        for name, b, f in zip(found.attributes, best, floor, strict=True)
    )
    spoken_well = by_kind["single"]
    return _picture(
        "words",
        "Claim: words map to abstractions",
        f"LEA says {said.shape[1]} words about a board and draws the board again from the words "
        f"alone. For {len(boards):,} "
        "single boards: what each slot of the sentence tells about each attribute (1: everything).",
        f"Best slot: {text}. From words alone {100 * spoken_well.cells:.1f}% of the cells of "
        "single test boards are "
        f"right (a fifth hidden), {100 * spoken_well.boards:.0f}% of boards wholly. Normalised "
        "entropy of word use: "
        f"{_entropy(study):.2f}.",
        figure,
    )


def _entropy(study: Study) -> float:
    import torch

    return code_entropy(torch.from_numpy(study.spoken[1]), study.lea.sizes.n_words)


def word_edits(study: Study) -> Picture:
    """What happens to the drawn board when words are exchanged."""
    own, n = (study.lea, study.lea_dataset), study.boards
    swaps = [swap_words(*own, name, n, study.seed) for name in ATTRIBUTES]
    figure, axes = new_figure(7.4, 2.7, 1, 2)
    for swap in swaps:
        axes[0, 0].plot(swap.by_slot, "o-", ms=3, label=swap.attribute)
        axes[0, 1].plot(swap.by_number, "o-", ms=3, label=swap.attribute)
    axes[0, 0].legend(fontsize=7)
    label(axes[0, 0], "slot whose word is exchanged", "share of boards that turn", "one word")
    label(axes[0, 1], "words exchanged, best slots first", "", "several words")
    text = ", ".join(
        f"{s.attribute} {100 * s.by_slot.max():.0f}% (random word {100 * s.control:.0f}%)"
        for s in swaps
    )
    return _picture(
        "word_edits",
        "Changing words changes the board",
        "Two boards differ in one attribute. Words of the first one's sentence are replaced by those of the "
        "second; a board has turned if what is drawn shows the second on more than half of the "
        "cells in which "
        "they differ.",
        f"One word, best slot: {text}.",
        figure,
    )


def word_example(study: Study) -> Picture:
    """One board, its sentence, and the board that is drawn when its background is exchanged."""
    from neuron_explainer.experiments.boards.speech import attribute_pairs

    config = study.lea_dataset.config
    before, after = attribute_pairs(study.lea_dataset, "root", 40, study.seed)
    said, other = sentences(study.lea, before.tokens), sentences(study.lea, after.tokens)
    swap = swap_words(study.lea, study.lea_dataset, "root", study.boards, study.seed)
    slot = int(swap.by_slot.argmax())
    edited = said.copy()
    edited[:, slot] = other[:, slot]
    drawn = draw_from_words(study.lea, edited)
    differ = before.tokens != after.tokens
    share = ((drawn == after.tokens) & differ).sum(1) / np.maximum(differ.sum(1), 1)
    i = int(share.argmax())
    figure, axes = new_figure(7.4, 3.0, 1, 4)
    plain = draw_from_words(study.lea, said)
    shown = [before.tokens, plain, drawn, after.tokens]
    titles = [
        "board",
        "drawn from its sentence",
        f"drawn with word {slot}\nof the other",
        "the other board",
    ]
    for axis, tokens, title in zip(axes[0], shown, titles, strict=True):
        Board(tokens[i], config).draw(axis, title)
    for axis, sentence in ((axes[0, 0], said[i]), (axes[0, 3], other[i])):
        axis.set_xlabel(_in_lines(sentence), fontsize=6)
    return _picture(
        "word_example",
        "A sentence, and one word changed",
        "The sentences (numbers of words) stand below their boards. The board chosen is the one "
        "that turns most.",
        f"Word {slot} goes from {said[i, slot]} to {other[i, slot]}; {100 * share[i]:.0f}% of "
        "the cells in which the "
        "boards differ turn.",
        figure,
    )


def _in_lines(sentence: Any) -> str:
    """The numbers of a sentence's words, eight in a line."""
    words = [str(word) for word in sentence]
    return "\n".join(" ".join(words[k : k + 8]) for k in range(0, len(words), 8))


def masked_speech(study: Study) -> Picture:
    """How reconstruction, from the board and from words, fares with masking."""
    figure, axes = new_figure(4.6, 2.7)
    rng = np.random.default_rng([study.seed, 67])
    boards = study.lea_dataset.draw("single", "test", study.n(200), rng)
    levels = (0.0, 0.1, 0.25, 0.4, 0.6, 0.8)
    lines: dict[str, list[float]] = {"from the board": [], "from words": []}
    for level in levels:
        masked = hide(boards, level, 0.0, rng)
        for name, from_words in (("from the board", False), ("from words", True)):
            drawn = predict(study.lea, masked, from_words)
            lines[name].append(float((drawn == boards.tokens).mean()))
    for name, line in lines.items():
        axes[0, 0].plot(levels, line, "o-", ms=3, label=name)
    background = float((boards.tokens == boards.backgrounds[:, None]).mean())
    axes[0, 0].axhline(background, color="#888888", lw=0.7, ls=":", label="background everywhere")
    axes[0, 0].legend(fontsize=7)
    label(
        axes[0, 0], "share of cells hidden", "share of cells drawn right", "LEA, single test boards"
    )
    text = ", ".join(f"{100 * line[2]:.1f}% {name}" for name, line in lines.items())
    return _picture(
        "masked_speech",
        "A sentence says enough",
        "LEA draws a board from what it sees of it, or from 16 words that it said about it.",
        f"With a quarter of the cells hidden: {text}. The background in every cell would get "
        f"{100 * background:.1f}%.",
        figure,
    )
