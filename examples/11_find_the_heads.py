"""Which heads name the other one? Indirect-object identification, from prompts to heads.

Prompts of two names, one of them twice; the model should name the other (Wang et al. 2022). With GPT-2:
``python examples/11_find_the_heads.py gpt2-small``.
"""

import sys

import torch

from neuron_explainer.analysis.effects import nodes
from neuron_explainer.analysis.lenses import logit_attribution
from neuron_explainer.analysis.sweeps import heads, patching, sweep
from neuron_explainer.analysis.targets import logit_difference
from neuron_explainer.models.open_model import open_model

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-tales"
model = open_model(name).get_or_create_model()
if name == "tiny-tales":  # a model of fairy tales knows no Mary
    one, two = " king", " queen"
    frame = "Then the king and the queen went out, and the{} gave the apple to the"
else:
    one, two = " John", " Mary"
    frame = "When John and Mary went to the shops,{} gave the bag to"
clean, corrupt = frame.format(one), frame.format(two)
target = logit_difference(model, two, one)

# 1. Does the model do it? With the names exchanged, the difference should have the other sign.
ids = [model.prompt_ids(word)[0][0] for word in (two, one)]
with torch.no_grad():
    for prompt in (clean, corrupt):
        logits = model([prompt])[0][0, -1, ids]
        print(f"{prompt!r}: {float(logits[0] - logits[1]):+.2f}")

# 2. What writes it: the direct effect of each layer's attention and MLP. They sum to the difference.
direct = logit_attribution(model, clean, target, bos=True)
for part in sorted(direct, key=lambda part: -abs(direct[part]))[:5]:
    print(f"{part:>12}: {direct[part]:+.3f}")

# 3. Where it is on the way: the stream of each layer and position from the other prompt.
source = model.capture([corrupt], "resid.torso.post_mlp", bos=True)
length = source.tokens.shape[1]
print(
    sweep(
        model,
        [clean],
        patching("resid.torso.post_mlp", source, positions=range(length)),
        target,
        bos=True,
    )
)

# 4. Which heads it needs: each head alone set to zero.
print(sweep(model, [clean], heads(model), target, bos=True))

# 5. And what each head at the last position writes, beside what removing it does.
print(nodes(model, clean, target, ["direct", "act_grad", "ablation"], 6, bos=True))
