"""Any frozen dataclass to and from a dict, TOML, JSON and command-line flags (:mod:`.flags`)."""

from neuron_explainer.settings.fields import Variant, check_types, read_fields, to_dict
from neuron_explainer.settings.formats import (
    from_dict,
    plain_value,
    read_config,
    read_values,
    split_fields,
)

__all__ = [
    "Variant",
    "check_types",
    "from_dict",
    "plain_value",
    "read_config",
    "read_fields",
    "read_values",
    "split_fields",
    "to_dict",
]
