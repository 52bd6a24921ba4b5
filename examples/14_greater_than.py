"""Greater-than (Hanna et al. 2023): "The war lasted from the year 1732 to the year 17" - which MLPs know it?

With GPT-2: ``python examples/14_greater_than.py gpt2-small``. The built-in model knows tales and no years; on
it the script shows how the measurement is made.
"""

import sys

from neuron_explainer.analysis.sweeps import sweep
from neuron_explainer.analysis.targets import Target, token_id
from neuron_explainer.models.interventions import patch_from
from neuron_explainer.models.open_model import open_model

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-tales"
model = open_model(name).get_or_create_model()
if name == "tiny-tales":  # numbers are words there
    words = ["two", "three", "four", "five", "six", "seven"]
    clean, corrupt, start = (
        "There were two brothers, and then there were",
        "There were seven brothers, and then there were",
        0,
    )
    numbers = [token_id(model, f" {word}") for word in words]
else:
    year, start = 32, 32
    clean, corrupt = (f"The war lasted from the year 17{yy:02} to the year 17" for yy in (year, 1))
    numbers = [model.prompt_ids(f"{yy:02}")[0][0] for yy in range(100)]

above, below = numbers[start + 1 :], numbers[: start + 1]


def difference(reading):
    """Probability of the numbers above the first one, minus that of the others: ``[n]``."""
    probs = reading.logits.softmax(dim=-1)
    return probs[:, above].sum(dim=-1) - probs[:, below].sum(dim=-1)


places = [f"{layer}/resid.torso.delta_mlp" for layer in range(model.n_layers)]
source = model.capture([corrupt], "resid.torso.delta_mlp")
found = sweep(
    model,
    [clean],
    {
        f"MLP {layer}": patch_from(place, source, positions="last")
        for layer, place in enumerate(places)
    },
    Target("p(greater) - p(not greater)", difference),
)
print(found)
