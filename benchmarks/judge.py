"""What asking an endpoint costs apart from the endpoint: requests a second, and prompts built a second.

The endpoint is a scripted one in a process of its own, which answers at once. Prompts ask detection of five
texts of 32 tokens; each reply is written to a transcript. Known replies are read back from it. Explanation
prompts show 40 texts of 32 tokens. The last column counts what this process computed, which on a busy
machine says what an idle one would need.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from neuron_explainer.analysis.explaining.client import Endpoint, EndpointJudge
from neuron_explainer.analysis.explaining.judge import Prompt
from neuron_explainer.analysis.explaining.prompts import (
    Shown,
    explanation_prompt,
    texts_prompt,
)
from neuron_explainer.analysis.explaining.transcript import Transcript
from tests.analysis.explaining.made import WORDS, made_set


def run(quick: bool) -> str:
    """Measure and return a table."""
    n = 50 if quick else 3000
    lines = ["| what | number | a second | ms of CPU each |", "|---|--:|--:|--:|"]
    examples = made_set(40, 20, 20, n_tokens=32)

    def note(what: str, number: int, work: Callable[[], object]) -> None:
        start, before = time.perf_counter(), time.process_time()
        work()
        each = 1000 * (time.process_time() - before) / number
        seconds = time.perf_counter() - start
        lines.append(f"| {what} | {number:,} | {number / seconds:,.0f} | {each:.2f} |")

    note(
        "explanation prompts built",
        n,
        lambda: [explanation_prompt("marked", examples) for _ in range(n)],
    )
    prompts: list[Prompt] = []
    note("detection prompts built", n, lambda: prompts.extend(_detection(n)))
    with tempfile.TemporaryDirectory() as scratch, _served() as url:
        for concurrency in (1, 8):
            path = Path(scratch, f"{concurrency}.jsonl")
            for what in (f"requests, {concurrency} at a time", "known replies"):
                endpoint = Endpoint(url, "fake", concurrency=concurrency)
                judge = EndpointJudge(endpoint, Transcript(path))

                def work(judge: EndpointJudge = judge) -> None:
                    assert all(reply.failure is None for reply in judge.ask(prompts))

                note(what, n, work)
    return "\n".join(lines)


def _detection(n: int) -> list[Prompt]:
    """Prompts that differ."""
    pieces = [WORDS[i % len(WORDS)] for i in range(32)]
    texts = [Shown(pieces)] * 5
    return [texts_prompt("detection", f"the word number {i}", texts, 5) for i in range(n)]


@contextmanager
def _served() -> Iterator[str]:
    command = [sys.executable, "-m", "tests.analysis.explaining.fake_endpoint"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()
