"""Dump what the library computes, and compare two dumps bit for bit.

    python benchmarks/number_dump.py dump new.safetensors
    PYTHONPATH=../old python benchmarks/number_dump.py dump old.safetensors    # another commit's checkout
    python benchmarks/number_dump.py compare old.safetensors new.safetensors

Run it as a script, so that ``PYTHONPATH`` decides which checkout is imported. A refactoring must leave
the two dumps equal. It uses public import paths and the command line, one CPU thread and no network. The
name of each tensor begins with its section. A section that fails is reported; the others are still dumped.
"""

import argparse
import contextlib
import fnmatch
import importlib
import io
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuron_explainer import cli, dictionaries
from neuron_explainer.activations import TokenWindows, tokenize
from neuron_explainer.dictionaries.sparse_coding import SparseCodingConfig, train_sparse_coding
from neuron_explainer.models.autoencoder import Autoencoder
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.locations import SITES, ActivationLocation
from neuron_explainer.models.model_context import ModelContext
from neuron_explainer.models.model_registry import make_autoencoder_context
from neuron_explainer.models.transformer import Transformer

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures" / "peers"
PROMPTS = ["The king gave his daughter a golden", "Once upon a time there was a poor old fisherman"]
TEXT = " ".join(
    f"The {who} went to the {where} and said: I have seen {what}, and I shall not sleep till I know more."
    for who in ("king", "miller", "old woman", "youngest brother", "wolf")
    for where in ("forest", "sea", "great hall", "mountain")
    for what in ("a golden bird", "the ship", "your sister's ring")
)
SHIPPED = {
    "ae-mlp-post-act": "mlp.post_act",
    "ae-resid-delta-attn": "resid.torso.delta_attn",
    "ae-resid-delta-mlp": "resid.torso.delta_mlp",
}
COMMANDS = """
harvest books --location 2/resid.torso.delta_mlp --out acts --buffer-tokens 4096
train acts --steps 12 --batch-size 64 --n-latents 256 --k 8 --lr 3e-3 --out run
evaluate run --compat openai sparsify
prune run/autoencoder --out pruned
finetune pruned --batch-size 64 --out finetuned
evaluate finetuned
train books --location 1/mlp.post_act --steps 8 --batch-size 64 --n-latents 128 --k 8 --out live
sentences s.csv --autoencoder run
latents Kings --layer 2
ablate Kings --location 2/mlp.post_act
sample Kings --seed 0 --num-tokens 20
"""
Named = Iterator[tuple[str, Any]]


def first_of(name: str, *modules: str) -> Any:
    """``name`` from the first of these modules that this checkout has: it has moved between commits."""
    for module in modules:
        path, _, owner = module.partition(":")
        with contextlib.suppress(ModuleNotFoundError, AttributeError):
            found = importlib.import_module(f"neuron_explainer.{path}")
            return getattr(getattr(found, owner) if owner else found, name)
    raise ImportError(f"{name} is in none of {', '.join(modules)}.")


def under(prefix: str, named: Any) -> Named:
    """The same with a longer name."""
    yield from ((f"{prefix}/{name}", value) for name, value in named)


def model(dtype: torch.dtype = torch.float32) -> Transformer:
    return Transformer.load("tiny-tales", dtype=dtype, device="cpu")


def shipped(**settings: Any) -> Iterator[tuple[str, Autoencoder]]:
    """Every autoencoder in the package, by location."""
    for name, location in SHIPPED.items():
        found = make_autoencoder_context("tiny-tales", name, device="cpu", **settings)
        yield from ((f"{layer}/{location}", found.get_autoencoder(layer)) for layer in range(4))


def activations() -> dict[str, Tensor]:
    """``[t, n]`` of a text at every location that has autoencoders."""
    with torch.no_grad():
        found = model().capture([TEXT[:900]], list(SHIPPED.values()))
    return {str(location): value[0] for location, value in found.items()}


# ---- sections ------------------------------------------------------------------------------------


def dump_model() -> Named:
    """Logits with and without cache, captures and gradients at every site, samples."""
    xf = model()
    tokens, state = torch.tensor([xf.enc.encode(TEXT)[:48]]), None
    yield "logits", xf(tokens)[0]
    for start, end in ((0, 30), (30, 31), (31, 48)):
        logits, state = xf(tokens[:, start:end], state)
        yield f"cached/{start}", logits
    yield from under("capture", xf.capture(PROMPTS, list(SITES)).items())
    gradients: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., Tensor]:
        def hook(grad: Tensor, layer: int | None = None) -> Tensor:
            gradients[f"{path}/{layer}"] = grad.clone()
            return grad

        return hook

    hooks = TransformerHooks()
    for path in SITES:
        node: Any = hooks
        for part in path.split("."):
            node = getattr(node, part)
        node.append_bwd(keep(path))
    xf(tokens[:, :16], hooks=hooks)[0].log_softmax(-1)[..., 5].sum().backward()
    yield from under("gradient", gradients.items())
    yield from under("gradient", ((name, p.grad) for name, p in xf.named_parameters()))
    for prompts in (PROMPTS[:1], PROMPTS):
        greedy = xf.sample(prompts, num_tokens=40, temperature=0)
        nucleus = xf.sample(prompts, num_tokens=40, top_p=0.8, seed=3)
        yield f"greedy/{len(prompts)}", greedy["tokens"]
        yield f"nucleus/{len(prompts)}", nucleus["tokens"]
    yield "simplified", model().simplify()(tokens)[0]


def answers(ae: Autoencoder, x: Tensor) -> Named:
    """Everything that an autoencoder says about ``[t, n]``, with gradients and without."""
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            rows = x.clone().requires_grad_(grad)
            sparse = ae.encode_sparse(rows)
            found = ae(rows)._asdict() | {"sparse/values": sparse.values}
            found |= {"sparse/indices": sparse.indices, "encode": ae.encode(rows)}
            yield from under(f"grad={grad}", found.items())
            yield f"grad={grad}/reconstruct", ae.reconstruct(rows)
    rows = x.clone().requires_grad_(True)
    ae.requires_grad_(True)
    ae(rows).recons.square().sum().backward()
    of_vectors = [(name, p.grad) for name, p in ae.named_parameters() if p.ndim == 1]
    yield from under(
        "gradient", [(n, g) for n, g in [("x", rows.grad), *of_vectors] if g is not None]
    )


def dump_autoencoders() -> Named:
    """The shipped ones on real activations, whole and without their dead latents."""
    x = activations()
    for location, ae in shipped():
        yield from under(location, answers(ae, x[location][:20]))
        with torch.no_grad():
            yield f"{location}/many", ae.encode_sparse(x[location].repeat(6, 1)).values
    for location, ae in shipped(omit_dead_latents=True):
        yield f"{location}/without_dead", ae.reconstruct(x[location][:20])


def dump_formats() -> Named:
    """Every format that is read, and what it becomes in every format that is written."""
    for place in sorted(FIXTURES.glob("*/*/expected.json")):
        name = str(place.parent.relative_to(FIXTURES))
        stated = json.loads(place.read_text())["load_args"]
        saved = place.parent / "saved"
        source = saved if any(saved.glob("c*f*g.json")) else next(saved.iterdir())
        x = load_file(place.with_name("expected.safetensors"))["x"]
        yield from under(name, answers(Autoencoder.load(source, **stated), x))
        options = [f"--{key.replace('_', '-')}={value}" for key, value in stated.items()]
        for written in ("native", "saelens", "dictionary_learning", "sparsify"):
            with tempfile.TemporaryDirectory() as scratch:
                target = f"{scratch}/{written}"
                code, _ = command("convert", str(source), target, "--format", written, *options)
                yield f"{name}/{written}/exit", code
                if code == 0:
                    yield f"{name}/{written}/recons", Autoencoder.load(target).reconstruct(x)


@torch.no_grad()
def dump_splice() -> Named:
    """Passes with one activation replaced, and with autoencoders spliced in."""
    xf = model()
    tokens = torch.tensor([xf.enc.encode(TEXT)[:40]])
    texts = ["resid.post_emb", *(f"{i}/{path}" for i in (0, 3) for path in SHIPPED.values())]
    places = [ActivationLocation.parse(text) for text in texts]
    kind = first_of("SplicedPasses", "evaluation.spliced_passes", "dictionaries.splice")
    passes = kind(xf, tokens, None, places)
    for place in places:
        yield f"replaced/{place}", passes.replaced(place, 0.5 * passes.activation(place))
    for name in SHIPPED:
        found = make_autoencoder_context("tiny-tales", name, device="cpu")
        for add_error in (False, True):
            yield f"{name}/{add_error}", xf(tokens, hooks=found.hooks(add_error=add_error))[0]


def dump_training() -> Named:
    """Ten steps of every objective and of its variants, and sparse coding."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.normalize(torch.randn(96, 24, generator=generator), dim=1)
    fire = torch.rand(640, 96, generator=generator) < 0.06
    data = (torch.rand(640, 96, generator=generator) * fire) @ basis + 0.3
    topk, relu = dictionaries.TopKConfig(k=6), dictionaries.ReLUConfig()
    runs: dict[str, tuple[Any, dict[str, Any]]] = {
        "tied": (topk, {"tied": True, "decoder_norm": "free"}),
        "transcoder": (topk, {"transcoder": True, "skip": True}),
        "multi": (dictionaries.TopKConfig(k=6, multi_k=12), {}),
        "float64": (topk, {"dtype": "float64", "grad_clip": 1.0}),
        "resample": (relu, {"remedy": "resample", "dead_after_tokens": 64, "resample_every": 4}),
        "ghost": (relu, {"remedy": "ghost", "dead_after_tokens": 64}),
    }
    runs |= {
        f"input-{kind}": (topk, {"input_normalization": kind})
        for kind in ("center", "layer_norm", "rms")
    }
    runs |= {f"{n}TopK": (getattr(dictionaries, f"{n}TopKConfig")(k=6), {}) for n in ("", "Batch")}
    runs["Matryoshka"] = dictionaries.MatryoshkaConfig(k=6), {}
    for name in ("ReLU", "PAnneal", "Gated", "JumpReLU"):
        runs[name] = getattr(dictionaries, f"{name}Config")(), {}
    for name, (objective, settings) in runs.items():
        config = dictionaries.TrainConfig(
            objective, n_latents=96, steps=10, batch_size=64, lr=3e-3, **settings
        )
        batches: Any = data
        if config.transcoder:
            batches = [(part, part.roll(1, 1)) for part in data.split(64)]
        state = dictionaries.train(config, batches, progress=False).state_dict()
        yield from under(
            name, ((key, value) for key, value in state.items() if torch.is_tensor(value))
        )
    for solver in ("fista", "ista"):
        settings = {"step_size": 0.05, "solver": solver, "max_iterations": 100}
        coding = SparseCodingConfig(48, 0.1, batch_size=64, **settings)
        coded = train_sparse_coding(coding, list(data.split(160)), progress=False)
        yield from under(
            solver, [("weights", coded.encoder.weight), ("codes", coded.encode(data[:20]))]
        )


def dump_evaluation() -> Named:
    """The figures of ``evaluate_all``, those of peers, and of ``verify``."""
    context = ModelContext.from_model_type("tiny-tales", device="cpu")
    windows = TokenWindows(tokenize(TEXT.split(": "), context), 32, 4, bos=4095)
    peers = ["saelens_legacy", "dictionary_learning", "sparsify", "openai"]
    evaluate_all = first_of("evaluate_all", "evaluation", "dictionaries")
    for name, found in evaluate_all(
        context, dict(shipped()), windows, compat=peers, progress=False
    ).items():
        yield from under(name, flat(found.to_dict()))
    verify = first_of(
        "verify", "evaluation.verify", "models.autoencoder_context:AutoencoderContext"
    )
    for name in SHIPPED:
        autoencoders = make_autoencoder_context("tiny-tales", name, device="cpu")
        for layer, measured in verify(autoencoders, context).items():
            yield f"{name}/{layer}", [measured.fvu, measured.l0, measured.dead_share]


def dump_commands() -> Named:
    """Every number that the verbs print with ``--json``, and the weights that they write."""
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        Path("books").mkdir()
        for i in range(40):
            Path(f"books/{i:02}.txt").write_text(TEXT[i * 60 : i * 60 + 1500])
        Path("s.csv").write_text("\n".join(["sentence", *TEXT.replace(",", "").split(". ")[:5]]))
        for line in COMMANDS.strip().splitlines():
            code, out = command(*line.split(), "--json")
            yield f"{line}/exit", code
            if code == 0:
                yield from under(line, flat(json.loads(out)))
        for path in sorted(Path().glob("**/autoencoder.safetensors")):
            yield from under(str(path.parent), load_file(path).items())


def command(*words: str) -> tuple[int, str]:
    """Run a verb in this process: its exit status and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = cli.main(list(words))
    return int(code or 0), out.getvalue()


def flat(value: Any, path: str = "") -> Named:
    """Every number in nested dicts and lists, by its path; times are left out."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, int | float) and "second" not in path:
        yield path, value


def dump_bfloat16() -> Named:
    """The shipped autoencoders and the model in bfloat16."""
    x = activations()
    for location, ae in shipped(dtype=torch.bfloat16):
        yield from under(location, answers(ae, x[location].bfloat16()[:60]))
    xf = model(torch.bfloat16)
    yield "logits", xf(torch.tensor([xf.enc.encode(TEXT)[:48]]))[0]


# ---- dump and compare ----------------------------------------------------------------------------

SECTIONS = {
    name.removeprefix("dump_"): value
    for name, value in list(globals().items())
    if name.startswith("dump_")
}


def dump(out: Path, only: list[str]) -> int:
    """Write every tensor of the sections; 1 if one of them failed."""
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    failed = []
    for section in only or SECTIONS:
        before = len(found)
        try:
            for name, value in SECTIONS[section]():
                tensor = (
                    value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
                )
                found[f"{section}/{name}"] = tensor.detach().contiguous().clone()
        except Exception:  # the other sections are wanted all the same; the exit status tells
            traceback.print_exc()
            failed.append(section)
        print(f"{section}: {len(found) - before} tensors", file=sys.stderr, flush=True)
    save_file(found, out)
    print(
        f"{len(found)} tensors of {cli.__file__} are in {out}; failed: {', '.join(failed) or 'none'}"
    )
    return 1 if failed else 0


def compare(old: Path, new: Path, ignore: list[str]) -> int:
    """List what differs; 0 if nothing does."""
    a, b = load_file(old), load_file(new)
    names = [n for n in sorted(a | b) if not any(fnmatch.fnmatch(n, glob) for glob in ignore)]
    n_equal = 0
    for name in names:
        if name not in a or name not in b:
            print(f"only in {old if name in a else new}: {name}")
            continue
        x, y = a[name], b[name]
        if x.shape != y.shape or x.dtype != y.dtype:
            print(f"{name}: {list(x.shape)} {x.dtype} -> {list(y.shape)} {y.dtype}")
        elif torch.equal(bits(x), bits(y)):
            n_equal += 1
        else:
            n, most = int((bits(x) != bits(y)).sum()), (x.double() - y.double()).abs().max()
            print(
                f"{name}: {n} of {x.numel()} differ, by at most {most:.3g} of {x.abs().max():.3g}"
            )
    print(f"{n_equal} of {len(names)} tensors are equal bit for bit")
    return 0 if n_equal == len(names) else 1


def bits(tensor: Tensor) -> Tensor:
    """As whole numbers, so that NaN equals NaN and -0 does not equal 0."""
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()]) if tensor.is_floating_point() else tensor


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True)
    dumping = actions.add_parser("dump", help="compute everything and write it to a file")
    dumping.add_argument("out", type=Path)
    dumping.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="sections")
    comparing = actions.add_parser("compare", help="list what differs between two files")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--ignore", nargs="+", default=[], metavar="GLOB", help="names")
    args = parser.parse_args()
    if args.action == "dump":
        return dump(args.out.absolute(), args.only)
    return compare(args.old, args.new, args.ignore)


if __name__ == "__main__":
    sys.exit(main())
