"""The viewer's built files, read once when the server starts. A request never opens a file."""

import gzip
import hashlib
import mimetypes
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from neuron_explainer.errors import SourceError
from neuron_explainer.server.replies import takes_gzip
from neuron_explainer.server.security import PUBLIC

DIST = Path(__file__).parents[1] / "viewer" / "dist"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".json": "application/json",
    ".map": "application/json",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}
_NO_PAGES = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>neuron_explainer</title>
<p>The API answers under <code>api/v1/</code>. The pages have not been built: run
<code>npm ci &amp;&amp; npm run build</code> in <code>viewer/</code>.</p></html>"""


@dataclass(frozen=True)
class Page:
    """A file of the viewer."""

    content: bytes
    media_type: str

    @cached_property
    def compressed(self) -> bytes:
        """The content for clients that take gzip."""
        return gzip.compress(self.content, 9, mtime=0)

    @cached_property
    def etag(self) -> str:
        """A hash of the content."""
        return f'W/"{hashlib.blake2b(self.content, digest_size=12).hexdigest()}"'


def read_pages(folder: Path = DIST) -> dict[str, Page]:
    """The files of the viewer by their paths, ``index.html`` also as ``/``.

    Symbolic links are refused, and so is whatever they lead to.
    """
    found: dict[str, Page] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        inside = path.resolve().is_relative_to(folder.resolve())
        if path.is_symlink() or not inside:
            raise SourceError(f"{path} is a symbolic link: the viewer's files must be files.")
        if path.is_file():
            name = "/" + path.relative_to(folder).as_posix()
            kind = TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0]
            found[name] = Page(path.read_bytes(), kind or "application/octet-stream")
    found["/"] = found.get("/index.html") or Page(_NO_PAGES, TYPES[".html"])
    return found


def pages_router(pages: dict[str, Page]) -> APIRouter:
    """A public route for each file."""
    router = APIRouter(include_in_schema=False)

    def add(name: str, page: Page) -> None:
        @router.get(name, name=f"page {name}", **PUBLIC)
        async def read(request: Request) -> Response:
            headers = {"ETag": page.etag, "Vary": "Accept-Encoding"}
            if page.etag in request.headers.get("if-none-match", ""):
                return Response(status_code=304, headers=headers)
            if not takes_gzip(request):
                return Response(page.content, headers=headers, media_type=page.media_type)
            headers["Content-Encoding"] = "gzip"
            return Response(page.compressed, headers=headers, media_type=page.media_type)

    for name, page in pages.items():
        add(name, page)
    return router
