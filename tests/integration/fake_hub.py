"""A Hugging Face Hub on this machine, good and bad: what a repository is called says how the server behaves for it."""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!doctype html><title>Sign in</title>Welcome to the hotel's network"
LARGE = (".safetensors", ".parquet")  # are stored by their sha256
Files = Mapping[str, bytes]


@contextmanager
def serve(repositories: Mapping[str, Files], *, slow_s: float = 1.3) -> Iterator[tuple[str, list[str]]]:
    """(address, paths asked for). A repository called `bad/NAME...` misbehaves as the handler's method `_NAME`."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"repositories": repositories, "asked": asked, "slow_s": slow_s})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Mapping[str, Files] = {}
    asked: list[str] = []  # noqa: RUF012
    slow_s = 1.3

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.asked.append(path)
        parts = [part for part in path.split("/") if part]
        api = parts[:1] == ["api"]
        parts = parts[1:] if api else parts
        parts = parts[1:] if parts[:1] in (["models"], ["datasets"]) else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        files = self.repositories.get(name)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.files = files or {}
            mode = name.removeprefix("bad/").partition("-")[0]
            behave = getattr(self, f"_{mode}", None) if name.startswith("bad/") else None
            if behave is not None and behave(api, "/".join(rest[2:])):
                return
            if files is None:
                self._error(404, "RepoNotFound")
            elif api:
                self._api(name, files, rest)
            elif rest[:1] == ["resolve"] and "/".join(rest[2:]) in files:
                self._file("/".join(rest[2:]), files["/".join(rest[2:])])
            else:
                self._error(404, "EntryNotFound")

    # ---- what a good server says

    def _api(self, name: str, files: Files, rest: list[str]) -> None:
        if rest[:1] == ["tree"]:
            self._json(
                _tree(files, "/".join(rest[2:]), deep=self.query.get("recursive", ["false"])[0].lower() == "true")
            )
        elif rest[:1] == ["paths-info"]:
            asked = json.loads(self.body)["paths"] if self.body.startswith("{") else parse_qs(self.body)["paths"]
            everything = {
                entry["path"]: entry for entry in [*_tree(files, "", deep=True), *_tree(files, "", deep=False)]
            }
            self._json([everything[path] for path in asked if path in everything])
        else:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings, "downloads": 0})

    def _file(self, path: str, content: bytes, *, promised: int | None = None, etag: str | None = None) -> None:
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag or _etag(path, content)}"')
        self.send_header("Content-Length", str((promised or len(content)) - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[start:])
        if promised:
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str, **headers: str) -> bool:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        return True

    def _error(self, status: int, code: str = "") -> bool:
        return self._send(status, b'{"error": "no"}', "application/json", X_Error_Code=code, X_Error_Message=code)

    # ---- what bad ones say; True: the request is answered

    def _private(self, api: bool, path: str) -> bool:
        return self._error(401, "RepoNotFound")

    def _gated(self, api: bool, path: str) -> bool:
        return not api and self._error(403, "GatedRepo")

    def _busy(self, api: bool, path: str) -> bool:
        return self._error(429)

    def _broken(self, api: bool, path: str) -> bool:
        return self._error(500)

    def _portal(self, api: bool, path: str) -> bool:
        """HTML in place of everything, as networks do before one has signed in."""
        return self._send(200, HTML, "text/html")

    def _html(self, api: bool, path: str) -> bool:
        if path != "config.json":
            return False
        self._file(path, HTML)
        return True

    def _slow(self, api: bool, path: str) -> bool:
        time.sleep(self.slow_s)
        return False

    def _cut(self, api: bool, path: str) -> bool:
        """A body that ends before the length that its header says."""
        if api or not path.endswith(LARGE) or self.command == "HEAD":
            return False
        content = self.files[path]
        self._file(path, content[: len(content) // 2], promised=len(content), etag=_etag(path, content))
        return True

    def _short(self, api: bool, path: str) -> bool:
        """Half of a file, and a header that says that this is all."""
        if api or not path.endswith(LARGE) or self.command == "HEAD":
            return False
        content = self.files[path]
        self._file(path, content[: len(content) // 2], etag=_etag(path, content))
        return True

    def _flipped(self, api: bool, path: str) -> bool:
        """A file of the right length with another content than its sha256 promises."""
        if api or not path.endswith(LARGE):
            return False
        content = self.files[path]
        self._file(path, content[:-1] + bytes([content[-1] ^ 1]), etag=_etag(path, content))
        return True

    def _loop(self, api: bool, path: str) -> bool:
        return self._send(302, b"", "text/plain", Location=self.path)

    def _closed(self, api: bool, path: str) -> bool:
        self.close_connection = True
        return True


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path.endswith(LARGE) else hashlib.sha1(content).hexdigest()


def _tree(files: Files, folder: str, *, deep: bool) -> list[dict[str, Any]]:
    """What is in a folder: its files and folders, or all files below it."""
    start = f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(start)}
    if deep:
        return [_entry(path, content) for path, content in inside.items()]
    names = sorted({path.removeprefix(start).partition("/")[0] for path in inside})
    return [
        _entry(start + name, inside[start + name])
        if start + name in inside
        else {"type": "directory", "path": start + name, "oid": "0" * 40, "size": 0}
        for name in names
    ]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(path, content), "size": len(content), "pointerSize": 134}
    return entry
