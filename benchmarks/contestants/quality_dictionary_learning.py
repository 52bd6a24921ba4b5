"""dictionary_learning: ``trainSAE`` with ``normalize_activations``, as its README advises."""

import os
from typing import Any

from benchmarks.contestants.quality_runs import Run, serve

training: Any = __import__("dictionary_learning.training", fromlist=["*"])
top_k: Any = __import__("dictionary_learning.trainers.top_k", fromlist=["*"])
standard: Any = __import__("dictionary_learning.trainers.standard", fromlist=["*"])


def train(run: Run) -> None:
    common = {
        "steps": run.steps,
        "activation_dim": run.width,
        "dict_size": run.latents,
        "lr": run.lr,
        "warmup_steps": run.warmup,
        "decay_start": run.steps - run.decay,
        "seed": run.seed,
        "layer": 0,
        "lm_name": "",
        "device": "cpu",
    }
    own: dict[str, Any] = {"trainer": standard.StandardTrainer}
    if run.k:
        own = {"trainer": _topk_trainer(run.dead_after * run.batch), "k": run.k}
    else:
        # It scales activations to a mean squared norm of 1, and the penalty is linear in them.
        own["l1_penalty"] = run.l1 / run.width**0.5
        own["sparsity_warmup_steps"] = run.warmup
    training.trainSAE(
        run,
        [{**common, **own}],
        run.steps,
        save_dir=run.folder,
        normalize_activations=True,
        device="cpu",
    )
    for name in ("ae.pt", "config.json"):
        os.replace(f"{run.folder}/trainer_0/{name}", f"{run.folder}/{name}")


def _topk_trainer(dead_after: int) -> Any:
    """Its trainer, whose number of tokens after which a latent is dead is fixed otherwise."""

    def make(**settings: Any) -> Any:
        trainer = top_k.TopKTrainer(**settings)
        trainer.dead_feature_threshold = dead_after
        return trainer

    return make


if __name__ == "__main__":
    serve(train)
