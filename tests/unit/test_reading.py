"""What others may have written: bounded, and one line for whatever it cannot be."""

import json
import os

import pytest

from upop.errors import UpopError
from upop.reading import MOST_BYTES, read_bytes, read_json, size, taking_over


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def sparse(path):
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)


PLACES = {
    "pipe": (pipe, "expected a file, got a pipe; remove or replace it"),
    "folder": (os.mkdir, "expected a file, got a folder"),
    "device": (device, "expected a file, got a device"),
    "too large": (sparse, "expected at most 64 MiB, got 64 MiB; remove or replace it"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_file_or_too_large_is_refused_before_it_is_read(tmp_path, name):
    make, message = PLACES[name]
    make(tmp_path / "x.json")
    with pytest.raises(UpopError, match=message) as refused:
        read_json(tmp_path / "x.json")
    assert str(refused.value).startswith(str(tmp_path / "x.json"))


CONTENT = {
    b"": "expected readable JSON, got Expecting value",
    b"{": "expected readable JSON",
    b"[1]": "expected a JSON object, got list",
    b'{"a": NaN}': "the number NaN",
    b'{"a": [1, -Infinity]}': "the number -Infinity",
    b'{"a": 1e999}': "the number 1e999",
    b'{"a": ' + b"9" * 5000 + b"}": "expected readable JSON, got Exceeds the limit",
    b"[" * 100_000: "nested too deeply",
    b'{"a":' * 100_000: "nested too deeply",
    b"\xff\xfe{\x00}\x00": "expected text in UTF-8, got byte 0xff at 0; save it as UTF-8",
    b'{"a": "\\ud800"}': "half of a surrogate pair",
    b'{"\\uDFFF": 1}': "half of a surrogate pair",
    b"\x80\x04cos\nsystem\n.": "expected text in UTF-8",
}


@pytest.mark.parametrize("content", CONTENT, ids=lambda content: repr(content[:12]))
def test_what_is_no_plain_object_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UpopError, match=CONTENT[content]) as refused:
        read_json(tmp_path / "x.json")
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'x.json'}: ")
    assert "\n" not in message
    assert len(message) < 300


def test_what_upop_writes_is_read_back(tmp_path):
    values = {"a": [1, 2.5, None, True], "b": {"c": "ü \U0001f600"}}
    (tmp_path / "x.json").write_text(json.dumps(values))  # the emoji as a pair of escapes, which is sound
    assert read_json(tmp_path / "x.json") == values
    (tmp_path / "x.json").write_text('{"a": Infinity}')
    assert read_json(tmp_path / "x.json", finite=False) == {"a": float("inf")}


def test_a_file_that_grows_while_it_is_read_is_cut(tmp_path):
    (tmp_path / "x").write_bytes(b"abcdef")
    assert read_bytes(tmp_path / "x", most=6) == b"abcdef"
    with pytest.raises(UpopError, match="expected at most 5 bytes, got 6 bytes"):
        read_bytes(tmp_path / "x", most=5)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (2**40, "1,024 GiB")]
)
def test_sizes_are_shown_as_one_reads_them(count, text):
    assert size(count) == text


def test_a_state_that_does_not_fit_is_one_line_and_our_own_errors_pass():
    for error in (KeyError("model"), RuntimeError("size\nmismatch"), TypeError("x")):
        message = r"^run: the checkpoint does not fit this run .*--overwrite$"
        with pytest.raises(UpopError, match=message) as refused, taking_over("run"):
            raise error
        assert "\n" not in str(refused.value)
    with pytest.raises(UpopError, match=r"^ours$"), taking_over("run"):
        raise UpopError("ours")
    with pytest.raises(KeyboardInterrupt), taking_over("run"):
        raise KeyboardInterrupt
