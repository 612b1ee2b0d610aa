"""A bucket on localhost, in the JSON API that Arrow's ``gs://`` file system speaks: python gcs_server.py FOLDER.

A process of its own, because that file system may hold the interpreter's lock while it waits for an answer. Serves the
folder's files as ``gs://b/log/NAME`` and prints its port. ``/cut?times=N`` has the next N large answers end in the
middle and tells how many did so far.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 1000


class Bucket(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.cuts = self.cut = 0

    def objects(self) -> dict[str, Path]:
        return {f"log/{path.name}": path for path in self.folder.iterdir()}


class Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        objects = self.server.objects()
        if url.path == "/cut":
            self.server.cuts = int(query["times"])
            self._answer(200, str(self.server.cut).encode())
            return
        if url.path == "/storage/v1/b/b/o":
            named = [name for name in objects if name.startswith(query.get("prefix", ""))]
            self._answer(200, json.dumps({"items": [self._about(name, objects[name]) for name in named]}).encode())
            return
        name = unquote(url.path.rsplit("/o/", 1)[-1] if "/o/" in url.path else url.path.removeprefix("/b/"))
        if name not in objects:
            self._answer(404, b"{}")
        elif "/o/" in url.path and query.get("alt") != "media":
            self._answer(200, json.dumps(self._about(name, objects[name])).encode())
        else:
            self._media(objects[name].read_bytes())

    def _about(self, name: str, path: Path) -> dict[str, Any]:
        size = str(path.stat().st_size)
        return {"kind": "storage#object", "bucket": "b", "name": name, "size": size, "generation": "1"}

    def _media(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self._answer(200, data)
            return
        start, _, end = asked.removeprefix("bytes=").partition("-")
        low, high = int(start), min(int(end), len(data) - 1) if end else len(data) - 1
        self._answer(206, data[low : high + 1], {"Content-Range": f"bytes {low}-{high}/{len(data)}"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.cuts and status == 206 and len(body) > LARGE:
            self.server.cuts -= 1
            self.server.cut += 1
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with Bucket(Path(sys.argv[1])) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
