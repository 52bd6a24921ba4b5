"""Makes the pictures of the README: ``python docs/screenshots.py``.

It needs the extras ``serve`` and ``browser``, Chromium (see ``tests/browser/running.py``) and Pillow, which
comes with matplotlib. The pictures have few colours, so that each stays below 150 kB.
"""

import io
import sys
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import Page

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tests.browser.running import Server, chromium

MOST_BYTES = 150_000
TEXT = "The queen went into the forest, and when"
PROMPT = {"a": TEXT, "t": '[" she"]', "d": '[" he"]'}
PICTURES = {
    "feature": ("light", "#/f/ae-resid-delta-mlp.2/3"),
    "prompt": (
        "light",
        "#/p?" + urlencode({**PROMPT, "b": '"The prince went into the dark forest, and when"'}),
    ),
    "attention": ("dark", "#/p?" + urlencode({**PROMPT, "tab": "attention", "head": "3.4"})),
    "model": ("dark", "#/m/2/mlp.post_act"),
}


def picture(page: Page, path: Path) -> int:
    """Write what a page shows; returns its size in bytes."""
    found = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    # Median cut would drop the rare colours: a small orange dot among greys.
    few = found.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    return path.stat().st_size


def main() -> None:
    """Open each page once, wait until it is complete, and write its picture."""
    with Server.start() as server, chromium() as browser:
        server.wait_for_model()
        for name, (theme, route) in PICTURES.items():
            page = browser.new_page(
                viewport={"width": 1440, "height": 900},
                color_scheme="dark" if theme == "dark" else "light",
                reduced_motion="reduce",
            )
            page.goto(server.url_of(route))
            page.wait_for_selector("main .page h1", state="attached")
            page.wait_for_timeout(1500)
            page.wait_for_load_state("networkidle")
            size = picture(page, HERE / f"{name}.png")
            print(f"docs/{name}.png: {size / 1000:.0f} kB")
            if size > MOST_BYTES:
                raise SystemExit(
                    f"{name}.png is larger than {MOST_BYTES:,} bytes: use fewer colours"
                )
            page.close()


if __name__ == "__main__":
    main()
