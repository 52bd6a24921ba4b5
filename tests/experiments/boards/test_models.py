"""The two architectures: sizes, arithmetic, hooks, what positions may touch, the quantiser."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neuron_explainer.errors import CheckpointError, HookError, InputError, LocationError
from neuron_explainer.experiments.boards.dataset import BoardDataset
from neuron_explainer.experiments.boards.gpt import BoardGPT, GPTSizes
from neuron_explainer.experiments.boards.lea import LEA, LEASizes
from neuron_explainer.experiments.boards.model_files import BoardModel, load_model, save_model
from neuron_explainer.experiments.boards.objects import BoardConfig
from neuron_explainer.experiments.boards.quantiser import COMMITMENT, USAGE, VectorQuantiser
from neuron_explainer.experiments.boards.sites import (
    BOARD_SITES,
    LEAHooks,
    StreamHooks,
    location,
    recorder,
)
from neuron_explainer.models.hooks import AtLayers, TransformerHooks
from neuron_explainer.models.locations import SITES, ActivationLocation
from tests.conftest import assert_close, keep_in, random_tokens
from tests.reference import boards_numpy

TINY = GPTSizes(vocab_size=7, n_cells=9, n_layers=2, width=8, position_width=4)
TINY_LEA = LEASizes(
    vocab_size=7, n_cells=9, n_layers=2, width=8, position_width=4, n_words=6, sentence=5
)


def stirred(model: BoardModel, seed: int = 0) -> BoardModel:
    """The model with every parameter different from its special first value, in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return model


def gpt(**changes: object) -> BoardGPT:
    model = stirred(BoardGPT(GPTSizes(**{**vars(TINY), **changes})))
    assert isinstance(model, BoardGPT)
    return model


def lea(**changes: object) -> LEA:
    model = stirred(LEA(LEASizes(**{**vars(TINY_LEA), **changes})))
    assert isinstance(model, LEA)
    return model


def n_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


BOARDS = random_tokens(3, 9, n_vocab=7)


def test_parameter_counts_are_the_papers() -> None:
    assert n_parameters(BoardGPT()) == 197_824
    assert n_parameters(LEA()) == 145_280
    # without the code beside the stream, inputs of 64; positions of 64 instead of 32
    assert n_parameters(BoardGPT(GPTSizes("vanilla"))) == 197_824 - 3 * 32 * (192 + 256) + 64 * 32
    assert n_parameters(LEA(LEASizes("vanilla"))) < 145_280
    assert n_parameters(LEA(LEASizes(ema=False))) == 145_280 - 128 * 32  # no moving sums


@pytest.mark.parametrize("kind", ["factor", "vanilla"])
def test_every_record_point_equals_an_independent_numpy_forward(kind: str) -> None:
    model = gpt(type=kind)
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = boards_numpy.gpt(weights, BOARDS.numpy(), 2, 2, kind == "factor")
    with torch.no_grad():
        plain = model(BOARDS)
        found = model.capture(BOARDS, list(dict.fromkeys(path for path, _ in expected)))
    assert_close(plain, expected["logits", None], 1e-12)
    for place, value in found.items():
        assert_close(value, expected[place.path, place.layer], 1e-12, str(place))
    missing = {s.path for s in BOARD_SITES} - {path for path, _ in expected}
    inside_norms = {path for path in missing if ".ln_" in path}
    assert missing - inside_norms - {"attn.qk_softmax_denominator"} == {
        s.path for s in BOARD_SITES if s.path.startswith("cross.") or s.path == "words"
    }


def test_hooks_see_and_replace_every_site_of_the_table() -> None:
    model = gpt()
    for site in BOARD_SITES:
        if site.path not in SITES:
            continue
        seen: list[Tensor] = []

        def change(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x)
            return x * 1.5

        hooks = TransformerHooks().append_at(site.path, change)
        with torch.no_grad():
            assert not torch.allclose(model(BOARDS, hooks), model(BOARDS)), site.path
        assert len(seen) == (2 if SITES[site.path].per_layer else 1), site.path


def test_hooks_that_change_nothing_change_nothing() -> None:
    model = gpt()
    hooks = TransformerHooks()
    hooks.append_all(lambda x: x)
    model.zero_grad()
    model(BOARDS).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(BOARDS, hooks).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, plain[name], 1e-10, name)


def test_names_of_the_papers_program_are_understood() -> None:
    assert location("b2_z_attn_mlp") == ActivationLocation("resid.torso.post_mlp", 2)
    assert location("z_out") == ActivationLocation("resid.post_ln_f")
    assert location("b0_a") == ActivationLocation("attn.qk_probs", 0)
    assert location("1/mlp.post_act").layer == 1
    with pytest.raises(
        LocationError, match=r"unknown record point 'b0_mlp_updat'. Did you mean 'mlp_update'"
    ):
        location("b0_mlp_updat")
    theirs = {site.theirs for site in BOARD_SITES}
    named = {"z", "a", "v", "attn_v", "attn_update", "z_attn", "mlp_in", "mlp_update", "logit"}
    assert named | {"z_attn_mlp", "z_out"} <= theirs


def test_permuting_cells_with_their_position_codes_permutes_the_logits() -> None:
    model, order = gpt(), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(BOARDS)[:, order]
        model.pos_embed.copy_(model.pos_embed[order].clone())
        assert_close(model(BOARDS[:, order]), expected, 1e-12)


def test_the_stream_carries_no_position_at_its_input() -> None:
    same = torch.full((1, 9), 3)
    with torch.no_grad():
        factor = gpt().capture(same, "resid.post_emb")[location("resid.post_emb")]
        vanilla = gpt(type="vanilla").capture(same, "resid.post_emb")[location("resid.post_emb")]
        logits = gpt()(same)
    assert torch.equal(factor, factor[:, :1].expand_as(factor))
    assert not torch.allclose(vanilla, vanilla[:, :1].expand_as(vanilla))
    assert not torch.allclose(logits, logits[:, :1].expand_as(logits))  # but positions do count


def test_without_positions_nothing_tells_cells_apart() -> None:
    model = gpt()
    with torch.no_grad():
        model.pos_embed.zero_()
        logits = model(torch.full((1, 9), 3))
    assert_close(logits, logits[:, :1].expand_as(logits), 1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: BoardGPT()(BOARDS),
            r"expected boards as whole numbers \[b, 64\], found .*\[3, 9\]",
        ),
        (lambda: gpt()(BOARDS + 5), "tokens must lie in 0 to 6"),
        (
            lambda: GPTSizes(type=cast(Any, "fctor")),
            "type: expected one of factor, vanilla, found 'fctor'. Did you mean 'factor'",
        ),
        (lambda: GPTSizes(width=7), "width 7 is not divisible by n_heads 2"),
        (lambda: gpt()(BOARDS, LEAHooks()), "must be a TransformerHooks tree"),
        (lambda: lea()(BOARDS, TransformerHooks()), "must be a LEAHooks tree"),
        (
            lambda: lea().predict_from_speech(torch.zeros(2, 4, dtype=torch.long)),
            r"\[b, 5\], found",
        ),
        (lambda: lea().predict_from_speech(torch.full((2, 5), 6)), "words must lie in 0 to 5"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises((InputError, HookError), match=message):
        call()


def test_hooks_for_layers_that_are_not_there_are_refused() -> None:
    with pytest.raises(HookError, match="layer 5, which the model lacks"):
        gpt()(BOARDS, TransformerHooks().append_at("5/resid.torso.post_mlp", lambda x: x))
    hooks = LEAHooks()
    hooks.speech.append_at("5/cross.delta", lambda x: x)
    with pytest.raises(HookError, match="layer 5, which the model lacks"):
        lea()(BOARDS, hooks)


# --- LEA ---


def test_the_three_passes_are_what_their_names_say() -> None:
    model = lea()
    with torch.no_grad():
        output = model(BOARDS)
        assert output.quantised is not None
        words = model.sentence(BOARDS)
        assert torch.equal(words, output.quantised.words)
        assert_close(model.predict_from_board(BOARDS), output.from_board, 1e-12)
        assert_close(model.predict_from_speech(words), output.from_words, 1e-12)
        silent = model(BOARDS, speak=False)
    assert silent.from_words is None
    assert_close(silent.from_board, output.from_board, 1e-12)
    # drawing from words reads nothing of the board
    other = model.predict_from_speech(words.roll(1, 0))
    assert_close(other, model.predict_from_speech(words).roll(1, 0), 1e-12)


@pytest.mark.parametrize("kind", ["factor", "vanilla"])
def test_hooks_of_all_passes_see_and_change(kind: str) -> None:
    model = lea(type=kind)
    for name in ("from_board", "speech", "from_words"):
        for path in ("cross.delta", "cross.probs", "resid.torso.post_mlp"):
            hooks = LEAHooks()
            tree = getattr(hooks, name)
            seen: dict[str, Tensor] = {}
            tree.append_at(f"1/{path}", recorder(seen, path))
            with torch.no_grad():
                same = model(BOARDS, hooks)
                plain = model(BOARDS)
            assert seen[path].shape[0] == 3, (name, path)
            assert_close(same.from_words, plain.from_words, 1e-12)
            hooks = LEAHooks()
            getattr(hooks, name).append_at(f"0/{path}", lambda x: x * 3)
            with torch.no_grad():
                changed = model(BOARDS, hooks)
            told = {"from_board": "from_board", "speech": "speech", "from_words": "from_words"}[
                name
            ]
            assert not torch.allclose(getattr(changed, told), getattr(plain, told)), (name, path)


@pytest.mark.parametrize("name", ["from_board", "speech", "from_words"])
def test_hooks_see_each_board_also_where_all_boards_share_a_stream(name: str) -> None:
    model, hooks, seen = lea(), LEAHooks(), dict[str, Tensor]()
    paths = ("resid.post_emb", "0/resid.torso.post_attn", "0/cross.post_ln_source")
    for path in paths:
        getattr(hooks, name).append_at(path, recorder(seen, path))
    with torch.no_grad():
        model(BOARDS, hooks)
    assert [len(seen[path]) for path in paths] == [3, 3, 3]


def test_the_words_can_be_changed_by_a_hook() -> None:
    model = lea()
    code = model.quantiser.codebook[2].detach()

    def say_two(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 4] = code
        return x

    hooks = LEAHooks()
    hooks.words.append_fwd(say_two)
    with torch.no_grad():
        words = model.sentence(BOARDS)
        edited = words.clone()
        edited[:, 4] = 2
        expected = model.predict_from_speech(edited)
        assert_close(model.predict_from_speech(words, hooks), expected, 1e-12)


def test_hooks_of_cross_attention_choose_layers() -> None:
    hooks, seen = StreamHooks(), list[Tensor]()
    hooks.cross.probs.append_fwd(AtLayers(1).append(keep_in(seen)))
    tree = LEAHooks()
    tree.speech = hooks
    with torch.no_grad():
        lea()(BOARDS, tree)
    (pattern,) = seen
    assert pattern.shape == (3, 5, 9, 2)  # boards, words that ask, cells that answer, heads
    assert_close(pattern.sum(2), torch.ones(3, 5, 2), 1e-12)


def test_in_vanilla_models_positions_are_added_once() -> None:
    model = lea(type="vanilla")
    assert model.cell_codes.shape == (9, 8)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.predict_from_board(BOARDS)[:, order]
        model.cell_codes.copy_(model.cell_codes[order].clone())
        assert_close(model.predict_from_board(BOARDS[:, order]), expected, 1e-12)


# --- the quantiser ---


def test_straight_through_gradient_and_losses_equal_their_formulas() -> None:
    torch.manual_seed(0)
    for ema in (True, False):
        quantiser = VectorQuantiser(6, 4, ema).double()
        x = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
        found = quantiser(x)
        codes = quantiser.codebook.detach()
        apart = torch.cdist(x.detach(), codes.expand(3, -1, -1))
        assert torch.equal(found.words, apart.argmin(-1))
        chosen = codes[found.words]
        assert_close(found.vectors, chosen, 1e-12)
        usage = torch.bincount(found.words.flatten(), minlength=6) / 15
        mean_square = (x.detach() - chosen).square().mean()
        expected = COMMITMENT * mean_square + USAGE * (usage - 1 / 6).square().mean()
        assert_close(found.loss, expected + (0 if ema else mean_square), 1e-12)
        weight = torch.randn(3, 5, 4, dtype=torch.float64)
        ((found.vectors * weight).sum() + found.loss).backward()
        # d codes / d x = 1, and the commitment loss draws x to its code
        right = weight + COMMITMENT * 2 * (x.detach() - chosen) / x.numel()
        assert_close(x.grad, right, 1e-12)
        if ema:
            assert quantiser.codebook.grad is None
            continue
        pull = torch.zeros_like(codes).index_add_(
            0, found.words.flatten(), (2 * (chosen - x.detach()) / x.numel()).flatten(0, 1)
        )
        assert_close(quantiser.codebook.grad, pull, 1e-12)


def test_moving_averages_equal_their_recomputation() -> None:
    torch.manual_seed(1)
    quantiser = VectorQuantiser(5, 3, True).double()
    assert torch.equal(quantiser.sums, quantiser.codebook)  # they start equal
    sums, counts = quantiser.codebook.detach().clone(), torch.ones(5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        x = torch.randn(2, 30, 3, dtype=torch.float64)
        words = quantiser.nearest(x)
        one_hot = F.one_hot(words.flatten(), 5).double()
        counts = 0.99 * counts + 0.01 * one_hot.sum(0)
        sums = 0.99 * sums + 0.01 * one_hot.T @ x.flatten(0, 1)
        quantiser.update(x, words, generator)
        assert_close(quantiser.codebook, sums / counts[:, None], 1e-12, str(step))


def test_dead_codes_are_revived_and_none_explodes() -> None:
    torch.manual_seed(2)
    quantiser = VectorQuantiser(8, 3, True)
    with torch.no_grad():
        quantiser.codebook[4:] += 1000.0
        quantiser.sums.copy_(quantiser.codebook)
    generator = torch.Generator().manual_seed(0)
    last = quantiser.codebook[-1].clone()
    for _ in range(600):
        x = torch.randn(1, 64, 3)
        quantiser.update(x, quantiser.nearest(x), generator)
    norms = quantiser.codebook.norm(dim=1)
    assert norms[:-1].max() < 10  # moved to where the vectors are
    assert_close(quantiser.codebook[-1], last, 1e-4)  # the blank word stays
    x = torch.randn(1, 4000, 3)
    assert len(quantiser.nearest(x).unique()) == 7


def test_a_forward_pass_does_not_teach_the_codebook() -> None:
    model = lea()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(BOARDS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- files ---


@pytest.mark.parametrize("make", [BoardGPT, LEA])
def test_saved_models_come_back(make: type[BoardGPT] | type[LEA], tmp_path: Path) -> None:
    model, dataset = make(), BoardDataset(BoardConfig(n_roots=2, n_backgrounds=2))
    save_model(model, tmp_path / "m", dataset, {"training": {"epochs": 1}})
    stored = load_model(tmp_path / "m")
    assert stored.dataset.checksum == dataset.checksum
    assert stored.config["training"] == {"epochs": 1}
    for name, value in stored.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    half = tmp_path / "half"
    save_model(model, half, dataset, {}, dtype=torch.float16)
    assert sum(path.stat().st_size for path in half.rglob("*") if path.is_file()) < 1_000_000
    assert load_model(half).model.dtype == torch.float32


def test_the_other_architecture_and_misfits_are_refused(tmp_path: Path) -> None:
    dataset = BoardDataset(BoardConfig(n_roots=2, n_backgrounds=2))
    save_model(BoardGPT(), tmp_path / "m", dataset, {})
    with pytest.raises(
        CheckpointError, match=r"expected a model of kind 'board_lea', found .*'board_gpt'"
    ):
        load_model(tmp_path / "m", "board_lea")
    save_model(BoardGPT(GPTSizes(width=32)), tmp_path / "n", dataset, {})
    (tmp_path / "n" / "model.safetensors").rename(tmp_path / "m" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"does not fit a board_gpt: blocks.0.fc.*found \(128"
    ):
        load_model(tmp_path / "m")
    other = BoardDataset(BoardConfig(n_roots=4))
    save_model(BoardGPT(), tmp_path / "o", other, {})
    (tmp_path / "n" / "boards" / "config.json").unlink()
    for file in (tmp_path / "o" / "boards").iterdir():
        file.rename(tmp_path / "n" / "boards" / file.name)
    save_model(BoardGPT(GPTSizes(width=32)), tmp_path / "p", dataset, {})
    (tmp_path / "p" / "model.safetensors").rename(tmp_path / "n" / "model.safetensors")
    with pytest.raises(CheckpointError, match="was trained on boards of checksum"):
        load_model(tmp_path / "n")


def test_sites_are_told_once() -> None:
    paths = [site.path for site in BOARD_SITES]
    assert len(set(paths)) == len(paths)
    assert set(SITES) <= set(paths)
    assert np.all([site.what for site in BOARD_SITES])
