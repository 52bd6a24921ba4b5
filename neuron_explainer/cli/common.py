"""What the verbs share: how one is declared, and the options that name a model and its autoencoders."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_explainer import files
from neuron_explainer.errors import InputError

if TYPE_CHECKING:
    import torch

    from neuron_explainer.models.autoencoder_context import AutoencoderContext
    from neuron_explainer.models.model_context import StandardModelContext
    from neuron_explainer.models.transformer import Transformer

Result = dict[str, Any]
"""What a verb found, as plain values: printed as JSON with ``--json``, else by the verb's printer."""


class VerbParser(argparse.ArgumentParser):
    """A verb's parser; options that take a heavy import to know are declared when it is called."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse does, with all options there are."""
        if self.declare is not None:
            declare, self.declare = self.declare, None
            declare(self)
        return super().parse_known_args(*args, **kwargs)


def add_verb(
    verbs: Any,
    name: str,
    help: str,
    run: Callable[[argparse.Namespace], Result],
    show: Callable[[Result], None],
    declare: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.ArgumentParser:
    """A verb: what it does, how its result is shown, and options to be declared when it is called."""
    verb: VerbParser = verbs.add_parser(name, help=help, description=f"{run.__doc__}")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    verb.set_defaults(run=run, show=show)
    verb.declare = declare
    return verb


def model_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--model", default="tiny-tales", help="name, folder or URL (default: tiny-tales)"
    )
    verb.add_argument("--device", help="such as cpu or cuda:0 (default: the best there is)")
    verb.add_argument("--bos", action="store_true", help="prepend the start token")


def model_context(args: argparse.Namespace) -> "StandardModelContext":
    from neuron_explainer.models.devices import check_device
    from neuron_explainer.models.model_context import StandardModelContext

    device = None if args.device is None else check_device(args.device)
    return StandardModelContext(args.model, device=device)


def load_model(
    args: argparse.Namespace, context: "StandardModelContext | None" = None
) -> "Transformer":

    context = context or model_context(args)
    return context.get_or_create_model()


def positive(text: str) -> int:
    """A whole number >= 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, found {text}")
    return number


def autoencoder_path(path: str) -> str:
    """The same; of a run's folder, that of the one autoencoder in it."""
    from neuron_explainer.dictionaries.runs import Run

    run = None if files.is_remote(path) else Run.find(path)
    if run is None:
        return path
    found = list(run.results.values())
    if len(found) > 1:
        raise InputError(
            f"{path} is a run of several autoencoders; give one: {', '.join(map(str, found))}."
        )
    return str(found[0])


def autoencoder_context(args: argparse.Namespace, device: "torch.device") -> "AutoencoderContext":
    """The autoencoders that ``--autoencoder`` names: of the registry, or a folder, file or URL."""
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.autoencoder_context import AutoencoderConfig, AutoencoderContext
    from neuron_explainer.models.model_registry import make_autoencoder_context

    path = autoencoder_path(args.autoencoder)
    if not (files.is_remote(path) or Path(path).exists()):
        return make_autoencoder_context(args.model, path, device=device)
    location = Autoencoder.load(path).location
    if location is None:
        raise InputError(
            f"{path} does not say where in the model it belongs; load it in Python: "
            "AutoencoderContext(AutoencoderConfig(location, {layer: path}), device)."
        )
    if location.layer is None and location.site.per_layer and args.layer is None:
        raise InputError(f"{path} is for {location} of every layer; say which one: --layer N.")
    layer = args.layer if location.layer is None else location.layer
    return AutoencoderContext(AutoencoderConfig(location.at(None), {layer: path}), device)
