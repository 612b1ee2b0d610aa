"""Common code of the fake object stores on localhost: range requests, and responses that break off on demand."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

LARGE = 1000


class ObjectServer(ThreadingHTTPServer):
    """Serves a folder's files as ``log/NAME``.

    ``/cut?times=N`` has the next N large answers end in the middle and tells how many did so far.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[ObjectHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.folder = folder
        self.cuts = self.cut = 0

    def objects(self) -> dict[str, Path]:
        return {f"log/{path.name}": path for path in self.folder.iterdir()}


class ObjectHandler(BaseHTTPRequestHandler):
    server: ObjectServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/cut":
            self.server.cuts = int(query["times"])
            self.answer(200, str(self.server.cut).encode())
        else:
            self.respond(url.path, query, self.server.objects())

    def respond(self, path: str, query: dict[str, str], objects: dict[str, Path]) -> None:
        raise NotImplementedError

    def media(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if asked is None:
            self.answer(200, data)
            return
        start, _, end = asked.removeprefix("bytes=").partition("-")
        low, high = int(start), min(int(end), len(data) - 1) if end else len(data) - 1
        self.answer(206, data[low : high + 1], {"Content-Range": f"bytes {low}-{high}/{len(data)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
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


def serve(handler: type[ObjectHandler]) -> None:
    """Serves the folder that the command line names, and prints the port."""
    with ObjectServer(Path(sys.argv[1]), handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
