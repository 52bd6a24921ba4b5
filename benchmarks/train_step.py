"""One step of dictionary learning: loss, gradients, clipping, optimiser, norm of the decoder.

Each library runs its own trainer on the same activations, starting from the same weights. The reference
is the least that a TopK step must do: one matrix product and the search for the largest values; for ReLU
it is the five products. Each contestant takes steps for three seconds before one is timed, because
training is a long row of steps.
"""

from benchmarks.encode import TOPK_FILES
from benchmarks.harness import Contestant, Entry, Race
from benchmarks.workloads import Setup

FLOOR = Contestant("one product + top-k", "train_floor", "ours")
FLOOR_TORCH = Contestant("one product + torch.topk", "train_floor", "torch")
FLOOR_PLAIN = Contestant("torch.mm + torch.topk", "train_floor", "plain")
PRODUCTS = Contestant("five products", "train_floor")
FLOAT32 = Contestant("neuron_explainer, float32", "train_ours", "float32")
CERTIFIED = Contestant("neuron_explainer, certified", "train_ours", "certified")
FINETUNE = Contestant("neuron_explainer, made here", "finetune_ours")
OURS = Contestant("neuron_explainer", "train_ours")


def _peer(name: str, module: str, distribution: str, variant: str = "") -> Contestant:
    return Contestant(
        name, module, variant, peer=distribution, distribution=distribution, optional=True
    )


SAE_LENS = _peer("SAELens", "train_sae_lens", "sae-lens", "dense")
SAE_LENS_SPARSE = _peer("SAELens, sparse", "train_sae_lens", "sae-lens", "sparse")
SAE_LENS_RELU = _peer("SAELens", "train_sae_lens", "sae-lens")
LEARNING = _peer("dictionary_learning", "train_dictionary_learning", "dictionary-learning")
SPARSIFY = _peer("sparsify", "train_sparsify", "eai-sparsify")

TOPK = [
    *(FLOOR, FLOOR_TORCH, FLOOR_PLAIN),
    *(FLOAT32, CERTIFIED, SAE_LENS, SAE_LENS_SPARSE, LEARNING, SPARSIFY),
]
K = 32
WARM = 3.0


def races(setup: Setup) -> list[Race]:
    """TopK at two sizes, TopK with dead latents, ReLU + L1, and fine-tuning."""
    tokens, width = (256, 64) if setup.quick else (4096, 768)
    sizes = (512, 1024) if setup.quick else (16384, 32768)
    work = {"tokens": tokens, "width": width}
    topk = [
        _topk(
            f"{latents} latents{', 5 % of them dead' if aux else ''}", aux, **work, latents=latents
        )
        for latents, aux in ((sizes[0], False), (sizes[1], False), (sizes[0], True))
    ]
    relu = {**work, "latents": sizes[0]}
    entries = [Entry(c, "relu_step", relu) for c in (OURS, SAE_LENS_RELU, LEARNING)]
    dense = [Entry(PRODUCTS, "five_products", {**work, "latents": n}) for n in sizes]
    return [
        *topk,
        Race(
            f"ReLU + L1, {sizes[0]} latents, {tokens} tokens of width {width}",
            [dense[0], *entries],
            PRODUCTS.name,
            grad=True,
            warm_s=WARM,
        ),
        _finetune({**work, "latents": sizes[0], "k": K}),
    ]


def _finetune(size: dict[str, int]) -> Race:
    loaded = {
        f: Contestant(f"neuron_explainer, loaded from {f}", "finetune_ours") for f in TOPK_FILES
    }
    return Race(
        f"One step of fine-tuning a TopK decoder, {size['latents']} latents, {size['tokens']} tokens of "
        f"width {size['width']}, k = {K}",
        [
            Entry(FINETUNE, "finetune", size),
            *(Entry(c, "finetune", {**size, "file": f}) for f, c in loaded.items()),
        ],
        FINETUNE.name,
        grad=True,
    )


def _topk(title: str, aux: bool, tokens: int, width: int, latents: int) -> Race:
    settings = {"tokens": tokens, "width": width, "latents": latents, "k": K, "aux": aux}
    return Race(
        f"TopK, {title}, {tokens} tokens of width {width}, k = {K}",
        [Entry(contestant, "topk_step", settings) for contestant in TOPK],
        FLOOR.name,
        grad=True,
        warm_s=WARM,
        remark="A ratio of 1.25 means 0.80 of the reference's rate.",
    )
