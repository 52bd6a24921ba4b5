"""Transformer factors: one dictionary for the residual stream of all layers, learned by sparse coding."""

from neuron_explainer.activations import (
    Harvester,
    LiveSource,
    TokenWindows,
    start_token,
    tokenize,
)
from neuron_explainer.analysis.factors import (
    FactorDictionary,
    Sentences,
    collect_examples,
    importance,
)
from neuron_explainer.dictionaries.sparse_coding import (
    SparseCodingConfig,
    count_tokens,
    train_sparse_coding,
)
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.model_context import ModelContext

context = ModelContext.from_model_type("tiny-tales")
windows = TokenWindows(tokenize(PASSAGE.split("\n\n"), context), 64, 4)
harvester = Harvester(context, "resid.torso.post_mlp")  # every layer

# FISTA finds codes that are never negative; a larger penalty makes them fewer and smaller.
config = SparseCodingConfig(n_latents=128, penalty=5.0, step_size=0.05, tolerance=1e-2)
((location, dictionary),) = train_sparse_coding(
    config,
    LiveSource(harvester, windows),
    token_counts=count_tokens(windows, context.n_vocab),  # frequent tokens count less
    model_name="tiny-tales",
    progress=False,
).items()
facts = dictionary.metadata
print(f"{location}: SNR {facts['snr']:.1f}, L0 {facts['l0']:.1f}, {facts['rows']} vectors")

# Where each factor is strong: its strongest tokens in each layer, and the mean of their scores.
sentences = Sentences.cut(windows.corpus, 32, start_token(context))
factors = FactorDictionary(dictionary, harvester.locations)
examples = collect_examples(context, {"all layers": factors}, sentences, n_examples=20)[
    "all layers"
]
curves = importance(examples)
for factor in curves.strongest(5):
    place = curves.locations[curves.peak[factor]]
    words = [each["word"] for each in examples.records(factor, place, context, 5)]
    print(f"factor {factor} ({curves.levels[factor]}): {curves.values[factor].round(1)} {words}")
