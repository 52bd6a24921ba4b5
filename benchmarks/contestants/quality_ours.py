"""This library: :func:`~neuron_explainer.dictionaries.train` with its own defaults."""

from benchmarks.contestants.quality_runs import Run, serve
from neuron_explainer.dictionaries import ReLUConfig, TopKConfig, TrainConfig
from neuron_explainer.dictionaries import train as learn


def train(run: Run) -> None:
    config = TrainConfig(
        TopKConfig(k=run.k) if run.k else ReLUConfig(l1_coefficient=run.l1),
        n_latents=run.latents,
        steps=run.steps,
        batch_size=run.batch,
        lr=run.lr,
        warmup_steps=run.warmup,
        decay="linear",
        decay_steps=run.decay,
        sparsity_warmup_steps=run.warmup,
        dead_after_tokens=run.dead_after * run.batch,
        seed=run.seed,
    )
    learn(config, run, progress=False).save(run.folder, overwrite=True)


if __name__ == "__main__":
    serve(train)
