"""Data sets that someone else made: they cannot take memory, hang a run, or have it read what is not theirs."""

import io
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from upop.data import DataError, items, load_data, tables

sys.path.insert(0, str(Path(__file__).parent))
from test_data import encoded, image_folder, parquet, pixels, save


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    return image_folder(tmp_path / "d", {"": {"ant": 5, "bee": 5}})


def refused(folder, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        load_data(str(folder), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def says_it_is(width, height):
    """A PNG of a few bytes whose header promises this many pixels."""
    small = encoded(pixels(1)[0])
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize("size", [(60_000, 60_000), (9_000, 9_000), (2**31 - 1, 1)])
def test_an_image_that_says_it_is_huge_is_refused_by_its_header(images, monkeypatch, size):
    (images / "ant/bomb.png").write_bytes(says_it_is(*size))
    opened = []
    monkeypatch.setattr(
        items, "_pixels", lambda image, size: opened.append(image.size) or np.zeros((3, 8, 8), np.uint8)
    )
    refused(images, r"ant/bomb\.png: expected an image, got .*; remove or replace it")
    assert max(side for shape in opened for side in shape) == 8
    assert load_data(str(images), skip_bad=True).skipped == (str(images / "ant/bomb.png"),)


def test_an_image_of_one_long_row_is_refused(images):
    """Resized to the model's height, it would be gigabytes."""
    made = io.BytesIO()
    Image.new("RGB", (300_000, 3)).save(made, "PNG")
    (images / "bee/row.png").write_bytes(made.getvalue())
    refused(images, r"bee/row\.png: .*300,000 x 3 pixels, one side more than 200 times the other")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "expected a file, got a pipe; remove or replace it, or leave such files out with --skip-bad"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, got a device"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40), "expected at most 512 MiB"),
        (lambda path: path.symlink_to(path.name), "expected an image, got OSError"),
    ],
    ids=["pipe", "device", "sparse", "link to itself"],
)
def test_what_is_no_file_is_named_and_never_read(images, make, message):
    make(images / "ant/odd.png")
    refused(images, rf"ant/odd\.png: {message}")
    assert len(load_data(str(images), skip_bad=True).skipped) == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "files/../../secret.png"])
def test_a_table_cannot_have_files_outside_of_its_folder_read(tmp_path, name):
    save(tmp_path / "secret.png", pixels(1)[0])
    parquet(tmp_path / "d/train.parquet", [0, 1] * 10, cells=[{"bytes": None, "path": name}] * 20)
    refused(tmp_path / "d", r"train\.parquet row 0: .* a path that leads out of the data set")


@pytest.mark.parametrize(("limit", "most"), [("MOST_ROWS", 19), ("MOST_GROUP", 100)])
def test_a_table_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch, limit, most):
    parquet(tmp_path / "d/train.parquet", [0, 1] * 10)
    assert len(load_data(str(tmp_path / "d")).train) == 16
    monkeypatch.setattr(tables, limit, most)
    monkeypatch.setattr(tables, "_read", None)
    refused(tmp_path / "d", r"train\.parquet: expected at most .*; write it again with smaller row groups")


def test_an_odd_image_among_many_of_one_size_is_not_decoded_before_all_are_resized(tmp_path, monkeypatch):
    """The sizes of a sample are looked at first; a large one beyond it must not wait in memory beside others."""
    folder = image_folder(tmp_path / "d", {"": {"ant": 150, "bee": 150}})
    save(folder / "ant/070a.png", pixels(1, 64, 64)[0])
    decoded = []
    real = items._pixels

    def watched(image, size):
        decoded.append((image.size, size))
        return real(image, size)

    monkeypatch.setattr(items, "_pixels", watched)
    data = load_data(str(folder), image_size=16)
    assert data.train.images.shape[1:] == (3, 16, 16)
    assert ((64, 64), None) not in decoded
    assert ((64, 64), items.Square(16, 16)) in decoded


def test_large_images_of_one_size_are_brought_to_the_models_when_they_are_decoded(tmp_path):
    folder = image_folder(tmp_path / "d", {"": {"ant": 15, "bee": 15}}, height=64, width=64)
    assert load_data(str(folder), image_size=32).train.images.shape[2:] == (64, 64)
    data = load_data(str(folder), image_size=8)
    assert data.train.images.shape[2:] == (8, 8)
    assert data.shorter_side == 9


def test_linked_folders_in_a_class_are_read_once_and_never_for_ever(tmp_path):
    folder = image_folder(tmp_path / "d", {"": {"ant": 15, "bee": 15}})
    image_folder(tmp_path / "elsewhere", {"": {"more": 10}})
    (folder / "ant/more").symlink_to(tmp_path / "elsewhere/more")
    (folder / "ant/again").symlink_to(tmp_path / "elsewhere/more")
    (folder / "ant/round").symlink_to(folder / "ant")
    data = load_data(str(folder))
    assert sum(len(split) for split in (data.train, data.validation, data.test)) == 40


def test_a_class_that_no_config_could_name_is_refused(tmp_path):
    folder = image_folder(tmp_path / "d", {"": {"ant": 15, "bee": 15}})
    os.rename(os.fsencode(folder / "bee"), os.fsencode(folder) + b"/caf\xe9")
    with pytest.raises(DataError, match="expected class folders with names in UTF-8, got 'caf"):
        load_data(str(folder))
