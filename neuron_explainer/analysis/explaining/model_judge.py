"""A judge that is a model of this process.

It continues the text of a prompt, token after token, by the likeliest one. Only a model that follows
instructions answers to the purpose: with the embedded one this shows that the arithmetic is right, no more.
No chat template is applied.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from neuron_explainer.activations.corpus import start_token
from neuron_explainer.analysis.explaining.explanation import Cost, Failure
from neuron_explainer.analysis.explaining.judge import Prompt, Reply, ReplyToken
from neuron_explainer.analysis.explaining.local_judges import understood

if TYPE_CHECKING:
    from neuron_explainer.models.model_context import ModelContext


class ModelJudge:
    """A model of this process as a judge.

    Args:
        context: the model.
        longest: tokens of a reply, at most; a prompt may allow fewer.
    """

    def __init__(self, context: "ModelContext", longest: int = 256) -> None:
        self.context, self.longest = context, longest

    @property
    def name(self) -> str:
        """The model's name."""
        return self.context.model_name

    def ask(self, prompts: Iterable[Prompt]) -> Iterator[Reply]:
        """One reply after the other; a prompt that leaves no room for a reply is a failure."""
        for prompt in prompts:
            yield self._reply(prompt)

    @torch.no_grad()
    def _reply(self, prompt: Prompt) -> Reply:
        context, end = self.context, start_token(self.context)
        asked = [end, *context.encode(prompt.text + "\n")]
        room = min(prompt.max_tokens, self.longest, context.n_context - len(asked))
        if room < 1:
            reason = f"{self.name} reads {context.n_context} tokens, the prompt has {len(asked)}"
            return Reply(failure=Failure("failed", reason))
        model = context.get_or_create_model()
        (new,) = model.sample([asked], room, temperature=0, stop=end)["tokens"]
        reply = understood(prompt, context.decode(new), cost=Cost(1, len(asked), len(new)))
        if not prompt.top_logprobs or not new:
            return reply
        tokens, _ = model.to_batch([[*asked, *new]])
        logits = model(tokens)[0][0, len(asked) - 1 : -1].float()
        best = torch.log_softmax(logits, dim=1).topk(min(prompt.top_logprobs, logits.shape[1]))
        rows = zip(new, best.indices.tolist(), best.values.tolist(), strict=True)
        return replace(
            reply,
            tokens=tuple(
                ReplyToken(
                    context.decode([token]),
                    {context.decode([i]): value for i, value in zip(ids, values, strict=True)},
                )
                for token, ids, values in rows
            ),
        )
