"""From text to a dictionary: harvest, train, measure, use. A real one takes millions of tokens."""

import torch

from neuron_explainer.activations import (
    Harvester,
    LiveSource,
    ShuffleBuffer,
    TokenWindows,
    start_token,
    tokenize,
)
from neuron_explainer.dictionaries import StepReport, TopKConfig, TrainConfig, train
from neuron_explainer.evaluation import evaluate
from neuron_explainer.evaluation.passage import PASSAGE
from neuron_explainer.models.model_context import ModelContext

LOCATION = "2/resid.torso.delta_mlp"
context = ModelContext.from_model_type("tiny-tales")

# Paragraphs are the documents here; read_documents("books/") reads files, a corpus too large for
# memory goes through write_token_file. Whole documents are set apart to measure on.
training, held_out = tokenize(PASSAGE.split("\n\n"), context).split(0.3)
bos = start_token(context)
windows = TokenWindows(training, 64, 4, bos=bos, epochs=None)
source = LiveSource(Harvester(context, LOCATION), windows)


def show(report: StepReport) -> None:
    """A callback: print the losses now and then."""
    if report.step % 10 == 0:
        losses = {name: f"{float(loss.total):.3f}" for name, loss in report.losses.items()}
        print(f"step {report.step}: {losses}")


config = TrainConfig(
    TopKConfig(k=16),
    n_latents=384,
    num_tokens=40 * 128,
    batch_size=128,
    lr=3e-3,
    location=LOCATION,
    model_name="tiny-tales",
)
with ShuffleBuffer(source, capacity=2048, batch_size=config.batch_size) as batches:
    autoencoder = train(config, batches, callbacks=[show], progress=False)

print(
    evaluate(context, autoencoder, TokenWindows(held_out, 64, 4, bos=bos), progress=False).table()
)

# What comes out is an ordinary autoencoder.
with torch.no_grad():
    x = context.get_or_create_model().capture(["The ferry left"], LOCATION)[LOCATION][0]
    print(autoencoder.encode_sparse(x).indices[-1].tolist())
