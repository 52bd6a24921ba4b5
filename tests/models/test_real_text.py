"""Real prose through the embedded model: what holds for random tokens holds for books."""

from pathlib import Path

import pytest
import torch

from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES
from neuron_explainer.models.transformer import Transformer

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    if not CORPUS.is_dir():
        pytest.skip("no corpus beside the repository")
    text = (CORPUS / "the_wind_in_the_willows.txt").read_text("utf-8")
    long = [p.strip() for p in text.split("\n\n") if len(p.strip()) > 80]
    return [p[: 60 + 90 * i] for i, p in enumerate(long[40:46])]  # of very unequal length


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.load("tiny-tales", device="cpu", dtype=torch.float32)


def test_text_survives_the_tokenizer(paragraphs: list[str], model: Transformer) -> None:
    for text in paragraphs:
        assert model.enc.decode(model.enc.encode(text)) == text


@torch.no_grad()
def test_each_paragraph_is_its_solo_run(paragraphs: list[str], model: Transformer) -> None:
    hooks = TransformerHooks().append_at("1/mlp.post_act", lambda x: x.clamp(max=1))
    sites = [path for path, site in SITES.items() if site.shape[:2] == ("b", "s")]
    together = model.capture(paragraphs, sites, hooks=hooks)
    for row, text in enumerate(paragraphs):
        alone = model.capture(text, sites, hooks=hooks)
        n = alone.tokens.shape[1]
        for place, value in alone.items():
            difference = (together[place][row, :n] - value[0]).abs().max()
            assert difference <= 1e-4 * value.abs().max().clamp(min=1), str(place)
    greedy = model.sample(paragraphs, 8, temperature=0)["strings"]
    assert greedy == [model.sample(text, 8, temperature=0)["strings"][0] for text in paragraphs]


@torch.no_grad()
def test_fused_equals_explicit(paragraphs: list[str], model: Transformer) -> None:
    explicit = TransformerHooks()
    for path in ("attn.qk_logits", "resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale"):
        explicit.append_at(path, lambda x: x)
    tokens = torch.tensor(model.prompt_ids(paragraphs[-1]))
    fused, _ = model(tokens)
    torch.testing.assert_close(model(tokens, hooks=explicit)[0], fused, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_model_has_learnt_to_read(paragraphs: list[str], model: Transformer) -> None:
    """A book it has never seen: far better than the 12 bits of a guess among 4,096 tokens."""
    bits = []
    for text in paragraphs:
        tokens = torch.tensor(model.prompt_ids(text, bos=True))
        logits, _ = model(tokens)
        chosen = logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
        bits.append(float(-chosen.sum()) / 0.6931 / len(text.encode()))
    assert sum(bits) / len(bits) < 2.2  # bits a byte; short passages without context
