"""What the verbs share: how a verb is declared, and how text reaches the terminal."""

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from neuron_explainer.errors import did_you_mean
from neuron_explainer.tables import escaped

Result = dict[str, Any]
"""What a verb found, as plain values: printed as JSON with ``--json``, else by the verb's printer."""


class Parser(argparse.ArgumentParser):
    """A parser whose help raises an OSError where standard output takes no more; argparse says nothing."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


class VerbParser(Parser):
    """A verb's parser. Options that need a heavy import are declared when the verb is called."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None
    about = ""
    example = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # A part of a flag is not taken for the flag: --step is a misspelling, not --steps.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse does, with all options declared; an option that does not exist is an error."""
        if self.declare is not None:
            declare, self.declare = self.declare, None
            declare(self)
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(
                f"unexpected {unknown[0]}.{did_you_mean(flag, self._option_string_actions)} "
                f"{self.prog} --help lists what there is."
            )
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """As argparse does; a wrong choice also gets the near ones."""
        wrong = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong is not None:
            choices = [choice.strip("' ") for choice in wrong[2].split(",")]
            message += did_you_mean(wrong[1], choices)
        super().error(message)

    def format_help(self) -> str:
        """An example that works, then what argparse says."""
        example = f"example: {self.example}\n\n" if self.example else ""
        return example + super().format_help()


def add_verb(
    verbs: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], Result],
    show: Callable[[Result], None],
    declare: Callable[[argparse.ArgumentParser], None] | None = None,
    example: str = "",
) -> argparse.ArgumentParser:
    """Declare a verb.

    Args:
        verbs: what argparse's ``add_subparsers`` returned.
        name: the verb.
        help: its line in the list of verbs.
        run: does the work.
        show: prints the result, where it is not printed as JSON.
        declare: adds the options that need a heavy import, when the verb is called.
        example: a command that works, first in the verb's help.
    """
    verb: VerbParser = verbs.add_parser(name, help=help, description=f"{run.__doc__}")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.set_defaults(run=run, show=show)
    verb.declare, verb.about, verb.example = declare, help, example
    return verb


def option(
    parser: Any,
    flag: str,
    help: str,
    default: str | float,
    metavar: str | None = None,
    type: Callable[[str], Any] | None = None,
    **more: Any,
) -> None:
    """Declare an option with a default, which its help states and which is of the type of its values."""
    shown = f"{default:g}" if isinstance(default, float) else default
    parser.add_argument(
        flag,
        type=type or default.__class__,
        default=default,
        metavar=metavar,
        help=f"{help} (default: {shown})".lstrip(),
        **more,
    )


def positive(text: str) -> int:
    """A whole number >= 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, found {text}")
    return number


# --- text from elsewhere, and what is said ---


def say(text: str = "") -> None:
    """Print text, control characters escaped. Every verb prints with this."""
    print(escaped(text))


@contextlib.contextmanager
def continued_by_the_same_command(out: str) -> Iterator[None]:
    """Around work that is kept in the folder ``out``: after Ctrl-C, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command continues the work in {out}", file=sys.stderr)
        raise


def can_be_shown(text: str) -> bool:
    """Whether the encoding of standard output has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def in_flags(message: str, arguments: Mapping[str, Any]) -> str:
    """A message of the library in the words of the shell: ``bos=True`` becomes ``--bos``.

    Args:
        message: speaks of arguments in Python.
        arguments: the verb's, by name; other names stay as they are.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2]
        if name not in arguments or name in ("run", "show", "verb", "json"):
            return found[0]
        dashed = name.replace("_", "-")
        return {"True": f"--{dashed}", "False": f"--no-{dashed}"}.get(value, f"--{dashed} {value}")

    return re.sub(r"(?<![\w'\"-])([a-z]\w*)=(True|False|[\w.'\"-]*[\w'\"])", flag, message)


def unknown_verb(parser: argparse.ArgumentParser, verb: str, verbs: Mapping[str, Any]) -> NoReturn:
    """The error for a verb that does not exist."""
    parser.exit(
        2,
        f"{parser.prog}: there is no verb {escaped(verb)!r}.{did_you_mean(verb, verbs)} "
        f"{parser.prog} --help lists the verbs.\n",
    )
