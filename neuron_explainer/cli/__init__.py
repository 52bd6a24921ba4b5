"""The command line: one short function a verb. Heavy imports wait until a verb needs them."""

import argparse
import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from neuron_explainer import __version__, demo
from neuron_explainer.cli import learning, looking, measuring, stored_files
from neuron_explainer.cli.common import Result, VerbParser, add_verb
from neuron_explainer.errors import NeuronExplainerError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all is well, 1 if a check found something wrong, 2 (and one line on stderr) if the command
        could not be carried out.
    """
    args = _parser().parse_args(argv)
    try:
        with _log_on_stderr():
            result = args.run(args)
        if args.json:
            print(json.dumps(_plain(result), indent=2, ensure_ascii=False, allow_nan=False))
        else:
            args.show(result)
    except NeuronExplainerError as error:
        print(f"neuron-explainer {args.verb}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (head, less) has seen enough
        sys.stderr.close()
    except KeyboardInterrupt:
        return 130
    else:
        return 0 if result.get("ok", True) else 1
    return 0


@contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the library logs while a verb runs is for its user: one line each."""
    log, handler = logging.getLogger("neuron_explainer"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _plain(value: Any) -> Any:
    """As JSON can hold it: a number that is not finite is null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="neuron-explainer",
        description="Look inside GPT-2-family language models: sample, encode, ablate, and learn "
        "dictionaries of what they compute.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=VerbParser
    )
    about = "a tour in seconds, offline, with the calls it makes"
    add_verb(verbs, "demo", about, run_demo, show_demo)
    for room in (looking, learning, measuring, stored_files):
        room.register(verbs)
    return parser


def run_demo(args: argparse.Namespace) -> Result:
    """Run the tour."""
    return {"steps": demo.run(echo=not args.json)}


def show_demo(result: Result) -> None:
    """After the tour: how long it took, where to go."""
    print(
        f"\nAll of this ran here, offline, in {sum(s['seconds'] for s in result['steps']):.1f} s. "
        "Next: neuron-explainer latents 'your text', neuron-explainer ablate 'your text', "
        "neuron-explainer models, and the README."
    )
