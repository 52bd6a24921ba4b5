"""What a worker is given when it starts: values that can be sent to another process, without torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DictionarySource:
    """Units that have an id: the latents of an autoencoder, or units of the model such as neurons."""

    id: str
    location: str
    """Such as ``2/resid.torso.delta_mlp``."""
    kind: str = "latent"
    """"latent", or the kind of the model's own units."""
    autoencoder: str | None = None
    """Of latents: an absolute path or a URL; or a name of the registry, with or without ``/LAYER``."""
    model: str | None = None
    """The model that they belong to, where it is known."""

    @property
    def is_registered(self) -> bool:
        """Whether ``autoencoder`` is a name of the registry."""
        name = self.autoencoder
        return name is not None and "://" not in name and not name.startswith(("/", "hf:"))

    @property
    def site(self) -> str:
        """The location without the layer."""
        layer, slash, path = self.location.partition("/")
        return path if slash and layer.isdecimal() else self.location

    @property
    def layer(self) -> int | None:
        """The number of the layer, if the location has one."""
        layer = self.location.partition("/")[0]
        return int(layer) if layer.isdecimal() else None


@dataclass(frozen=True)
class Setup:
    """The model and the dictionaries of a worker."""

    model: Any
    """What :func:`~neuron_explainer.models.open_model.open_model` takes; or, for a worker in a thread of
    this process, a ``ModelContext``."""
    dictionaries: tuple[DictionarySource, ...] = ()
    autoencoders: tuple[str, ...] = ()
    """More of them, as a :class:`DictionarySource` names them. Those at the location of a dictionary of
    latents that does not name its own are taken for it; the others get ids of their own."""
    device: str | None = None
    budget: int = 4 << 30
    """Bytes of memory for autoencoders; those used longest ago are dropped."""
    kept: int = 512 << 20
    """Bytes of memory for results of earlier requests; those used longest ago are dropped."""
    max_tokens: int = 256
    """Of one prompt; never more than the model's context."""
    seconds: float = 30.0
    """Most time for one request."""
