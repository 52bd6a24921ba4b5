"""The Python that gives a panel's numbers: every panel carries it, and tests run it.

A script opens the model, calls what the server called, and ends with ``result = …``.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from neuron_explainer.server.compute.setup import DictionarySource

_WIDTH = 100


class Script:
    """A script that grows: imports above, then lines."""

    def __init__(self) -> None:
        self._imports: dict[str, set[str]] = {}
        self._libraries: set[str] = set()
        self._lines: list[str] = []

    def use(self, module: str, *names: str) -> "Script":
        """Import names of a module of this package, given without ``neuron_explainer.``."""
        self._imports.setdefault(f"neuron_explainer.{module}", set()).update(names)
        return self

    def library(self, name: str) -> "Script":
        """Import another library whole."""
        self._libraries.add(name)
        return self

    def add(self, *lines: str) -> "Script":
        """More lines."""
        self._lines += lines
        return self

    def result(self, expression: str | Mapping[str, str]) -> "Script":
        """The last line; a mapping of expressions is a dict."""
        if isinstance(expression, str):
            return self.add(f"result = {expression}")
        entries = (f'    "{name}": {value},' for name, value in expression.items())
        return self.add("result = {", *entries, "}")

    def text(self) -> str:
        """The whole script."""
        imports = [
            f"from {module} import {', '.join(sorted(names))}"
            for module, names in sorted(self._imports.items())
        ]
        libraries = [f"import {name}" for name in sorted(self._libraries)]
        head = [*libraries, *([""] if libraries else []), *imports]
        return "\n".join([*head, "", *self._lines]) + "\n"


class Names:
    """How scripts name the model and the dictionaries of a server."""

    def __init__(self, model: str, sources: Mapping[str, DictionarySource]) -> None:
        self.model, self.sources = model, sources

    def script(self) -> Script:
        """A script that begins with the model, as ``context`` and ``model``."""
        return (
            Script()
            .use("models.open_model", "open_model")
            .add(
                f"context = open_model({self.model!r})",
                "model = context.get_or_create_model()",
            )
        )

    def autoencoder(self, script: Script, id: str) -> str:
        """An expression for a dictionary's autoencoder."""
        source = self.sources[id]
        name = source.autoencoder
        assert name is not None
        if source.is_registered:
            script.use("models.model_registry", "make_autoencoder_context")
            registered = f"{source.model or self.model!r}, {name.partition('/')[0]!r}, model.device"
            return f"make_autoencoder_context({registered}).get_autoencoder({source.layer})"
        script.use("models.autoencoder", "Autoencoder")
        given = f"{name!r}, strict=False, location={source.location!r}"
        return f"Autoencoder.load({given}, dtype=model.dtype).to(model.device)"

    def contexts(self, script: Script, ids: Sequence[str]) -> str:
        """An expression for a list of contexts: the autoencoders of each site together."""
        by_site: dict[str, list[str]] = {}
        for id in ids:
            by_site.setdefault(self.sources[id].site, []).append(self.autoencoder(script, id))
        if not by_site:
            return "[]"
        script.use("models.autoencoder_context", "AutoencoderContext")
        parts = []
        for several in by_site.values():
            inside = "".join(f"        {each},\n" for each in several)
            parts.append(f"    AutoencoderContext.of([\n{inside}    ]),\n")
        return f"[\n{''.join(parts)}]"


def ids_text(ids: Sequence[int]) -> str:
    """Token ids as a list, over several lines where it is long."""
    return wrapped(f"[{', '.join(map(str, ids))}]")


def wrapped(text: str) -> str:
    """Text that is broken at spaces."""
    lines = textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False)
    return "\n".join(lines)


def call(function: str, *positional: Any, **named: Any) -> str:
    """A call as text: positional arguments are expressions, named ones values; None is left out."""
    parts = [*positional, *(f"{k}={v!r}" for k, v in named.items() if v is not None)]
    return f"{function}({', '.join(parts)})"
