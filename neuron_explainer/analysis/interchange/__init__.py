"""Formats of other programs: read into stores of examples, and written from them.

OpenAI's ``NeuronRecord`` and explanations (``neuron_records.py``, ``collated_sets.py``), SAEDashboard's and
Neuronpedia's JSON (``dashboards.py``), delphi's cache of latents (``delphi.py``) and Parquet
(``parquet.py``). Names are imported when they are first used, so that reading files does not bring torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_explainer.analysis.interchange.collated_sets import (
        PUBLISHED,
        import_records,
        neuron_record,
        write_records,
    )
    from neuron_explainer.analysis.interchange.dashboards import (
        dashboard_batch,
        dashboard_feature,
        import_dashboards,
        neuronpedia_rows,
        read_dashboards,
        read_neuronpedia,
        write_dashboard,
        write_neuronpedia,
    )
    from neuron_explainer.analysis.interchange.delphi import LatentCache, cache_latents
    from neuron_explainer.analysis.interchange.neuron_records import (
        NeuronRecord,
        read_explanations,
        read_neuron_record,
        write_neuron_record,
    )
    from neuron_explainer.analysis.interchange.parquet import write_parquet

_MODULES = {
    "collated_sets": ("PUBLISHED", "import_records", "neuron_record", "write_records"),
    "dashboards": (
        "dashboard_batch",
        "dashboard_feature",
        "import_dashboards",
        "neuronpedia_rows",
        "read_dashboards",
        "read_neuronpedia",
        "write_dashboard",
        "write_neuronpedia",
    ),
    "delphi": ("LatentCache", "cache_latents"),
    "parquet": ("write_parquet",),
    "neuron_records": (
        "NeuronRecord",
        "read_explanations",
        "read_neuron_record",
        "write_neuron_record",
    ),
}
__all__ = [
    "PUBLISHED",
    "LatentCache",
    "NeuronRecord",
    "cache_latents",
    "dashboard_batch",
    "dashboard_feature",
    "import_dashboards",
    "import_records",
    "neuron_record",
    "neuronpedia_rows",
    "read_dashboards",
    "read_explanations",
    "read_neuron_record",
    "read_neuronpedia",
    "write_dashboard",
    "write_neuron_record",
    "write_neuronpedia",
    "write_parquet",
    "write_records",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
