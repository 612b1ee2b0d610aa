"""A data set's repository on localhost, with the API that ``hf://`` uses: python hub_server.py FOLDER.

The folder's files are ``hf://datasets/somebody/clicks/log/NAME``.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

from object_server import ObjectHandler, serve

ABOUT, FILES = "/api/datasets/somebody/clicks", "/datasets/somebody/clicks/resolve/main/"


class Handler(ObjectHandler):
    def respond(self, path: str, query: dict[str, str], objects: dict[str, Path]) -> None:
        name = unquote(path.removeprefix(FILES))
        if path in (ABOUT, f"{ABOUT}/revision/main"):
            self.answer(200, json.dumps({"id": "somebody/clicks", "sha": "0" * 40, "siblings": []}).encode())
        elif path == f"{ABOUT}/tree/main":
            self.answer(200, json.dumps([entry("directory", "log", 0)]).encode())
        elif path == f"{ABOUT}/tree/main/log":
            entries = [entry("file", name, file.stat().st_size) for name, file in sorted(objects.items())]
            self.answer(200, json.dumps(entries).encode())
        elif path.startswith(FILES) and name in objects:
            self.media(objects[name].read_bytes())
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})


def entry(kind: str, path: str, size: int) -> dict[str, str | int]:
    return {"type": kind, "path": path, "size": size, "oid": "0" * 40}


if __name__ == "__main__":
    serve(Handler)
