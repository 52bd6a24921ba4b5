"""SAEDashboard's runner, with its default settings, on some of the latents of one dictionary."""

import contextlib
import importlib
import logging
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contestants.encoding import directions
from benchmarks.workloads import Prepared

lens: Any = importlib.import_module("sae_lens")
saes: Any = importlib.import_module("sae_lens.saes")
runner: Any = importlib.import_module("sae_dashboard.sae_vis_runner")
data: Any = importlib.import_module("sae_dashboard.sae_vis_data")
tokenizers: Any = importlib.import_module("tokenizers")
transformers: Any = importlib.import_module("transformers")
transformers.logging.set_verbosity_error()
logging.disable(logging.WARNING)


@cache
def model_of(folder: str) -> Any:
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    # It takes only names that it knows; from here, the name is that of the folder.
    with contextlib.chdir(Path(folder).parent):
        return lens.HookedSAETransformer.from_pretrained_no_processing(
            Path(folder).name, hf_model=theirs, device="cpu", tokenizer=_tokenizer()
        ).eval()


def _tokenizer() -> Any:
    """The model has none, and one is asked for."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"x": 0}, unk_token="x"))
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="x", eos_token="x", pad_token="x"
    )
    folder = tempfile.mkdtemp()  # it is read again, with other settings
    made.save_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def some(
    folder: str,
    tokens: list[list[int]],
    batch: int,
    latents: int,
    k: int,
    layers: list[int],
    few: int,
) -> Prepared:
    """The first ``few`` latents. For each ``few`` more the runner does the same again, passes included."""
    model, ids = model_of(folder), torch.tensor([[0, *row] for row in tokens])
    hook = f"blocks.{layers[0]}.hook_resid_post"
    x = model.run_with_cache(ids[:8, 1:], names_filter=hook)[1][hook]
    settings = saes.TopKSAEConfig(
        d_in=x.shape[-1],
        d_sae=latents,
        k=k,
        apply_b_dec_to_input=True,
        rescale_acts_by_decoder_norm=True,  # without, the runner refuses; the rows have norm 1
        device="cpu",
    )
    settings.metadata.hook_name = hook
    sae = saes.TopKSAE(settings).eval()
    rows = directions(latents, x.shape[-1])
    for name, value in (
        ("W_enc", rows.t()),
        ("W_dec", rows),
        ("b_enc", torch.zeros(latents)),
        ("b_dec", x.mean((0, 1))),
    ):
        getattr(sae, name).data.copy_(value)

    config = data.SaeVisConfig(
        hook_point=hook,
        features=list(range(few)),
        minibatch_size_features=few,
        minibatch_size_tokens=batch,
        device="cpu",
    )

    def work() -> dict[str, Tensor]:
        runner.SaeVisRunner(config).run(encoder=sae, model=model, tokens=ids)
        return {}

    work()
    began = time.perf_counter()
    work()
    total = (time.perf_counter() - began) * latents / few
    return Prepared(work, f"{total:.0f} s for all {latents}")
