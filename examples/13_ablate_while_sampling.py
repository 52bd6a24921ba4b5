"""What a head does to a story: sample with each head of a layer set to zero, and with the head's mean."""

import torch

from neuron_explainer.models.interventions import ablate, mean_ablate
from neuron_explainer.models.open_model import open_model

LAYER, TEXT = 0, "The old woman went into the wood, and there she met a"
model = open_model("tiny-tales").get_or_create_model()
place = f"{LAYER}/attn.v_out"

with torch.no_grad():  # what the heads do on average, over the tokens of a text
    reference = model.capture(["Once upon a time there was a poor man who had three sons."], place)

n_heads = reference[place].shape[2]
print("plain:", model.sample(TEXT, 16, temperature=0)["strings"][0])
for head in range(n_heads):
    for how, hooks in [
        ("zero", ablate(place, head)),
        ("mean", mean_ablate(place, reference, head)),
    ]:
        print(
            f"head {head}, {how}:", model.sample(TEXT, 16, temperature=0, hooks=hooks)["strings"][0]
        )

# Interventions are values: they add up, and print what they do.
print(
    ablate(place, [0, 1], positions="last")
    + mean_ablate("2/attn.v_out", model.capture([TEXT], "2/attn.v_out"))
)
