"""A bucket on localhost, with the JSON API that Arrow's ``gs://`` file system uses: python gcs_server.py FOLDER.

A process of its own, because that file system may hold the interpreter's lock while it waits for an answer. The
folder's files are ``gs://b/log/NAME``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from object_server import ObjectHandler, serve


class Handler(ObjectHandler):
    def respond(self, path: str, query: dict[str, str], objects: dict[str, Path]) -> None:
        if path == "/storage/v1/b/b/o":
            named = [name for name in objects if name.startswith(query.get("prefix", ""))]
            self.answer(200, json.dumps({"items": [about(name, objects[name]) for name in named]}).encode())
            return
        name = unquote(path.rsplit("/o/", 1)[-1] if "/o/" in path else path.removeprefix("/b/"))
        if name not in objects:
            self.answer(404, b"{}")
        elif "/o/" in path and query.get("alt") != "media":
            self.answer(200, json.dumps(about(name, objects[name])).encode())
        else:
            self.media(objects[name].read_bytes())


def about(name: str, path: Path) -> dict[str, Any]:
    size = str(path.stat().st_size)
    return {"kind": "storage#object", "bucket": "b", "name": name, "size": size, "generation": "1"}


if __name__ == "__main__":
    serve(Handler)
