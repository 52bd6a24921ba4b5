"""How good autoencoders are: measured together, by our definitions and by those of other libraries."""

from neuron_explainer.activations import Harvester, TokenWindows, start_token, tokenize
from neuron_explainer.dictionaries import prune
from neuron_explainer.evaluation import evaluate_all, evaluation_table
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context

context = ModelContext.from_model_type("tiny-tales")
windows = TokenWindows(tokenize(PASSAGE.split("\n\n"), context), 64, 4, bos=start_token(context))
known = make_autoencoder_context("tiny-tales", "ae-resid-delta-mlp", device=context.device)
published = known.get_autoencoder(2)

# A smaller one without the latents that do almost nothing on this text; the others keep their indices.
harvester = Harvester(context, published.location)
activations = [harvester(batch).activations[published.location] for batch in windows]
pruning = prune(published, activations, min_max_activation=2.0)
print(f"kept {pruning.n_kept} of {published.n_latents} latents")

# Both are spliced into the same forward passes.
found = evaluate_all(
    context,
    {"published": published, "pruned": pruning.autoencoder},
    windows,
    compat=["saelens_legacy", "sparsify"],
    progress=False,
)
print(evaluation_table(found))
for library, figures in found["published"].compat.items():
    print(library, {name: round(value, 4) for name, value in figures.items()})
