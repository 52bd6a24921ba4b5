"""A setting that is one of several dataclasses, told by a name: :class:`Variant`.

    @dataclass(frozen=True)
    class Penalty(Variant, noun="penalty"):  # a family
        ...

    @dataclass(frozen=True)
    class L1(Penalty):
        strength: float = 1.0

    Penalty.add("l1", L1)

A config with a field ``penalty: Penalty`` is then written as ``{"penalty": {"name": "l1", …}}``, read
from the same, and set by the flags ``--penalty l1 --strength 2``.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self, cast

from neuron_explainer.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Variant:
    """Base of a family of dataclasses; a direct subclass is a family, with names of its own."""

    noun: ClassVar[str]
    """What a member is, in messages: "objective"."""
    _members: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, noun: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Variant in cls.__bases__:
            cls.noun, cls._members = noun or cls.__name__, {}

    @property
    def name(self) -> str:
        """The name under which the class of these settings is known."""
        for name, member in self._members.items():
            if type(self) is member:
                return name
        raise InputError(
            f"{type(self).__name__} is not registered as the settings of any {self.noun}."
        )

    @classmethod
    def add(cls, name: str, member: type[Self]) -> None:
        """Make ``member`` known as ``name``."""
        cls._members[name] = member

    @classmethod
    def names(cls) -> list[str]:
        """All known names, sorted."""
        return sorted(cls._members)

    @classmethod
    def member(cls, name: str) -> type[Self]:
        """The class known as ``name``."""
        if name not in cls._members:
            raise InputError(
                f"unknown {cls.noun} {name!r}.{did_you_mean(name, cls._members)} "
                f"Known: {', '.join(cls.names())}."
            )
        return cast(type[Self], cls._members[name])
