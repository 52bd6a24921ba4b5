"""What latents mean: collating examples, summaries, reports and pictures.

Names are imported when they are first used, so that reading what was collated does not bring torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_explainer.analysis.collation.collate import collate, collect
    from neuron_explainer.analysis.collation.config import CollateConfig
    from neuron_explainer.analysis.collation.merging import merge_stores
    from neuron_explainer.analysis.collation.quantiles import exact_quantiles, quantiles_of_store
    from neuron_explainer.analysis.store import ExampleStore, open_stores

__all__ = [
    "CollateConfig",
    "ExampleStore",
    "collate",
    "collect",
    "exact_quantiles",
    "merge_stores",
    "open_stores",
    "quantiles_of_store",
]


def __getattr__(name: str) -> Any:
    if name == "CollateConfig":
        from neuron_explainer.analysis.collation.config import CollateConfig

        return CollateConfig
    if name in ("ExampleStore", "open_stores"):
        from neuron_explainer.analysis import store

        return getattr(store, name)
    if name == "merge_stores":
        from neuron_explainer.analysis.collation.merging import merge_stores

        return merge_stores
    if name in ("exact_quantiles", "quantiles_of_store"):
        from neuron_explainer.analysis.collation import quantiles

        return getattr(quantiles, name)
    if name in __all__:
        from neuron_explainer.analysis.collation import collate

        return getattr(collate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
