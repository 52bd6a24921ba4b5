"""The whole path with a scripted endpoint: what planted latents mean is found, random ones mean nothing."""

import json
import re
from typing import Any

import numpy as np

from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.examples import SetConfig
from neuron_explainer.analysis.explaining.judged import explain_with, score_with
from neuron_explainer.analysis.explaining.reading import Reading
from neuron_explainer.analysis.explaining.work import explain_units, score_units
from tests.analysis.explaining.fake_endpoint import serving
from tests.analysis.explaining.planted import N_PLANTED, Planted
from tests.analysis.explaining.test_judged import texts_in

CONFIG = SetConfig(train=20, test=20)


def literal_model(seen: Any) -> str:
    """A model that names the token that is most often the strongest, and looks for it in texts."""
    properties = seen.body["response_format"]["json_schema"]["schema"]["properties"]
    if "explanation" in properties:
        strongest = re.findall(r'^("(?:[^"\\]|\\.)*") \d+', seen.prompt, re.M)
        best = max(sorted(set(strongest)), key=strongest.count)
        return json.dumps({"explanation": f"the token {best}"})
    statement = re.search(r"the token (\".*\")", seen.prompt)
    assert statement is not None
    word = re.compile(rf"(?<!\w){re.escape(json.loads(statement[1]).strip())}(?!\w)")
    texts = texts_in(seen.prompt)
    return json.dumps({number: bool(word.search(text)) for number, text in texts.items()})


def test_planted_latents_score_high_and_random_ones_do_not(
    planted: Planted, planted_reading: Reading
) -> None:
    units = range(len(planted.store))
    with serving(literal_model) as server:
        judge = EndpointJudge(Endpoint(server.url, "literal"))
        explained = explain_units(
            planted.store,
            units,
            explain_with(judge, "marked"),
            config=CONFIG,
            reading=planted_reading,
            save=False,
            workers=4,
        )
        known = {s.unit: s.explanation for s in explained if s.explanation is not None}
        steps = score_units(
            planted.store,
            [*known],
            score_with(judge, ["detection"]),
            explanations=known,
            config=CONFIG,
            reading=planted_reading,
            save=False,
            workers=4,
            competitors=2,
            explain=explain_with(judge, "marked"),
        )
        scores = {step.unit: step.scores[0] for step in steps if step.scores}
    planted_values = [scores[unit].value for unit in range(N_PLANTED)]
    random_values = [score.value for unit, score in scores.items() if unit >= N_PLANTED]
    assert min(value for value in planted_values if value is not None) > 0.95
    assert np.median([value for value in random_values if value is not None]) < 0.75
    names = {floor.name for floor in scores[0].floors}
    assert names == {"chance", "token set", "other latent", "random autoencoder"}
