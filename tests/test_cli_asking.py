"""The verbs explain and score with a language model behind an endpoint, which is a scripted one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from neuron_explainer.analysis.explaining import reading
from neuron_explainer.analysis.explaining.http_client import KEY_VARIABLE
from neuron_explainer.analysis.explaining.judged import SCORERS as ASKED
from neuron_explainer.analysis.explaining.prompts import EXPLAINERS
from neuron_explainer.analysis.explaining.work import RULE_SCORERS
from neuron_explainer.cli import explaining, main
from tests.analysis.explaining.fake_endpoint import (
    Answer,
    FakeEndpoint,
    Seen,
    error,
    serving,
)

STORE = "tiny-tales/ae-resid-delta-mlp/2"
KEY = "sk-not-to-be-seen"
UNITS = ["--latents", "11", "22", "33", "--no-model", "--train", "10", "--test", "10"]


def answer(seen: Seen) -> Answer | str:
    """A model that explains, and finds the explanation in every second text."""
    if seen.path.endswith("/embeddings"):
        rows = [{"index": i, "embedding": [len(t), 1.0]} for i, t in enumerate(seen.body["input"])]
        return Answer({"data": rows})
    properties = seen.body["response_format"]["json_schema"]["schema"]["properties"]
    if "explanation" in properties:
        return json.dumps({"explanation": f"something {len(seen.prompt)}"})
    if "texts" in properties:
        numbers = properties["texts"]["properties"]
        return json.dumps({"texts": {n: f"The king had {n} daughters. " * 9 for n in numbers}})
    if "text" in properties:
        return '{"text": "C"}'
    if properties["1"]["type"] == "integer":
        return json.dumps(dict.fromkeys(properties, 1))
    return json.dumps({key: int(key) % 2 == 0 for key in properties})


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NEURON_EXPLAINER_DATA", str(tmp_path))
    return tmp_path


class Shell:
    """Runs verbs that ask an endpoint."""

    def __init__(self, capsys: pytest.CaptureFixture[str], server: FakeEndpoint | None) -> None:
        self.capsys = capsys
        self.flags = [] if server is None else ["--endpoint", server.url, "--judge", "fake"]

    def text(self, verb: str, *flags: str, code: int = 0) -> str:
        assert main([verb, STORE, *self.flags, *flags]) == code
        found = self.capsys.readouterr()
        return found.err if code else found.out

    def json(self, verb: str, *flags: str) -> Any:
        return json.loads(self.text(verb, *flags, "--json"))


def test_a_model_explains_and_judges_and_is_not_asked_twice(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with serving(answer) as server:
        shell = Shell(capsys, server)
        preview = shell.json("explain", *UNITS, "--dry-run")["asked"]
        assert server.seen == []
        assert [path.name for path in folder.iterdir()] == []  # nothing is written either
        found = shell.json("explain", *UNITS)
        assert len(server.seen) == preview["calls"] == found["asked"]["spent"]["requests"]
        assert preview["known"] == 0
        first = found["units"][0]
        assert first["explanation"]["text"].startswith("something")
        assert (first["explanation"]["method"], first["explanation"]["model"]) == ("marked", "fake")
        names = [score["name"] for score in first["scores"]]
        assert names == ["detection", "fuzzing", "embedding"]
        detection = first["scores"][0]
        assert detection["judge"] == "fake"
        assert {floor["name"] for floor in detection["floors"]} == {"chance", "token set"}
        n = len(server.seen)
        again = shell.json("explain", *UNITS)
        assert [unit["scores"] for unit in again["units"]] == [u["scores"] for u in found["units"]]
        assert len(server.seen) == n  # from the workspace
        (folder / "workspace.sqlite").unlink()
        anew = shell.json("explain", *UNITS, "--concurrency", "1")
        assert anew["units"] == found["units"]  # from the transcript, whatever the concurrency
        assert len(server.seen) == n
        after = shell.json("explain", *UNITS, "--dry-run")["asked"]
        assert (after["calls"], after["known"]) == (0, n)
    assert main(["inspect", STORE, "11", "--no-model"]) == 0
    assert "something" in capsys.readouterr().out
    written = b"".join(path.read_bytes() for path in folder.iterdir())
    assert b"something" in written
    assert KEY.encode() not in written
    assert server.seen[0].headers["Authorization"] == f"Bearer {KEY}"


def test_all_that_a_model_can_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(answer) as server:
        shell = Shell(capsys, server)
        flags = [*UNITS, "--method", "contrastive", "--no-score"]
        shell.json("explain", *flags)
        found = shell.json(
            "score",
            *(*UNITS, "--method", "contrastive", "--embedding-model", "vectors"),
            *("--scorers", *explaining.SCORERS, "max-token", "intruder", "--competitors", "1"),
        )
    scores = {score["name"]: score for score in found["units"][0]["scores"]}
    assert [*scores] == [*explaining.SCORERS, "max-token", "intruder"]
    assert scores["embedding"]["judge"] == "vectors"
    assert {"chance", "other latent"} <= {f["name"] for f in scores["max-token"]["floors"]}
    assert "other latent" not in {f["name"] for f in scores["intruder"]["floors"]}
    assert any(seen.body["model"] == "vectors" for seen in server.seen)


def test_texts_that_a_model_writes_are_read_by_the_latents_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    units = ["--latents", "11", "22", *UNITS[5:], "--most-tokens", "4000"]
    with serving(answer) as server:
        shell = Shell(capsys, server)
        flags = [*units, "--scorers", "generation", "--texts-per-prompt", "5"]
        calls = shell.json("explain", *flags, "--dry-run")["asked"]["calls"]
        found = shell.json("explain", *flags)
        assert calls == len(server.chats()) == 4
        scores = [unit["scores"][0] for unit in found["units"]]
        assert {score["metric"] for score in scores} == {"share of texts"}
        assert all(0 <= score["value"] <= 1 for score in scores)
        assert scores[0]["floors"][0]["name"] == "usual texts"
        assert "generation: the model is needed" in shell.text(
            "score", *UNITS, "--scorers", "generation", code=2
        )


def test_the_cost_is_said_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--prompt-price", "1000", "--completion-price", "2000"]
    with serving(answer) as server:
        shell = Shell(capsys, server)
        before = shell.text("explain", *UNITS, *prices, "--dry-run")
        assert re.search(r"requests to fake at http://127.0.0.1:\d+/v1", before)
        assert re.search(r"price about \d+\S*, at most \d+", before)
        assert server.seen == []
        after = shell.text("explain", *UNITS, *prices)
        price = (100 * 1000 + 10 * 2000) * len(server.seen) / 1e6
        assert f"price {price:.4g}; kept in" in after


def test_a_budget_and_a_refusal_end_the_work_and_keep_what_is_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(answer) as server:
        shell = Shell(capsys, server)
        message = shell.text("explain", *UNITS, "--max-requests", "5", code=2)
        assert "budget of 5 requests" in message
        assert len(server.seen) == 5
        calls = shell.json("explain", *UNITS, "--dry-run")["asked"]
        assert calls["known"] == 5
        shell.json("explain", *UNITS)
        assert len(server.seen) == 5 + calls["calls"]
    with serving(lambda seen: error(401, "no")) as server:
        message = Shell(capsys, server).text("explain", *UNITS, code=2)
        assert f"{KEY_VARIABLE} is not set" in message
        assert len(server.seen) <= 16


def test_failed_requests_are_asked_again_and_the_rest_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = [True]

    def script(seen: Seen) -> Answer | str:
        long = "explanation" not in json.dumps(seen.body["response_format"])
        if broken[0] and long and "Text 4" not in seen.prompt:
            return error(400, "no")
        return answer(seen)

    with serving(script) as server:
        shell = Shell(capsys, server)
        flags = [*UNITS, "--scorers", "detection", "--texts-per-prompt", "4"]
        counts = [u["scores"][0]["counts"] for u in shell.json("explain", *flags)["units"]]
        for each in counts:
            assert each["failed"] == sum(each.values()) % 4  # the texts of the unit's last prompt
        n_failed = sum(each["failed"] > 0 for each in counts)
        assert n_failed > 0
        broken[0] = False
        before = len(server.seen)
        again = [u["scores"][0]["counts"] for u in shell.json("explain", *flags)["units"]]
        assert [sum(each.values()) for each in again] == [sum(each.values()) for each in counts]
        assert not any(each["failed"] for each in again)
        assert len(server.seen) - before == n_failed


def test_the_server_is_looked_for_before_the_model_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("the model read")

    monkeypatch.setattr(reading, "read_again", read)
    units = ["--latents", "11", *SOME]
    assert "there is no answer at" in Shell(capsys, None).text("explain", *units, code=2)


SOME = ["--endpoint", "http://127.0.0.1:9", "--judge", "x"]  # where nobody listens


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "marked"], "marked: a language model is asked; give --endpoint"),
        (["--scorers", "intruder"], "intruder: a language model is asked; give --endpoint"),
        (["--judge", "x"], "--judge is for an endpoint: give --endpoint"),
        (["--endpoint", "http://127.0.0.1:1"], "give --judge"),
        ([*SOME, "--texts-per-prompt", "0"], "texts_per_prompt must be 1 to 50"),
        ([*SOME, "--competitors", "-1"], "--competitors must be at least 0"),
        ([*SOME, "--max-price", "2"], "needs the prices of a million tokens"),
        (["--endpoint", "http://example.org", "--judge", "x"], "accepted from this machine only"),
        (["--endpoint", "http://127.0.0.1:9/v1", "--judge", "x"], "there is no answer at"),
        (
            ["--endpoint", "http://127.0.0.1:9", "--judge", "x", "--method", "marked-logits"],
            "--method marked-logits reads the model; leave --no-model out",
        ),
    ],
)
def test_what_cannot_be_asked(
    capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert message in Shell(capsys, None).text("explain", *UNITS, *flags, code=2)


def test_the_lists_of_the_command_line_are_those_of_the_library() -> None:
    assert explaining.PROMPTS == EXPLAINERS
    assert explaining.SCORERS == RULE_SCORERS
    assert set(explaining.JUDGED) == set(ASKED) - set(RULE_SCORERS) | {"generation"}


def test_explanations_go_to_other_programs_and_come_back(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    with serving(answer) as server:
        Shell(capsys, server).json("explain", *UNITS, "--scorers", "detection", "simulation")
    shell = Shell(capsys, None)
    out = folder / "out"
    for name, source in (("neuronpedia", ""), ("openai", "/2"), ("delphi", "")):
        there = out / name
        found = shell.json("export-explanations", "--format", name, "--out", str(there))
        assert (found["explanations"], found["without_scores"]) == (3, 0)
        for path in folder.glob("workspace.sqlite*"):
            path.unlink()
        back = shell.json("import-explanations", f"{there}{source}", "--format", name)
        assert back["explanations"] == 3
        assert back["scores"] == {"neuronpedia": 6, "openai": 3, "delphi": 3}[name]
        assert main(["inspect", STORE, "22", "--no-model"]) == 0
        assert "something" in capsys.readouterr().out
        with serving(
            answer
        ) as server:  # the workspace is as it was; nothing is asked but what was lost
            Shell(capsys, server).json("explain", *UNITS, "--scorers", "detection", "simulation")
    text = shell.text("export-explanations", "--format", "delphi", "--out", str(out / "x"))
    assert "3 explanations of" in text
    assert "no explanations yet" in shell.text(
        *("export-explanations", "--format", "delphi", "--out", str(out), "--method", "tokens"),
        code=2,
    )
    assert "holds no results of delphi" in shell.text(
        "import-explanations", str(folder), "--format", "delphi", code=2
    )
