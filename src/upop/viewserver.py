"""The page of `upop view`: a small HTTP server for the person at this machine, and nobody else.

Listens on 127.0.0.1 only; answers only requests that name this host (or a web site could have its own name point
here) and come from its own page. Serves a page, some sample images and predictions; no path is a file's.
"""

import contextlib
import functools
import http.server
import json
import logging
import re
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jinja2

from upop.errors import UpopError
from upop.view import MOST_BYTES, Viewed, predict, read_image, width_rows

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
# What a browser may call this machine; with any port, which a tunnel may have changed.
NAMES = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?")
TEMPLATES = Path(__file__).parent / "templates"
TIMEOUT_S = 30  # for a client that stops in the middle of a request
DRAIN = 4 * MOST_BYTES  # of a body that is refused: who closes at once is not heard


class RefusedError(Exception):
    """A request that gets `status` and one line."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


@dataclass(frozen=True)
class Answer:
    """The body of a response and what it is."""

    body: bytes
    kind: str
    headers: Mapping[str, str]


class ViewServer(http.server.ThreadingHTTPServer):
    """Serves `models`, and `samples` (true class, PNG file) to try them on, at `url` from `serve_forever()` on.

    Args:
        port: 0 for any that is free.
    Raises UpopError where the port is taken.
    """

    # A thread that is inside torch when the interpreter goes takes the process down with it.
    daemon_threads = False

    def __init__(self, models: Sequence[Viewed], samples: Sequence[tuple[str, bytes]] = (), *, port: int = 0) -> None:
        self.models, self.samples = tuple(models), tuple(samples)
        # One at a time: passes that run together are not timed.
        self._turn = threading.Lock()
        self._open: set[Any] = set()
        self._ending = False
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UpopError(f"port {port}: cannot be used ({reason}); choose another, or 0 for any") from error

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        """Hang up, let the pass that runs come to its end, and answer no more."""
        self._ending = True
        for connection in list(self._open):
            with contextlib.suppress(OSError):  # gone by itself
                connection.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a connection ends with outside of an answer: nothing where the browser broke it off."""
        if not isinstance(sys.exception(), ConnectionError):
            log.exception("view: %s", client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def page(self) -> Answer:
        nonce = secrets.token_urlsafe(16)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        text = environment.get_template("view.html.j2").render(
            models=self.models,
            rows=width_rows(self.models),
            samples=[label for label, _ in self.samples],
            most_bytes=MOST_BYTES,
            nonce=nonce,
        )
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src 'self' blob: data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        return Answer(text.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def sample(self, number: str) -> Answer:
        if not (number.isdecimal() and len(number) < 4 and int(number) < len(self.samples)):
            raise RefusedError(HTTPStatus.NOT_FOUND, "there is no such sample")
        return Answer(self.samples[int(number)][1], "image/png", {})

    def predictions(self, body: bytes) -> Answer:
        try:
            image = read_image(body)
            with self._turn:
                if self._ending:
                    raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "upop view has ended")
                found = predict(self.models, image)
        except UpopError as error:
            raise RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        value = {"width": image.width, "height": image.height, "models": [asdict(each) for each in found]}
        return Answer(json.dumps(value).encode(), "application/json", {})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "upop", ""
    timeout = TIMEOUT_S
    server: ViewServer

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def __getattr__(self, name: str) -> Callable[[], None]:
        # The base class asks for do_<method>: those that are not ours get an answer in the same words.
        if name.startswith("do_"):
            return functools.partial(self._answer, self._other)
        raise AttributeError(name)

    def _get(self) -> Answer:
        path = self._place()
        if path == "/":
            return self.server.page()
        if path.startswith("/samples/"):
            return self.server.sample(path.removeprefix("/samples/"))
        if path == "/predict":
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "/predict: expected POST", Allow="POST")
        raise RefusedError(HTTPStatus.NOT_FOUND, "there is nothing here; see /")

    def _post(self) -> Answer:
        if self._place() != "/predict":
            raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET", Allow="GET")
        return self.server.predictions(self._body())

    def _other(self) -> Answer:
        raise RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.command}: expected GET or POST", Allow="GET, POST")

    def _place(self) -> str:
        try:
            return urlsplit(self.path).path
        except ValueError:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"expected a path, got {self.path[:80]!r}") from None

    def _body(self) -> bytes:
        length = _length(self.headers)
        if "Transfer-Encoding" in self.headers or length is None:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "expected a body with its Content-Length")
        if length > MOST_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"expected a file of at most {MOST_BYTES // 2**20} MiB, got {length / 2**20:.1f} MiB or more",
            )
        body = self.rfile.read(length)
        self._read = True
        if len(body) < length:
            raise RefusedError(HTTPStatus.BAD_REQUEST, "the upload broke off")
        return body

    def _check_caller(self) -> None:
        """Refuse whoever is not a page of ours, nor a program on this machine."""
        host = self.headers.get("Host", "")
        # A web site whose name has been made to point here says its own name (DNS rebinding).
        if not NAMES.fullmatch(host):
            raise RefusedError(HTTPStatus.FORBIDDEN, f"expected to be called {HOST} or localhost, not {host!r}")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if (origin is not None and origin != f"http://{host}") or (self.command != "GET" and site != "same-origin"):
            raise RefusedError(HTTPStatus.FORBIDDEN, "requests of other web sites are not answered")

    def _answer(self, find: Callable[[], Answer]) -> None:
        self._read = False
        try:
            self._check_caller()
            answer, status = find(), HTTPStatus.OK
            headers: Mapping[str, str] = answer.headers
        except RefusedError as refusal:
            status, headers = refusal.status, refusal.headers
            answer = Answer(json.dumps({"error": str(refusal)}).encode(), "application/json", {})
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception:  # of a model, or of a library: the page says so, the log says what
            log.exception("view: %s %s", self.command, self.path)
            status, headers = HTTPStatus.INTERNAL_SERVER_ERROR, {}
            answer = Answer(b'{"error": "upop failed on this; see the terminal"}', "application/json", {})
        self._send(status, answer, headers)

    def _send(self, status: HTTPStatus, answer: Answer, headers: Mapping[str, str]) -> None:
        said = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        unread = said and not self._read
        # Only so much is read off: what comes after it must not be taken for another request.
        left = min(_length(self.headers) or 0, DRAIN)
        always = {
            "Content-Type": answer.kind,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        try:
            self.send_response(status)
            for name, value in {**always, **headers, **({"Connection": "close"} if unread else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)
            while unread and left > 0 and (chunk := self.rfile.read(min(left, 2**16, DRAIN))):
                left -= len(chunk)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def _length(headers: Any) -> int | None:
    """Bytes that a body is said to have, at most what fifteen digits say; None where it is not said."""
    length = headers.get("Content-Length", "")
    return int(length if len(length) < 16 else "9" * 15) if length.isdecimal() else None
