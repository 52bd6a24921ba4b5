"""What somebody at the pages waits for, measured in a headless Chromium by the browser's own clock.

The server is the command that a user types, with its model, on this machine. "Painted" is the second
animation frame after the change of the document: the first one draws it. Where there is no Chromium the
rows say so. Two stores are looked at: the shipped ones, and one of 32,768 latents with 40 random examples of
64 tokens for each.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from neuron_explainer.analysis.store import ExampleStore
from neuron_explainer.analysis.workspace import DATA_VARIABLE
from neuron_explainer.viewer.export import page_of_unit
from tests.browser.running import NoBrowser, Server, chromium, chromium_path

SOURCES = Path(__file__).parents[1] / "viewer"
TINY = "ae-resid-delta-mlp.2"
PROMPT = "#/p?a=The+queen+went+into+the+forest%2C+and+when&t=%5B%22+she%22%5D&d=%5B%22+he%22%5D"
PAGES = (f"#/f/{TINY}/3", PROMPT, f"#/d/{TINY}", "#/m/2/mlp.post_act")
"""The pages of which accessibility is counted: a feature, a prompt, a dictionary, the model."""
WAIT_MS = 60_000
_REST_S = 0.6  # after half a second on a unit, its neighbours are fetched

PROBE = """
window.bench = {
    // When a test first holds and the frame with it has been drawn.
    painted: (test) => new Promise((done) => {
        const two = () => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now())));
        if (test()) return two();
        const observer = new MutationObserver(() => {
            if (!test()) return;
            observer.disconnect();
            two();
        });
        observer.observe(document, { subtree: true, childList: true, attributes: true, characterData: true });
    }),
    // Milliseconds from the next key to a painted test.
    after_key: (test) => new Promise((done) => {
        let start = null;
        addEventListener('keydown', (event) => { start = event.timeStamp; }, { capture: true, once: true });
        bench.painted(() => start !== null && test()).then((end) => done(end - start));
    }),
    has: (selector) => document.querySelector(selector) !== null,
    title: () => document.querySelector('main h1')?.textContent,
    busy: () => bench.has('.page > [aria-busy=true]'),
    card: () => bench.has('#panel-examples .example .t') && bench.has('#panel-values .bar') && !bench.busy(),
    next: () => {
        const before = bench.title();
        return bench.after_key(() => bench.title() !== before && bench.card());
    },
    // Points that a canvas has drawn, and when the last one was.
    dots: { count: 0, last: 0 },
};
const fill = CanvasRenderingContext2D.prototype.fill;
CanvasRenderingContext2D.prototype.fill = function (...given) {
    bench.dots.count++;
    bench.dots.last = performance.now();
    return fill.apply(this, given);
};
"""
COLD = """() => { window.cold = Promise.all([
    bench.painted(bench.card),
    bench.painted(() => bench.card() && bench.has('#panel-logits table')),
]); }"""
COLD_TIMES = """async () => {
    const [card, logits] = await cold;
    return [performance.getEntriesByName('first-contentful-paint')[0].startTime, card, logits];
}"""
MAP_DRAWN = """(n) => new Promise((done) => {
    let still = 0;
    const look = () => {
        const quiet = bench.dots.count >= n && performance.now() - bench.dots.last > 100;
        if (!quiet) return requestAnimationFrame(look);
        const replies = performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/map'));
        const reply = replies[replies.length - 1];
        done([bench.dots.last - reply.responseEnd, bench.dots.last]);
    };
    look();
})"""
TABLE_PAINTED = """bench.painted(() => bench.has('table.nodes tbody tr[data-key]')
    && !bench.has('.page [aria-busy=true]'))"""
ABLATED = """() => bench.after_key(() => bench.has('.tray li') && !bench.has('.page [aria-busy=true]')
    && document.querySelector('.tray-sum')?.dataset.after)"""


@dataclass
class Rows:
    """Lines of a table: what, two figures, a remark, the goal."""

    lines: list[str] = field(default_factory=list)

    def add(self, what: str, figure: str, goal: str, remark: str = "", second: str = "") -> None:
        """A line."""
        self.lines.append(f"| {what} | {figure} | {second} | {goal} | {remark} |")

    def times(self, what: str, milliseconds: list[float], goal: str, remark: str = "") -> None:
        """A line of a median and a 95th percentile."""
        p50, p95 = np.quantile(milliseconds, [0.5, 0.95])
        self.add(
            f"{what}, ms", f"{p50:,.0f}", goal, f"n = {len(milliseconds)}{remark}", f"{p95:,.0f}"
        )


def run(folder: Path, large: Path, quick: bool) -> str:
    """Measure, and return a table.

    Args:
        folder: for what is written.
        large: the folder of the store of random examples; the store is called ``large``.
        quick: show only that it runs.
    """
    rows = Rows(["| what | p50 or figure | p95 | goal | remark |", "|---|--:|--:|---|---|"])
    _files(rows, large, quick)
    try:
        _in_browser(rows, folder, large, quick)
    except NoBrowser as error:
        rows.add("everything that a browser shows", "-", "", f"not measured: {error}")
    return "\n".join(rows.lines)


# --- what needs no browser ---


def _files(rows: Rows, large: Path, quick: bool) -> None:
    names = json.loads((SOURCES / "package-lock.json").read_text("utf-8"))["packages"]
    packages = {name: found for name, found in names.items() if name}
    shipped = [name for name, found in packages.items() if not found.get("dev")]
    rows.add("npm packages in the lock file", str(len(packages)), "60")
    rows.add("npm packages shipped", str(len(shipped)), "3")
    lines = Counter[str]()
    for path in sorted((SOURCES / "src").rglob("*.*")):
        lines[path.suffix] += len(path.read_text("utf-8").splitlines())
    script = lines[".js"] + lines[".jsx"]
    rows.add("lines of JavaScript", f"{script:,}", "6,000", f"and {lines['.css']:,} of CSS")
    with (
        ExampleStore.open("tiny-tales/ae-resid-delta-mlp/2") as store,
        ExampleStore.open(large) as made,
    ):
        for name, found in (("tiny-tales", store), ("40 random examples of 64 tokens", made)):
            units = found.alive[:: max(1, len(found.alive) // (2 if quick else 40))].tolist()
            sizes = [len(page_of_unit(found, unit).encode()) for unit in units]
            rows.add(
                f"a feature as one file, bytes, {name}",
                f"{np.median(sizes):,.0f}",
                "60,000",
                f"the largest of {len(sizes)} is the second figure",
                f"{max(sizes):,}",
            )
        text = sum(path.stat().st_size for path in made.tokens.folder.iterdir())
        total = (36 * 32_768 / len(made) * made.path.stat().st_size + text) / 2**30
        rows.add(
            "36 dictionaries' cards on disk, GiB",
            f"{total:.3f}",
            "2.0",
            "32,768 latents each, with 10 partners; the text included",
        )


# --- in the browser ---


def _in_browser(rows: Rows, folder: Path, large: Path, quick: bool) -> None:
    chromium_path()  # before a server is started for nothing
    with ExampleStore.open(large) as store:
        n = len(store)
    autoencoder = _autoencoder(folder / "autoencoder", n)
    flags = ["--store", "tiny-tales", "--store", str(large), "--autoencoder", str(autoencoder)]
    with Server.start(*flags, **{DATA_VARIABLE: str(folder)}) as server:
        server.wait_for_model()
        _cold(rows, server, 2 if quick else 15)
        with chromium() as browser:
            _weight(rows, browser, server)
            _steps(rows, browser, server, 3 if quick else 60)
            _heap(rows, browser, server, 3 if quick else 100)
            _map(rows, browser, server, n, 1 if quick else 3)
            _ablation(rows, browser, server, 2 if quick else 12)
            _panels(rows, browser, server, PAGES[:1] if quick else PAGES)


def _autoencoder(folder: Path, n: int) -> Path:
    """Random directions, in the stream of ``tiny-tales``, for the latents of the large store."""
    from neuron_explainer.models.autoencoder import Autoencoder
    from neuron_explainer.models.transformer import Transformer

    width = Transformer.load("tiny-tales").cfg.d_model
    Autoencoder(n, width, location="2/resid.torso.delta_mlp").save(folder)
    return folder


@contextmanager
def opened(browser: Any, server: Server, route: str | None, **settings: Any) -> Iterator[Any]:
    """A page in a browser context of its own, which knows nothing yet; None: an empty page."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, **settings)
    context.set_default_timeout(WAIT_MS)
    context.add_init_script(PROBE)
    page = context.new_page()
    if route is not None:
        page.goto(server.url_of(route), wait_until="commit")
    try:
        yield page
    finally:
        context.close()


def _cold(rows: Rows, server: Server, rounds: int) -> None:
    """Each time in a browser that has just been started."""
    found = []
    for _ in range(rounds):
        with chromium() as fresh, opened(fresh, server, PAGES[0]) as page:
            page.evaluate(COLD)
            found.append(page.evaluate(COLD_TIMES))
    first, card, logits = (list(times) for times in zip(*found, strict=True))
    rows.times(
        "first contentful paint, cold start", first, "150 (p50)", "; a new browser each time"
    )
    rows.times(
        "full card painted, cold start", card, "250", "; examples, histogram, figures, labels"
    )
    rows.times("with what the model says of it", logits, "", "; asked for after 120 ms of rest")


def _weight(rows: Rows, browser: Any, server: Server) -> None:
    with opened(browser, server, None) as page:
        cdp = page.context.new_cdp_session(page)
        cdp.send("Network.enable")
        places, sizes = dict[str, str](), dict[str, float]()
        replied = "Network.responseReceived"
        cdp.on(replied, lambda e: places.update({e["requestId"]: e["response"]["url"]}))
        ended = "Network.loadingFinished"
        cdp.on(ended, lambda e: sizes.update({e["requestId"]: e["encodedDataLength"]}))
        weights = []
        for route in (PAGES[0], PROMPT):  # the second loads the script of the other pages
            page.goto(server.url_of(route))
            page.wait_for_load_state("networkidle")
            weights.append([(places[id], size) for id, size in sizes.items() if id in places])
    own = f"{server.origin}/"
    outside = [url for url, _ in weights[-1] if not url.startswith((own, "data:", "about:"))]
    first, every = (
        sum(size for url, size in found if "/api/" not in url) / 1000 for found in weights
    )
    data = sum(size for url, size in weights[0] if "/api/" in url) / 1000
    remark = f"HTML, script and style, with headers; its data: {data:.1f} kB"
    rows.add("first screen as transferred, kB", f"{first:.1f}", "60", remark)
    rows.add("all pages as transferred, kB", f"{every:.1f}", "120")
    rows.add("requests to other hosts", str(len(outside)), "0")


def _steps(rows: Rows, browser: Any, server: Server, steps: int) -> None:
    for name, route, rest in (
        ("tiny-tales", f"#/f/{TINY}/3", 0.0),
        ("40 examples of 64 tokens", "#/f/large/1", 0.0),
        ("40 examples of 64 tokens, after 0.6 s of rest", "#/f/large/101", _REST_S),
    ):
        with opened(browser, server, route) as page:
            page.evaluate("bench.painted(bench.card)")
            found = [_step(page, rest) for _ in range(steps)]
        rows.times(f"next feature by key → painted: {name}", found, "50")


def _step(page: Any, rest: float = 0.0) -> float:
    time.sleep(rest)
    page.evaluate("() => { window.step = bench.next(); }")
    page.keyboard.press("ArrowRight")
    return float(page.evaluate("() => step"))


def _heap(rows: Rows, browser: Any, server: Server, steps: int) -> None:
    with opened(browser, server, "#/f/large/1") as page:
        page.evaluate("bench.painted(bench.card)")
        cdp = page.context.new_cdp_session(page)

        def used() -> float:
            cdp.send("HeapProfiler.collectGarbage")
            return float(cdp.send("Runtime.getHeapUsage")["usedSize"]) / 1e6

        found = [used()]
        for _ in range(3):
            for _ in range(steps):
                _step(page)
            found.append(used())
    later = ", ".join(f"{size:.1f}" for size in found[2:])
    rows.add(
        f"heap of the page after {steps} features, MB",
        f"{found[1]:.1f}",
        "bounded",
        f"{found[0]:.1f} with one; after {2 * steps} and {3 * steps}: {later}",
    )


def _map(rows: Rows, browser: Any, server: Server, n: int, rounds: int) -> None:
    found = []
    for _ in range(rounds):
        with opened(browser, server, "#/d/large") as page:
            found.append(page.evaluate(MAP_DRAWN, n))
    drawn, whole = zip(*found, strict=True)
    remark = f"; page opened → drawn: {np.median(whole):,.0f} ms"
    rows.times(f"map of {n:,} points: reply → drawn", list(drawn), "", remark)


def _ablation(rows: Rows, browser: Any, server: Server, rounds: int) -> None:
    """The page's part of it: a model of GPT-2 small's shape is measured without a page."""
    found = []
    with opened(browser, server, PROMPT) as page:
        page.evaluate(TABLE_PAINTED)
        for _ in range(rounds):
            page.evaluate(f"() => {{ window.step = ({ABLATED})(); }}")
            page.keyboard.press("a")
            found.append(float(page.evaluate("() => step")))
            page.keyboard.press("u")
            page.evaluate(
                f"() => bench.painted(() => !bench.has('.tray li')).then(() => {TABLE_PAINTED})"
            )
    rows.times("ablate by key → table painted, tiny-tales", found, "600")


def optional_axe() -> Any:
    """What runs axe-core in a page; None if it is not installed."""
    if find_spec("axe_playwright_python") is None:
        return None
    from axe_playwright_python.sync_playwright import Axe

    return Axe()


def _panels(rows: Rows, browser: Any, server: Server, routes: tuple[str, ...]) -> None:
    from tests.browser.test_accessible import settled
    from tests.browser.test_python import WITHOUT

    axe = optional_axe()
    count, panels, without = 0, 0, list[str]()
    for route in routes:
        for theme in ("light", "dark"):
            with opened(browser, server, route, color_scheme=theme) as page:
                settled(page)
                count += len(axe.run(page).response["violations"]) if axe else 0
                names = page.eval_on_selector_all(
                    ".panel[data-panel]",
                    "all => all.map((one) => [one.dataset.panel, !!one.querySelector('[data-tool=python]')])",
                )
        shown = [(name, found) for name, found in names if name not in WITHOUT]
        panels += len(shown)
        without += [name for name, found in shown if not found]
    rows.add(
        f"axe-core: violations on {len(routes)} pages, light and dark",
        str(count) if axe else "-",
        "0",
        "" if axe else "not measured: axe-playwright-python is not installed",
    )
    rows.add(
        "panels with figures that copy them as Python",
        f"{panels - len(without)} of {panels}",
        "all",
        ", ".join(without),
    )
