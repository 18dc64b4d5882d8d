"""A Hugging Face hub for one repository, in this process: what is uploaded can be downloaded. Nothing else works."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "me/model"


class Handler(BaseHTTPRequestHandler):
    files: dict[str, bytes]

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr([(name, len(data)) for name, data in self.files.items()]).encode()).hexdigest()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        end = self.path.rsplit("/", 1)[-1]
        if self.path == "/api/repos/create":
            found: object = {"url": f"http://{self.headers['Host']}/{REPOSITORY}", "name": REPOSITORY}
        elif "/preupload/" in self.path:
            found = {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                               for file in json.loads(text)["files"]]}  # fmt: skip
        elif "/commit/" in self.path:
            for line in map(json.loads, text.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            found = {
                "commitUrl": f"http://{self.headers['Host']}/{REPOSITORY}/commit/{self.commit}",
                "commitOid": self.commit,
            }
        else:
            found = {"errors": [], "warnings": [], "end": end}  # validate-yaml
        self.answer(json.dumps(found).encode())

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "oid": "0", "size": len(data)} for name, data in self.files.items()]
            self.answer(json.dumps(tree).encode())
            return
        if self.path.startswith(f"/api/models/{REPOSITORY}"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer(json.dumps({"id": REPOSITORY, "sha": self.commit, "siblings": siblings}).encode())
            return
        name = self.path.split("/resolve/")[-1].split("/", 1)[-1]
        if name in self.files:
            etag = hashlib.sha1(self.files[name]).hexdigest()
            self.answer(self.files[name], X_Repo_Commit=self.commit, ETag=f'"{etag}"')
        else:
            self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)

    do_HEAD = do_GET


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    """(address, the files of the repository by path)."""
    files: dict[str, bytes] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Filled", (Handler,), {"files": files}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", files
    finally:
        server.shutdown()
        server.server_close()
