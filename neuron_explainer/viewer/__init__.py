"""The pages in a browser, as built files; their sources are in ``viewer/`` at the top of the repository.

The server hands out what :data:`FILES` lists and nothing else. ``npm ci && npm run build`` in ``viewer/``
writes them again; nobody needs that to use them.
"""

from pathlib import Path

DIST = Path(__file__).parent / "dist"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "chunk.js": "text/javascript; charset=utf-8",
    "more.js": "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "embed.js": "text/javascript; charset=utf-8",
    "embed.css": "text/css; charset=utf-8",
    "THIRD_PARTY_LICENSES.txt": "text/plain; charset=utf-8",
}
"""The files in :data:`DIST`, and what they are."""
