"""The command line: one short function a verb. Heavy imports wait until a verb needs them."""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from neuron_explainer import __version__, demo
from neuron_explainer.cli import (
    collating,
    exchanging,
    explaining,
    exporting,
    factors,
    importing,
    inspecting,
    intervening,
    learning,
    looking,
    measuring,
    probing,
    serving,
    stored_files,
)
from neuron_explainer.cli.common import (
    Parser,
    Result,
    VerbParser,
    add_verb,
    in_flags,
    say,
    unknown_verb,
)
from neuron_explainer.errors import NeuronExplainerError, SourceError
from neuron_explainer.tables import escaped

DESCRIPTION = (
    "Look inside GPT-2-family language models: sample, encode, ablate, and learn dictionaries of "
    "what they compute."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 if all is well, 1 if a check found something wrong, 2 (and one line on stderr) if the command
        could not be carried out, 130 if it was interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    with _any_text_can_be_written():
        parser, verbs = _parser()
        try:
            if not given:
                _write(parser.print_help)
                return 0
            verb = next((argument for argument in given if not argument.startswith("-")), None)
            if verb is not None and verb not in verbs:
                unknown_verb(parser, verb, verbs)
            args = _parsed(parser, given)
        except SourceError as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            return 2
        return _run(args)


def _parsed(parser: argparse.ArgumentParser, given: list[str]) -> argparse.Namespace:
    found: list[argparse.Namespace] = []
    try:
        _write(lambda: found.append(parser.parse_args(given)))
    except SystemExit:  # after --help or --version, or an error in the flags
        _write()
        raise
    if not found:  # nobody reads the help any more
        raise SystemExit(0)
    return found[0]


def _run(args: argparse.Namespace) -> int:
    try:
        with _log_on_stderr():
            result: Result = args.run(args)
        _write(lambda: _print(args, result))
    except NeuronExplainerError as error:
        message = in_flags(escaped(str(error)), vars(args))
        print(f"neuron-explainer {args.verb}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0 if result.get("ok", True) else 1


def _write(write: Callable[[], object] = lambda: None) -> None:
    """Write to standard output, to its end; a SourceError if it takes no more."""
    try:
        write()
        if sys.stdout is not None:  # None: closed by whoever started this
            sys.stdout.flush()
    except BrokenPipeError:  # what reads it (head, less) has seen enough
        _give_up_stdout()
    except OSError as error:
        _give_up_stdout()
        raise SourceError(f"cannot write to standard output: {error.strerror}") from None


def _print(args: argparse.Namespace, result: Result) -> None:
    if args.json:
        # Other encodings may lack a letter, and an escape of theirs would not be JSON.
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        ascii_only = not encoding.lower().startswith("utf")
        print(json.dumps(_plain(result), indent=2, ensure_ascii=ascii_only, allow_nan=False))
    else:
        args.show(result)


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the library logs while a verb runs is for its user: one line each, and of the processes that
    torchrun started, the first alone speaks."""
    log, handler = logging.getLogger("neuron_explainer"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
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


@contextlib.contextmanager
def _any_text_can_be_written() -> Iterator[None]:
    """Letters that the terminal's encoding lacks are written as escapes, not raised as errors."""
    streams = [each for each in (sys.stdout, sys.stderr) if isinstance(each, io.TextIOWrapper)]
    before = [(stream, stream.errors) for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):  # closed meanwhile, or full
                stream.reconfigure(errors=errors)


def _give_up_stdout() -> None:
    """Send the rest of the output nowhere, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(Parser):
    """The parser of the whole command, whose help lists the verbs in groups."""

    groups: dict[str, list[tuple[str, str]]]

    def format_help(self) -> str:
        """The verbs, by what one wants to do."""
        lines = [f"usage: {self.prog} VERB ...", "", DESCRIPTION, ""]
        lines += ["Begin with: neuron-explainer demo", ""]
        width = 2 + max(len(name) for verbs in self.groups.values() for name, _ in verbs)
        for title, verbs in self.groups.items():
            lines += [title, *(f"  {name:<{width}}{about}" for name, about in verbs), ""]
        lines += [f"{self.prog} VERB --help has an example and the options; --version the version."]
        return "\n".join(lines) + "\n"


def _parser() -> tuple[argparse.ArgumentParser, dict[str, VerbParser]]:
    """The parser, and those of the verbs by name."""
    parser = _Parser(prog="neuron-explainer", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=VerbParser
    )
    found: dict[str, VerbParser] = {}
    parser.groups = {}
    for title, register in (
        ("look", _register_looking),
        ("intervene", intervening.register),
        ("learn", _register_learning),
        ("measure", _register_measuring),
        ("files", _register_files),
    ):
        register(verbs)
        new = {name: verb for name, verb in verbs.choices.items() if name not in found}
        parser.groups[title] = [(name, verb.about) for name, verb in new.items()]
        found |= new
    return parser, found


def _register_looking(verbs: Any) -> None:
    about = "a tour in seconds, offline, with the calls it makes"
    add_verb(verbs, "demo", about, run_demo, show_demo, example="neuron-explainer demo")
    serving.register(verbs)
    exporting.register(verbs)
    looking.register(verbs)
    collating.register(verbs)
    inspecting.register(verbs)
    explaining.register(verbs)


def _register_learning(verbs: Any) -> None:
    learning.register(verbs)
    factors.register(verbs)


def _register_measuring(verbs: Any) -> None:
    measuring.register(verbs)
    probing.register(verbs)


def _register_files(verbs: Any) -> None:
    stored_files.register(verbs)
    importing.register(verbs)
    exchanging.register(verbs)


def run_demo(args: argparse.Namespace) -> Result:
    """Run the tour."""
    steps: list[Result] = []
    _write(lambda: steps.extend(demo.run(echo=not args.json)))
    return {"steps": steps}


def show_demo(result: Result) -> None:
    """How long the tour took, and where to go from here."""
    say(
        f"\nAll of this ran here, offline, in {sum(s['seconds'] for s in result['steps']):.1f} s. "
        "Next: neuron-explainer latents 'your text', neuron-explainer inspect "
        "tiny-tales/ae-resid-delta-mlp/2 1234, neuron-explainer ablate 'your text' "
        "--location 2/mlp.post_act, neuron-explainer models, and the README."
    )
