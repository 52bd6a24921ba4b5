"""Any causal language model of transformers behind the same hooks (pip install ".[hf]").

A real one is ``HuggingFaceModelContext("EleutherAI/pythia-70m-deduped")`` or a local folder; to run
without a network this example makes a small random Pythia of its own.
"""

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from neuron_explainer.errors import NeuronExplainerError
from neuron_explainer.models.hooks import TransformerHooks
from neuron_explainer.models.huggingface.context import HuggingFaceModelContext

torch.manual_seed(0)
config = GPTNeoXConfig(
    vocab_size=100,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
context = HuggingFaceModelContext.from_model(GPTNeoXForCausalLM(config).eval())
model = context.get_or_create_model()
tokens = torch.randint(0, 100, (2, 10))

with torch.no_grad():
    # The same locations and the same tree of hooks as for GPT-2.
    found = model.capture(tokens, ["mlp.post_act", "2/resid.torso.post_mlp"])
    print(found)

    hooks = TransformerHooks().append_at("1/mlp.post_act", torch.zeros_like)
    change = model(tokens, hooks=hooks)[0] - model(tokens)[0]
    print(f"without the MLP of layer 1 the logits move by up to {change.abs().max():.3f}")

    # Pythia's attention and MLP read the same stream in parallel: there is nothing between them.
    try:
        model.capture(tokens, "1/resid.torso.post_attn")
    except NeuronExplainerError as error:
        print(error)
