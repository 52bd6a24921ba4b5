"""SAELens: ``fit`` of its ``SAETrainer``, with activations scaled to a mean norm of √d."""

from itertools import chain, islice
from typing import Any

from benchmarks.contestants.quality_runs import Run, serve

saes: Any = __import__("sae_lens.saes", fromlist=["*"])
config: Any = __import__("sae_lens.config", fromlist=["*"])
trainers: Any = __import__("sae_lens.training.sae_trainer", fromlist=["*"])

SCALE_BATCHES = 100


def train(run: Run) -> None:
    common = {
        "d_in": run.width,
        "d_sae": run.latents,
        "normalize_activations": "expected_average_only_in",
    }
    if run.k:
        sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(k=run.k, **common))
    else:
        settings = {"l1_coefficient": run.l1, "l1_warm_up_steps": run.warmup, **common}
        sae = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**settings))
    n_scale = min(SCALE_BATCHES, run.steps)
    trainer = trainers.SAETrainer(
        config.SAETrainerConfig(
            total_training_samples=run.steps * run.batch,
            train_batch_size_samples=run.batch,
            lr=run.lr,
            lr_end=run.lr / 10,  # its runner's default; of no effect where the rate is constant
            lr_warm_up_steps=run.warmup,
            lr_decay_steps=run.decay,
            dead_feature_window=run.dead_after,
            n_batches_for_norm_estimate=n_scale,
        ),
        sae,
        chain(islice(run, n_scale), run),  # those for the scale it would not train on otherwise
    )
    trainer.fit().save_inference_model(run.folder)


if __name__ == "__main__":
    serve(train)
