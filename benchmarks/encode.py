"""Applying autoencoders: dense ReLU latents, and TopK encoded and decoded.

The GEMM floor is the one matrix product that a float32 encoder must compute, by the fastest kernel
available; the bfloat16 product is what a certified search must compute. ``--peers`` adds other libraries.
Ratios refer to SAELens if it takes part, else to the floor. Extra peak memory is that of a warm call and
includes the result.
"""

from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import Setup

FLOOR = Contestant("one product", "encode_floor", "float32")
FLOOR_BFLOAT16 = Contestant("one product, bfloat16", "encode_floor", "bfloat16")
OURS = Contestant("neuron_explainer", "encode_ours")
FLOAT32 = Contestant("neuron_explainer, float32", "encode_ours", "float32")
CERTIFIED = Contestant("neuron_explainer, certified", "encode_ours", "certified")
ORIGINAL = Contestant("the original's formula", "encode_plain", "original")
TOPK_FILES = ("native", "saelens", "dictionary_learning", "sparsify")
RELU_FILES = ("native", "saelens", "dictionary_learning")
"""Formats of files whose autoencoders must be as fast as the one that was made here."""
PLAIN = Contestant("plain torch", "encode_plain", "plain")
CHUNKED = Contestant("plain torch, in chunks", "encode_plain", "plain")


def _peer(name: str, module: str, distribution: str) -> Contestant:
    return Contestant(name, module, peer=distribution, distribution=distribution, optional=True)


SAE_LENS = _peer("SAELens", "encode_sae_lens", "sae-lens")
LEARNING = _peer("dictionary_learning", "encode_dictionary_learning", "dictionary-learning")
SPARSIFY = _peer("sparsify", "encode_sparsify", "eai-sparsify")
K = 32


def _loaded(file: str, variant: str = "") -> Contestant:
    return Contestant(f"neuron_explainer, loaded from {file}", "encode_ours", variant)


def races(setup: Setup) -> list[Race]:
    """ReLU, and TopK."""
    tokens, width, latents = (300, 64, 4096) if setup.quick else (4096, 768, 32768)
    size = {"tokens": tokens, "width": width, "latents": latents}
    title = f"{latents} latents, {tokens} tokens of width {width}"
    relu = [OURS, SAE_LENS, LEARNING, ORIGINAL, PLAIN]
    topk = [FLOAT32, CERTIFIED, SAE_LENS, LEARNING, SPARSIFY, ORIGINAL, CHUNKED]
    floor = Entry(FLOOR, "product", size)
    reference = SAE_LENS.name if "sae-lens" in setup.pythons else FLOOR.name
    return [
        Race(
            f"ReLU encode, {title}",
            [
                floor,
                *(Entry(c, "relu_encode", size) for c in relu),
                *(Entry(_loaded(f), "relu_encode", {**size, "file": f}) for f in RELU_FILES),
            ],
            reference,
        ),
        Race(
            f"TopK encode and decode, {title}, k = {K}",
            [
                floor,
                Entry(FLOOR_BFLOAT16, "product", size),
                *(Entry(c, "topk_reconstruct", {**size, "k": K}) for c in topk),
                *(
                    Entry(_loaded(f, "float32"), "topk_reconstruct", {**size, "k": K, "file": f})
                    for f in TOPK_FILES
                ),
            ],
            reference,
        ),
    ]
