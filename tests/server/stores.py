"""Small stores of made-up content for the server's tests."""

from pathlib import Path

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.store_format import Label
from tests.analysis.examples import VOCABULARY, make_collected, make_corpus

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "'; DROP TABLE labels; --",
    "a\0b \x1b[2J \u2028 \u202e",
    '"quoted" NEAR( OR *',
    "{{constructor}} ${1}",
    "../../etc/passwd",
    "🜁 \u0000 \ufeff",
]
LABELS = [
    Label(1, "kings and queens of England", "published", 0.4),
    Label(2, "king", "published", 0.9),
    Label(3, "kingdoms", "published"),
]
N_UNITS = 8


def make_stores(folder: Path) -> Path:
    """A folder of three stores: latents of layers 1 and 2, and heads."""
    corpus = make_corpus(800)
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    for layer in (1, 2):
        collected = make_collected(
            corpus,
            N_UNITS,
            seed=layer,
            name=f"made-up/{layer}",
            location=f"{layer}/resid.torso.delta_mlp",
            provenance={"autoencoder_sha256": f"ab{layer}", "model": "made-up-model"},
        )
        labels = [*LABELS, *(Label(4, text, f"who{n}") for n, text in enumerate(HOSTILE))]
        ExampleStore.from_arrays(
            folder, collected, documents, VOCABULARY, labels=labels if layer == 2 else ()
        ).close()
    heads = make_collected(
        corpus, 4, kind="head", window=6, name="heads", location="1/attn.qk_probs", provenance={}
    )
    ExampleStore.from_arrays(folder, heads, documents, VOCABULARY).close()
    return folder
