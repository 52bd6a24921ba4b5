"""Public names and flags change on purpose only: ``public_names.txt`` lists all of them.

    python -m tests.test_public_names        # writes the list anew, after a change that is meant

Listed are what each module offers in ``__all__``, what the original's five modules define, and every
verb's flags.
"""

import argparse
import difflib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from neuron_explainer import cli
from tests.test_layering import modules

LIST = Path(__file__).with_name("public_names.txt")
SEEDS = {
    f"neuron_explainer.models.{name}"
    for name in ("transformer", "hooks", "autoencoder", "model_context", "autoencoder_context")
}


def names() -> Iterator[str]:
    """``module.name`` of everything that is offered."""
    for path in modules():
        text = modules()[path].read_text("utf-8")
        if path in SEEDS or "\n__all__ = " in text:
            module = importlib.import_module(path)
            offered = getattr(module, "__all__", None) or [
                name
                for name, value in vars(module).items()
                if not name.startswith("_") and getattr(value, "__module__", None) == path
            ]
            for name in offered:
                assert hasattr(module, name), f"{path} has no {name}"
                yield f"{path}.{name}"


def flags(verb: argparse.ArgumentParser, name: str) -> Iterator[str]:
    """``verb --flag`` of a verb and of its actions."""
    if (declare := getattr(verb, "declare", None)) is not None:
        declare(verb)
    for action in verb._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, parser in action.choices.items():
                yield from flags(parser, f"{name} {inner}")
        elif not isinstance(action, argparse._HelpAction):
            yield f"{name} {' '.join(action.option_strings) or action.metavar or action.dest}"


def everything() -> list[str]:
    found = set(names())
    for name, verb in cli._parser()[1].items():
        found |= set(flags(verb, f"neuron-explainer {name}"))
    return sorted(found)


def test_names_and_flags_are_those_of_the_list() -> None:
    # In an interpreter of its own: other tests register objectives, whose settings are flags too.
    script = "from tests.test_public_names import everything\nprint(*everything(), sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=LIST.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    changes = [
        line
        for line in difflib.unified_diff(
            LIST.read_text("utf-8").splitlines(), run.stdout.splitlines(), n=0
        )
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    shown = "\n".join(changes)
    assert not changes, f"if this is meant: python -m tests.test_public_names\n{shown}"


if __name__ == "__main__":
    LIST.write_text("\n".join(everything()) + "\n", "utf-8")
    print(f"{LIST} has {len(everything())} names and flags")
