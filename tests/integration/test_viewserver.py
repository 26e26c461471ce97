"""The page of `upop view`: who may talk to it, what it refuses, and that a person sees both predictions."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import chromium
import pytest
import torch
from PIL import Image

import upop
from upop.errors import UpopError
from upop.models import load_model, save_image_processor
from upop.view import MOST_BYTES, find_folders, load_viewed, predict, read_image
from upop.viewserver import ViewServer

LABELS = ["cat", "dog", "owl", "<b>fox</b>", "bee", "ant"]


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "half"
    dense = make_model("vit", image=16, patch=8, width=32, labels=len(LABELS))
    dense.config.id2label = dict(enumerate(LABELS))
    keep = {s.name: torch.arange(s.units) < s.units // 2 for s in upop.analyze(dense).structures}
    for name, model in (("dense", dense), ("model", upop.slim(dense, keep))):
        upop.save_pretrained(model, folder / name)
        save_image_processor(folder / name, load_model(str(folder / name)))
    return folder


def picture(seed=0, size=(40, 30)):
    source = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (*size[::-1], 3), generator=source, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server(run):
    models = load_viewed(find_folders([str(run)]), device="cpu")
    with ViewServer(models, [("owl", picture(1)), ("ant", picture(2))]) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def ask(server):
    """`ask(method, path, body, headers)`: status, headers and parsed or plain body."""

    def call(method="GET", path="/", body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {k.replace("_", "-"): v for k, v in headers.items()})
            response = connection.getresponse()
            text = response.read()
            kind = response.headers["Content-Type"]
            return response.status, response.headers, json.loads(text) if kind == "application/json" and text else text

    return call


def test_it_listens_on_this_machine_only(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(UpopError, match=r"^port \d+: cannot be used \(Address already in use\); choose another"):
        ViewServer(server.models, port=server.server_address[1])


def test_predictions_are_those_of_the_models(server, ask):
    status, headers, found = ask("POST", "/predict", picture())
    assert status == 200
    assert (found["width"], found["height"]) == (40, 30)
    for each, wanted in zip(found["models"], predict(server.models, read_image(picture()), seconds=0.01), strict=True):
        assert each["name"] == wanted.name
        assert [tuple(pair) for pair in each["top"]] == [(label, pytest.approx(p)) for label, p in wanted.top]
        assert each["ms"] > 0
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_only_this_host_and_its_own_page_are_answered(server, ask):
    port = server.server_address[1]
    own = f"http://127.0.0.1:{port}"
    assert ask("POST", "/predict", picture(), Origin=own)[0] == 200
    assert ask("GET", "/", Host="localhost:9999")[0] == 200, "through a tunnel"
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost:x",
        "[::1",
        "",
        "10.0.0.1",
    ):
        status, _, found = ask("GET", "/", Host=host)
        assert (status, "expected to be called" in found["error"]) == (403, True), host
    for origin in ("https://evil.example", "null", f"http://localhost:{port}", f"https://127.0.0.1:{port}"):
        assert ask("POST", "/predict", picture(), Origin=origin)[0] == 403, origin
    assert ask("POST", "/predict", picture(), Sec_Fetch_Site="cross-site")[0] == 403
    assert "Access-Control-Allow-Origin" not in ask("OPTIONS", "/predict", Origin=own)[1]


def test_a_browser_that_breaks_off_between_two_requests_is_no_error_to_see(server, ask, capsys):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", "/")
    connection.getresponse().read()
    before = threading.active_count()
    # The next bytes are a reset, as of a browser that ends.
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    deadline = time.monotonic() + 10
    while threading.active_count() >= before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() < before
    assert capsys.readouterr().err == ""
    assert ask("GET", "/")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/samples/../../etc/passwd",
        "/samples/%2e%2e/%2e%2e/etc/passwd",
        "/samples/-1",
        "/samples/2",
        "/samples/9999999999999999999",
        "/samples/²",
        "/samples/",
        "//evil.example/",
        "/index.html",
        "/model.safetensors",
    ],
)
def test_no_path_is_a_file(path, ask):
    from urllib.parse import quote

    status, _, found = ask("GET", quote(path, safe="/%.:"))
    assert (status, set(found)) == (404, {"error"})


def test_samples_are_served(ask):
    status, headers, found = ask("GET", "/samples/1")
    assert (status, headers["Content-Type"], found) == (200, "image/png", picture(2))


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/", "GET"),
        ("GET", "/predict", "POST"),
        ("PUT", "/", "GET, POST"),
        ("DELETE", "/predict", "GET, POST"),
        ("BREW", "/", "GET, POST"),
    ],
)
def test_the_wrong_method_says_which_is_right(method, path, allowed, ask):
    status, headers, found = ask(method, path)
    assert (status, headers["Allow"]) == (405, allowed)
    assert "expected" in found["error"]


@pytest.mark.parametrize(
    ("body", "message"), [(b"no picture", "this is not an image"), (b"", "empty"), (picture()[:90], "image")]
)
def test_what_is_no_picture_is_one_clear_line_and_the_next_one_is_answered(body, message, ask):
    status, _, found = ask("POST", "/predict", body)
    assert status == 422
    assert message in found["error"]
    assert ask("POST", "/predict", picture())[0] == 200


def test_bodies_are_bounded(server, ask):
    status, _, found = ask("POST", "/predict", b"x" * (MOST_BYTES + 1))
    assert (status, "at most 32 MiB" in found["error"]) == (413, True)
    assert ask("POST", "/predict", Content_Length="many")[0] == 411
    with socket.create_connection(server.server_address, timeout=30) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 411"
    # A body that is announced and does not come: refused at once, whatever its length.
    with socket.create_connection(server.server_address, timeout=30) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n")
        assert raw.recv(12) == b"HTTP/1.1 413"
    with socket.create_connection(server.server_address, timeout=30) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\nshort")
        raw.shutdown(socket.SHUT_WR)
        assert raw.recv(12) == b"HTTP/1.1 400"


@pytest.mark.parametrize("length", ["9" * 20, "9" * 5000, "many"], ids=["20 digits", "5000 digits", "a word"])
def test_a_body_that_is_refused_is_no_second_request(server, length):
    second = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.create_connection(server.server_address, timeout=30) as raw:
        raw.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{second}".encode())
        raw.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: raw.recv(2**16), b""))
    assert answers.startswith(b"HTTP/1.1 41")
    assert answers.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_that_is_none_is_refused(server, caplog, method):
    with socket.create_connection(server.server_address, timeout=30) as raw:
        raw.sendall(f"{method} http://[::1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        raw.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: raw.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"expected a path, got 'http://[::1'" in answer
    assert caplog.text == ""


def test_a_model_that_fails_is_a_line_and_not_the_end(server, ask, monkeypatch, caplog):
    monkeypatch.setattr("upop.viewserver.predict", lambda *a: 1 / 0)
    status, _, found = ask("POST", "/predict", picture())
    assert (status, found) == (500, {"error": "upop failed on this; see the terminal"})
    assert "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    assert ask("POST", "/predict", picture())[0] == 200


def test_the_page_allows_nothing_from_elsewhere(ask):
    _, headers, page = ask("GET", "/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    [nonce] = set(re.findall(r"'nonce-([^']+)'", policy))
    text = page.decode()
    assert text.count(f'nonce="{nonce}"') == 2
    assert ask("GET", "/")[1]["Content-Security-Policy"] != policy
    assert not re.search(r"(src|href)=\"?https?:", text)
    assert " style=" not in text, "the policy would ignore it"


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(chromium.find() is None, reason="needs Chromium (Debian: apt-get install chromium)")
def test_a_person_drops_a_picture_and_sees_what_both_models_say(server, tmp_path):
    wanted = predict(server.models, read_image(picture(7)), seconds=0.01)
    file = tmp_path / "seven.png"
    file.write_bytes(picture(7))
    cards = "[...document.querySelectorAll('.card')]"
    rows = "[...c.querySelectorAll('li')].map(l => [...l.querySelectorAll('span')].map(s => s.textContent))"
    busy = "document.querySelector('.busy')"
    with chromium.browser(tmp_path / "profile") as page:
        page.resize(1100, 800)
        page.open(server.url)
        assert page.run(f"{cards}.map(c => c.querySelector('h2').textContent)") == ["dense", "pruned"]

        page.choose_file("#file", file)
        page.until(f"document.querySelector('.card li') && !{busy}")
        for shown, each in zip(page.run(f"{cards}.map(c => {rows})"), wanted, strict=True):
            assert shown == [[label, f"{100 * share:.2f} %"] for label, share in each.top]
        assert all(
            re.fullmatch(r"\d+\.\d\d ms", t) for t in page.run(f"{cards}.map(c => c.querySelector('.ms').textContent)")
        )
        first = [each.top[0][0] for each in wanted]
        verdict = page.run("document.getElementById('verdict').textContent")
        assert verdict == (f"Both say {first[0]}." if first[0] == first[1] else f"They disagree: {', '.join(first)}.")
        facts = page.run(f"{cards}.map(c => c.querySelector('dd').textContent)")
        assert facts == [f"{viewed.params:,}" for viewed in server.models]
        widths = page.run("[...document.querySelectorAll('.units')].map(t => t.textContent)")
        assert widths == ["16", "8", "16", "8", "128", "64", "128", "64"]
        bars = page.run("[...document.querySelectorAll('.track i')].map(b => b.getBoundingClientRect().width)")
        assert bars[0] > bars[4], "the policy lets the script draw"

        page.run("document.querySelectorAll('#samples button')[1].click()")
        page.until("document.getElementById('about').textContent.includes('true class: ant')")
        wrong = tmp_path / "notes.txt"
        wrong.write_text("no picture")
        page.choose_file("#file", wrong)
        page.until("!document.getElementById('error').hidden")
        assert "this is not an image" in page.run("document.getElementById('error').textContent")
        assert page.run(f"{cards}.map(c => {rows})") == [[], []], "nothing of the picture before"
        page.run(
            "fetch('/samples/0').then(r => r.blob()).then(b => { const d = new DataTransfer(); "
            "d.items.add(new File([b], 'dropped.png')); "
            "dispatchEvent(new DragEvent('drop', {dataTransfer: d, cancelable: true})); })"
        )
        page.until(f"document.querySelector('.card li') && !{busy}")
        assert page.run("document.getElementById('error').hidden")

        page.resize(360, 740, dark=True)
        beyond = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.run(beyond) == 0, "no sideways scrolling on a phone"
        assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"
        refused = "the server responded with a status of 422"
        assert [line for line in page.complaints if refused not in line] == []


# ---------------------------------------------------------------- the command


# As a terminal starts it: where the tests themselves run in the background, Ctrl-C is ignored by all that they start.
HEEDING_CTRL_C = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('upop.cli', run_name='__main__')"
)


def asks_on(port, first):
    """One prediction after another, for as long as somebody answers; `first` says that one was made."""
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection,
    ):
        while True:
            connection.request("POST", "/predict", picture())
            connection.getresponse().read()
            first.set()


def test_the_command_says_where_the_page_is_and_ends_on_ctrl_c(run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", HEEDING_CTRL_C, "view", str(run)]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
        contextlib.ExitStack() as last,
    ):
        last.callback(process.kill)  # whatever fails, the test ends
        lines = [process.stdout.readline() for _ in range(3)]
        assert (
            lines[0]
            == f"dense: {run / 'dense'}, {load_model(str(run / 'dense')).model.num_parameters():,} parameters\n"
        )
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ answers on this machine only; Ctrl-C ends it", lines[2])[1])
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/")
            assert b"What do dense and pruned see?" in connection.getresponse().read()
            # The page stays open, and its pictures are being looked at.
            first = threading.Event()
            threading.Thread(target=asks_on, args=(port, first), daemon=True).start()
            assert first.wait(60)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
        assert process.stderr.read() == ""
