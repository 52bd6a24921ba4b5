"""A batch as SAEDashboard writes it for Neuronpedia: what our reader must read and write again.

    python -m venv peer && peer/bin/pip install -r benchmarks/peers/sae-dashboard.txt
    peer/bin/python benchmarks/peers/make_dashboards.py

writes ``tests/fixtures/peers/sae-dashboard/batch-0.json``: features of a random autoencoder in a random
model of two layers, through the runner's and the converter's own code.
``make_dashboards.py FILE`` reads a batch that this library wrote instead, and prints what it found.
"""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "peers" / "sae-dashboard"
HOOK = "blocks.1.hook_resid_post"
WORDS = ["<|bos|>", " the", " king", "\n", "s", " é", '"', " 王", "<b>", "\\", " a", " of", " sea"]


def model_and_autoencoder() -> tuple[Any, Any]:
    lens, saes = import_module("transformer_lens"), import_module("sae_lens.saes")
    torch.manual_seed(0)
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=12, d_head=8, n_heads=2, d_vocab=len(WORDS), act_fn="gelu",
        d_mlp=32, seed=0, device="cpu",
    )  # fmt: skip
    settings = saes.StandardSAEConfig(d_in=16, d_sae=8, device="cpu")
    settings.metadata.hook_name = HOOK
    sae = saes.StandardSAE(settings)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) * 0.5)
    return lens.HookedTransformer(config).eval(), sae.eval()


def write() -> None:
    vis, runner = (import_module(f"sae_dashboard.sae_vis_{name}") for name in ("data", "runner"))
    layout = import_module("sae_dashboard.layout")
    components = import_module("sae_dashboard.components_config")
    pedia = "sae_dashboard.neuronpedia.neuronpedia"
    converter, configs = (
        import_module(f"{pedia}_{name}") for name in ("converter", "runner_config")
    )
    model, sae = model_and_autoencoder()
    tokens = torch.randint(1, len(WORDS), (32, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 0
    shown = layout.SaeVisLayoutConfig(
        columns=[
            layout.Column(
                components.SequencesConfig(
                    stack_mode="stack-all", buffer=None, compute_buffer=True, n_quantiles=3,
                    top_acts_group_size=3, quantile_group_size=2,
                ),
                components.ActsHistogramConfig(),
                components.LogitsHistogramConfig(),
                components.LogitsTableConfig(n_rows=4),
                components.FeatureTablesConfig(n_rows=3),
            )
        ]
    )  # fmt: skip
    settings = vis.SaeVisConfig(
        hook_point=HOOK, features=[0, 1, 5], feature_centric_layout=shown, device="cpu"
    )
    found = runner.SaeVisRunner(settings).run(encoder=sae, model=model, tokens=tokens)
    config = configs.NeuronpediaRunnerConfig(
        sae_set="res-test", sae_path="", outputs_dir="", n_prompts_total=32, n_tokens_in_prompt=12,
        huggingface_dataset_path="made-up/text", model_id="tiny", layer=1,
    )  # fmt: skip
    text = converter.NeuronpediaConverter.convert_to_np_json(
        model, found, config, dict(enumerate(WORDS))
    )
    FIXTURES.mkdir(parents=True, exist_ok=True)
    (FIXTURES / "batch-0.json").write_text(text, "utf-8")


def read(path: Path) -> None:
    dashboard = import_module("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    batch = dashboard.NeuronpediaDashboardBatch(**json.loads(path.read_text("utf-8")))
    for feature in batch.features:
        print(f"{batch.model_id} {feature.feature_index}: {len(feature.activations)} activations")


if __name__ == "__main__":
    read(Path(sys.argv[1])) if len(sys.argv) > 1 else write()
