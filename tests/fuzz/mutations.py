"""Valid files made hostile: what comes off a bad disk, a bad line, or an enemy's desk. Pure: bytes in, bytes out.

A mutation is (what, where, which): a name from the tables below, a place in [0, 1) and a whole number that chooses
among possibilities. The same mutations of the same bytes give the same bytes, so a finding can be replayed.
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

Mutation = tuple[str, float, int]

# What a reader may meet in place of any value, from the innocent to the absurd.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.5, 1e308, 1e-308, "", "x", "0"),
    *("../../etc/passwd", "/etc/passwd", "\u0000", "\u202eabc", "<script>alert(1)</script>", "a" * 10_000, "\n\nupop"),
    *([], {}, [[]], [None], [0], [-1, 2**40], {"": None}, {"__class__": "os.system"}, [[[[[[[[]]]]]]]], [1] * 1000),
)
# What no encoder writes for a value, but a text may hold.
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 100_000, '{"a":' * 100_000, "'x'", "")


def mutate(data: bytes, name: str, mutations: list[Mutation]) -> bytes:
    """`data`, the content of a file called `name`, after these mutations; those that do not fit it do nothing."""
    for what, where, which in mutations:
        change = {**BYTES, **_special(name)}.get(what)
        if change is not None:
            data = change(data, where, which)
    return data


def kinds(name: str) -> list[str]:
    """The mutations that make sense for a file of that name; those of its format more than once, as they go deeper."""
    return [*BYTES, *(4 * list(_special(name)))]


def _special(name: str) -> dict[str, Callable[[bytes, float, int], bytes]]:
    return next((table for end, table in FORMATS.items() if name.endswith(end)), {})


def _truncate(data: bytes, where: float, which: int) -> bytes:
    return data[: int(where * len(data))]


def _flip(data: bytes, where: float, which: int) -> bytes:
    place = int(where * len(data))
    return data[:place] + bytes([data[place] ^ (1 << which % 8)]) + data[place + 1 :] if data else data


def _overwrite(data: bytes, where: float, which: int) -> bytes:
    place, piece = (
        int(where * len(data)),
        (b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f", b"\x80", b"{[\"',", b"\n")[which % 6],
    )
    return data[:place] + piece + data[place + len(piece) :]


def _splice(data: bytes, where: float, which: int) -> bytes:
    """A piece of the file once more, somewhere else."""
    place, start = int(where * len(data)), which % (len(data) + 1)
    return data[:place] + data[start : start + 1 + which % 257] + data[place:]


def _cut(data: bytes, where: float, which: int) -> bytes:
    place = int(where * len(data))
    return data[:place] + data[place + 1 + which % 64 :]


def _replace(data: bytes, where: float, which: int) -> bytes:
    """Another file altogether."""
    return OTHERS[which % len(OTHERS)]


def _append(data: bytes, where: float, which: int) -> bytes:
    return data + (b"\x00" * 100, b"}", data[:1000])[which % 3]


def _encode(data: bytes, where: float, which: int) -> bytes:
    """The same text in another encoding."""
    text = data.decode("latin-1")
    return (text.encode("utf-16"), b"\xef\xbb\xbf" + data, text.replace("e", "\xe9").encode("latin-1"))[which % 3]


OTHERS = (
    b"",
    b"\x00" * 4096,
    b"null",
    b"[]",
    b"{}",
    b"<!doctype html><title>503</title>Please come back later",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n",
    b"\x80\x04cos\nsystem\n(Vtouch executed\ntR.",  # a pickle that runs a command when it is loaded
    b"PK\x05\x06" + b"\x00" * 18,
    b"PAR1\x15\x04\x15\x00PAR1",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}",
    b"\x89PNG\r\n\x1a\n",
    b"#!/bin/sh\ntouch executed\n",
)
BYTES: dict[str, Callable[[bytes, float, int], bytes]] = {
    "truncate": _truncate,
    "flip": _flip,
    "overwrite": _overwrite,
    "splice": _splice,
    "cut": _cut,
    "replace": _replace,
    "append": _append,
    "encode": _encode,
}


# ---------------------------------------------------------------- JSON


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value below the root, the shallow ones first, in a stable order."""
    level = [tree]
    while level:
        inside = []
        for node in level:
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                yield node, key
                inside.append(node[key])
        level = inside


def _in_json(change: Callable[[Any, Any, int], None]) -> Callable[[bytes, float, int], bytes]:
    def changed(data: bytes, where: float, which: int) -> bytes:
        try:
            tree = json.loads(data)
        except (ValueError, RecursionError):
            return data
        places = list(_places(tree))
        if places:
            # Squared: a value near the root is one of few, but means the most.
            change(*places[int(where**2 * len(places))], which)
        text = json.dumps(tree)
        for number, raw in enumerate(RAW):
            text = text.replace(f'"@raw{number}"', raw)
        return text.encode()

    return changed


def _set(node: Any, key: Any, which: int) -> None:
    node[key] = STRANGE[which % len(STRANGE)]


def _set_raw(node: Any, key: Any, which: int) -> None:
    node[key] = f"@raw{which % len(RAW)}"


def _scale(node: Any, key: Any, which: int) -> None:
    """Another number of the same kind: shapes that promise more than there is, or do not fit each other."""
    if isinstance(node[key], int | float) and not isinstance(node[key], bool):
        node[key] = type(node[key])(node[key] * (2, 1000, 10**6, 10**9, -1)[which % 5] + which % 2)
    else:
        _set(node, key, which)


def _drop(node: Any, key: Any, which: int) -> None:
    del node[key]


def _move(node: Any, key: Any, which: int) -> None:
    """A value in another one's place."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[key] = node[keys[which % len(keys)]]


def _rename(node: Any, key: Any, which: int) -> None:
    if isinstance(node, dict):
        node[f"{key}{('_', ' ', '.0', chr(0), '/../x')[which % 5]}"] = node.pop(key)


def _twice(data: bytes, where: float, which: int) -> bytes:
    """A key that an object holds twice."""
    text = data.decode("latin-1")
    place = text.find('"', int(where * len(text)))
    end = text.find('"', place + 1)
    return (
        data
        if min(place, end) < 0
        else (text[:place] + text[place : end + 1] + ":1," + text[place:]).encode("latin-1")
    )


TREES: dict[str, Callable[[bytes, float, int], bytes]] = {
    "json set": _in_json(_set),
    "json raw": _in_json(_set_raw),
    "json scale": _in_json(_scale),
    "json drop": _in_json(_drop),
    "json move": _in_json(_move),
    "json rename": _in_json(_rename),
    "json twice": _twice,
}


# ---------------------------------------------------------------- TOML: a line at a time


def _line(data: bytes, where: float, which: int) -> bytes:
    """Another value in a line."""
    lines = data.decode("utf-8", "replace").splitlines()
    if not lines:
        return data
    place = int(where * len(lines))
    values = [json.dumps(value) for value in STRANGE if value is not None and not isinstance(value, dict)]
    values += ["1979-05-27", "inf", "nan", "{ a = 1 }", "'''", "[[", "0x" + "f" * 40]
    lines[place] = f"{lines[place].partition('=')[0]}= {values[which % len(values)]}"
    return "\n".join(lines).encode("utf-8", "replace")


# ---------------------------------------------------------------- formats with a header of their own


def _header(name: str) -> Callable[[bytes, float, int], bytes]:
    """A change of the JSON header of a safetensors file, whose length follows."""

    def changed(data: bytes, where: float, which: int) -> bytes:
        if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data):
            return data
        header = TREES[name](data[8 : 8 + size], where, which)
        return struct.pack("<Q", len(header)) + header + data[8 + size :]

    return changed


def _not_finite(data: bytes, where: float, which: int) -> bytes:
    """A weight that is no number."""
    if len(data) < 8 or (size := struct.unpack("<Q", data[:8])[0]) > len(data) - 16:
        return data
    place = 8 + size + 4 * int(where * ((len(data) - 8 - size) // 4))
    return data[:place] + struct.pack("<f", (float("nan"), float("inf"))[which % 2]) + data[place + 4 :]


def _png_size(data: bytes, where: float, which: int) -> bytes:
    """A PNG that says it is larger than it is, or is."""
    if data[12:16] != b"IHDR":
        return data
    width, height = ((60_000, 60_000), (2**31 - 1, 1), (9_000, 9_000), (0, 0), (1, 2**31 - 1))[which % 5]
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _png_bomb(data: bytes, where: float, which: int) -> bytes:
    """A small file that is a large grey image, or a small image with a large text beside it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side = (12_000, 9_400, 16_000)[which % 3]
    if which % 2:
        pixels = zlib.compress(b"\x00" * (side * (side + 1)), 1)
        head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        return data[:8] + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    text = chunk(b"zTXt", b"a\x00\x00" + zlib.compress(b"a" * 10**8, 1))
    return data[:33] + text + data[33:]


def _zip_member(data: bytes, where: float, which: int) -> bytes:
    """A member of an archive changed, with sums that are right: bytes, its array's header, or a bomb."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, OSError, ValueError, RuntimeError):
        return data
    if not members:
        return data
    name = list(members)[which % len(members)]
    members[name] = (_flip, _truncate, _array_header, _zeros, _replace)[which % 5](members[name], where, which // 5)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return made.getvalue()


def _array_header(data: bytes, where: float, which: int) -> bytes:
    """An array that says it is larger, or of another kind."""
    start, end = data.find(b"{"), data.find(b"}")
    if not data.startswith(b"\x93NUMPY") or min(start, end) < 0:
        return data
    kinds = ("|u1", "<i4", "<f4", "|O", "<U4", "<f8", "|V8", "<M8[s]")
    shapes = ("(10000000000,)", "(2, 3)", "()", "(-1,)", "(1,)", "(0,)", "(100000, 100000)")
    header = f"{{'descr': '{kinds[which % 8]}', 'fortran_order': False, 'shape': {shapes[which % 7]}, }}".encode()
    return data[:start] + header.ljust(end + 1 - start) + data[end + 1 :]


def _zeros(data: bytes, where: float, which: int) -> bytes:
    """A member that is small in the archive and large outside of it."""
    size = 400 * 2**20
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({size},), }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x00" * size


FORMATS: dict[str, dict[str, Callable[[bytes, float, int], bytes]]] = {
    ".json": TREES,
    ".toml": {"toml value": _line},
    ".safetensors": {**{f"header {name}": _header(name) for name in TREES}, "not finite": _not_finite},
    ".png": {"png size": _png_size, "png bomb": _png_bomb},
    ".npz": {"zip member": _zip_member},
    ".npy": {"array header": _array_header},
}
