"""The card of a unit in a notebook, as a widget: its arrows show the units before and after it.

    from neuron_explainer.viewer.widget import feature_widget
    feature_widget(store, 1234)

Needs the extra ``notebook``. Without it a notebook shows ``store[1234]`` as a page that stands still.
"""

from typing import TYPE_CHECKING, Any

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.errors import optional_module
from neuron_explainer.viewer import DIST
from neuron_explainer.viewer.export import unit_data

if TYPE_CHECKING:
    from neuron_explainer.analysis.directions import Directions


def feature_widget(store: ExampleStore, unit: int, directions: "Directions | None" = None) -> Any:
    """A widget that shows a unit. Its trait ``unit`` can be set, and follows what the reader opens.

    Args:
        store: where the unit is; it must stay open.
        unit: its number.
        directions: from which the tokens come that units promote; None: they are left out.
    """
    anywidget = optional_module("anywidget", "widgets in notebooks", "'neuron_explainer[notebook]'")
    traitlets = optional_module("traitlets", "widgets in notebooks", "'neuron_explainer[notebook]'")

    def content(number: int) -> dict[str, Any]:
        logits = None if directions is None else directions.top_logits(number)
        return unit_data(store, store[number], logits=logits)

    def follow(change: dict[str, Any]) -> None:
        found.data = content(change["new"])

    script = (DIST / "embed.js").read_text("utf-8")
    members = {
        "_esm": f"{script}\nexport default {{ render: neuronExplainer.render }};\n",
        "_css": (DIST / "embed.css").read_text("utf-8"),
        "unit": traitlets.Int().tag(sync=True),
        "data": traitlets.Dict().tag(sync=True),
    }
    found = type("FeatureWidget", (anywidget.AnyWidget,), members)(unit=unit, data=content(unit))
    found.observe(follow, names="unit")
    return found
