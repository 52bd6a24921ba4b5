"""The house stays in order: arrows point up, nothing goes in circles, nothing heavy at the door."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "neuron_explainer"

# Ground floor first; an import may point to its own room or to one listed earlier.
ROOMS = [
    [
        "neuron_explainer",
        "neuron_explainer.errors",
        "neuron_explainer.tables",
        "neuron_explainer.progress",
        "neuron_explainer.interrupts",
        "neuron_explainer.files",
    ],
    ["neuron_explainer.settings"],
    ["neuron_explainer.kernels"],
    ["neuron_explainer.models"],
    ["neuron_explainer.activations"],
    ["neuron_explainer.evaluation"],
    ["neuron_explainer.analysis"],
    ["neuron_explainer.dictionaries"],
    ["neuron_explainer.graphs"],
    ["neuron_explainer.server"],
    ["neuron_explainer.viewer"],
    ["neuron_explainer.experiments"],
    ["neuron_explainer.demo", "neuron_explainer.cli", "neuron_explainer.__main__"],
]
# Side by side rather than one above the other: the first may not import the second.
FORBIDDEN = [
    ("neuron_explainer.graphs", "neuron_explainer.dictionaries"),
    ("neuron_explainer.server", "neuron_explainer.dictionaries"),
    ("neuron_explainer.viewer", "neuron_explainer.dictionaries"),
    ("neuron_explainer.demo", "neuron_explainer.experiments"),
    ("neuron_explainer.cli", "neuron_explainer.experiments"),
]
LONGEST_CHAIN = 26  # the server stands on the analysis, and that on its own search for rules
# The five floors inside ``models/``, under the same rule. The longest prefix that fits counts.
MODELS = "neuron_explainer.models"
FLOORS = [
    [
        "locations",
        "checks",
        "initial_weights",
        "config",
        "tokenizers",
        "sampling",
        "devices",
        "locks",
        "names",
        "weight_names",
        "weight_layouts",
        "tokenizer_files",
    ]
    + [f"autoencoders.{part}" for part in ("nonlinearities", "latents", "fista")],
    ["checkpoints"],
    [
        "hook_signatures",
        "hook_lists",
        "autoencoder_hooks",
        "hooks",
        "kv_cache",
        "simplify",
        "language_model",
        "checkpointed",
        "transformer",
        "autoencoder",
        "autoencoders",
    ],
    ["huggingface"],
    [
        "model_context",
        "autoencoder_context",
        "huggingface.context",
        "model_registry",
        "interventions",
        "open_model",
        "",
    ],
]


def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(path: Path, known: set[str]) -> Iterator[str]:
    """Every module of the package that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write relative imports out"
            base = node.module or ""
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            ]
        else:
            continue
        yield from (name for name in names if name in known)


def read_graph() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    known = modules()
    return {name: set(imports_of(path, set(known))) - {name} for name, path in known.items()}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return read_graph()


def room_of(module: str) -> int:
    if module == "neuron_explainer":
        return 0
    for index, prefixes in enumerate(ROOMS):
        for prefix in prefixes:
            if prefix != "neuron_explainer" and f"{module}.".startswith(f"{prefix}."):
                return index
    raise AssertionError(f"{module} stands in no room; add it to ROOMS")


def test_the_graph_is_read(graph: dict[str, set[str]]) -> None:
    assert "neuron_explainer.models.hooks" in graph["neuron_explainer.models.transformer"]


def floor_of(module: str) -> int:
    """The floor of a module of ``models/``: that of the longest listed prefix."""
    inside = module.removeprefix(MODELS).removeprefix(".")
    fitting = [
        (len(prefix), index)
        for index, prefixes in enumerate(FLOORS)
        for prefix in prefixes
        if f"{inside}.".startswith(f"{prefix}.")
    ]
    assert fitting, f"{module} stands on no floor; add it to FLOORS"
    return max(fitting)[1]


def test_floors_of_models(graph: dict[str, set[str]]) -> None:
    inside = {a for a in graph if f"{a}.".startswith(f"{MODELS}.")}
    down = [(a, b) for a in inside for b in graph[a] & inside if floor_of(b) > floor_of(a)]
    assert not down


def test_arrows_point_up(graph: dict[str, set[str]]) -> None:
    down = [(a, b) for a, targets in graph.items() for b in targets if room_of(b) > room_of(a)]
    down += [
        (a, b)
        for a, targets in graph.items()
        for b in targets
        for low, high in FORBIDDEN
        if f"{a}.".startswith(f"{low}.") and f"{b}.".startswith(f"{high}.")
    ]
    assert not down


def test_no_cycles(graph: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """The longest row of modules of which each imports the next, at the top or inside a function."""

    @cache
    def from_here(module: str) -> list[str]:
        rests = [from_here(target) for target in sorted(graph[module])]
        return [module, *max(rests, key=len, default=[])]

    return max((from_here(module) for module in graph), key=len)


def test_chains_of_imports_are_short(graph: dict[str, set[str]]) -> None:
    chain = longest_chain(graph)
    assert len(chain) <= LONGEST_CHAIN, f"{len(chain)} modules: {' -> '.join(chain)}"


def test_no_function_is_longer_than_a_page() -> None:
    long = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {node.name}: {lines} lines"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > 60
    ]
    assert not long


def private_names_of_torch(path: Path) -> Iterator[str]:
    """Every use of a name of torch that begins with one underscore, with its line."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node).split(".")
        elif isinstance(node, ast.ImportFrom):
            dotted = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        else:
            continue
        if dotted[0] in ("torch", "aten") and any(re.match("_[^_]", part) for part in dotted[1:]):
            yield f"{path.name}:{node.lineno} {'.'.join(dotted)}"


def test_private_names_of_torch_stay_in_kernels() -> None:
    kernels = PACKAGE / "kernels"
    inside = [use for path in kernels.glob("*.py") for use in private_names_of_torch(path)]
    assert inside  # the search finds what is there
    others = [path for path in modules().values() if not path.is_relative_to(kernels)]
    assert not [use for path in others for use in private_names_of_torch(path)]


def test_one_import_is_looked_up_late() -> None:
    """``AutoencoderContext.verify`` is the original's name for what a higher room does; no other."""
    late = [
        (str(path.relative_to(PACKAGE)), target)
        for path in modules().values()
        for target in re.findall(
            r"""import_module\(\s*f?["'](neuron_explainer[^"']*)""", path.read_text("utf-8")
        )
    ]
    assert late == [("models/autoencoder_context.py", "neuron_explainer.evaluation.verify")]


def loaded_by(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running ``code``."""
    script = f"{code}\nimport sys\nprint(*{{m.partition('.')[0] for m in sys.modules}}, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import neuron_explainer",
        "import neuron_explainer.errors, neuron_explainer.files",
        "from neuron_explainer.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_at_the_door(code: str) -> None:
    loaded = loaded_by(code)
    assert "neuron_explainer" in loaded
    assert not loaded & {"torch", "numpy", "tiktoken", "blobfile", "requests", "safetensors"}


def test_models_import_only_what_they_need() -> None:
    """Beyond torch's own imports the models room loads safetensors and, lazily, nothing else."""
    extra = loaded_by("import neuron_explainer.models") - loaded_by(
        "import torch, safetensors.torch"
    )
    third_party = {name for name in extra if name not in sys.stdlib_module_names} - {
        "neuron_explainer"
    }
    assert third_party <= {"filelock"}, third_party


def closure(distribution: str) -> set[str]:
    """Names of the distributions that installing one brings, itself included, without extras."""
    from packaging.requirements import Requirement

    seen: set[str] = set()
    queue = [distribution]
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return seen


def test_at_most_fourteen_distributions_beyond_torchs_own() -> None:
    try:
        metadata.distribution("neuron_explainer")
    except metadata.PackageNotFoundError:
        pytest.skip("neuron_explainer is not installed")
    beyond = closure("neuron_explainer") - closure("torch")
    assert len(beyond) <= 14, sorted(beyond)
    assert {"tiktoken", "blobfile", "safetensors", "neuron-explainer"} <= beyond


def main() -> int:
    """What a commit is shown: the size of the package and its longest chain; then these tests."""
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    chain = longest_chain(read_graph())
    print(
        f"{sum(lines.values()):,} lines in {len(lines)} modules; longest chain of imports: {len(chain)}"
    )
    return pytest.main(["-q", "-p", "no:cacheprovider", __file__])


if __name__ == "__main__":
    sys.exit(main())
