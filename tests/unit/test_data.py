"""Loading, splitting and batching of small generated data sets, against what the files hold."""

import io
import itertools
import json
import multiprocessing
import os
import pickle
import struct
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data._utils import signal_handling

from upop.benchrun import FILE
from upop.collect import KEEP
from upop.data import Augment, Batches, DataError, ImageData, MemorySplit, Split, StreamSplit, load_data
from upop.data.folders import OURS
from upop.data.rows import _mapped
from upop.data.splits import cut
from upop.folder import MARK

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ALL_PARTS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "upop"


def pixels(count: int, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    """Noise uint8 [n, h, w, 3]: no two images are equal."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image))


def image_folder(root: Path, counts: dict[str, dict[str, int]], **size: int) -> Path:
    """`root/<split>/<class>/<number>.png`; the split "" stands for class folders alone."""
    seeds = itertools.count()
    for split, classes in counts.items():
        for name, count in classes.items():
            for number, image in enumerate(pixels(count, seed=next(seeds), **size)):
                save(root / split / name / f"{number:03}.png", image)
    return root


def parquet(
    path: Path,
    labels: Sequence[Any],
    *,
    names: Sequence[str] | None = ("ant", "bee"),
    columns: tuple[str, str] = ("img", "label"),
    seed: int = 0,
    cells: Sequence[Any] | None = None,
) -> np.ndarray:
    """A shard as the Hub stores it; returns its images uint8 [n, 8, 8, 3]."""
    images = pixels(len(labels), seed=seed)
    if cells is None:
        cells = [{"bytes": encoded(image), "path": None} for image in images]
    if len(cells) and isinstance(cells[0], dict):
        cells = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    features = {columns[0]: {"_type": "Image"}, columns[1]: {"_type": "ClassLabel", "names": list(names or ())}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    table = pa.table({columns[0]: cells, columns[1]: list(labels)}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return images


def parquet_folder(root: Path, train: int = 60, test: int = 20, **options: Any) -> Path:
    parquet(root / "plain_text" / "train-00000-of-00002.parquet", [0, 1] * (train // 4), seed=1, **options)
    parquet(root / "plain_text" / "train-00001-of-00002.parquet", [0, 1] * (train // 4), seed=2, **options)
    parquet(root / "plain_text" / "test-00000-of-00001.parquet", [1, 0] * (test // 2), seed=3, **options)
    return root


def parts(data: ImageData) -> dict[str, Split]:
    assert data.test is not None
    return {"train": data.train, "validation": data.validation, "test": data.test}


def images_of(split: Split) -> Tensor:
    """Images uint8 [n, 3, h, w] of either kind of split."""
    return split.images if isinstance(split, MemorySplit) else torch.stack([split[i] for i in range(len(split))])


def content(split: Split) -> Counter[tuple[bytes, int]]:
    pairs = zip(images_of(split), split.labels.tolist(), strict=True)
    return Counter((image.numpy().tobytes(), label) for image, label in pairs)


def expected(images: np.ndarray, labels: Sequence[int]) -> Counter[tuple[bytes, int]]:
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Counter((plane.tobytes(), label) for plane, label in zip(planes, labels, strict=True))


# Sources: the pixels and labels that went in come out


def test_parquet_folder_holds_the_files_images_and_names(tmp_path: Path) -> None:
    first = parquet(tmp_path / "d" / "data" / "train-00000-of-00002.parquet", [0, 1] * 10, seed=1)
    second = parquet(tmp_path / "d" / "data" / "train-00001-of-00002.parquet", [1, 0] * 10, seed=2)
    test = parquet(tmp_path / "d" / "data" / "test-00000-of-00001.parquet", [1, 0] * 5, seed=3)
    data = load_data(str(tmp_path / "d"))
    assert data.name == "d"
    assert data.classes == ("ant", "bee")
    assert data.skipped == ()
    everything = expected(np.concatenate([first, second]), [0, 1] * 10 + [1, 0] * 10)
    assert content(data.train) + content(data.validation) == everything
    assert torch.equal(images_of(parts(data)["test"]), torch.from_numpy(test).permute(0, 3, 1, 2))
    assert parts(data)["test"].labels.tolist() == [1, 0] * 5


def test_parquet_folder_agrees_with_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = parquet_folder(tmp_path / "d")
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "hf"))
    data = load_data(str(folder))
    reference = np.stack([np.asarray(row["img"]) for row in loaded["train"]])
    assert content(data.train) + content(data.validation) == expected(reference, list(loaded["train"]["label"]))
    assert data.classes == tuple(loaded["train"].features["label"].names)


@pytest.mark.parametrize("columns", [("image", "labels"), ("img", "fine_label"), ("picture", "kind")])
def test_parquet_columns_are_found_by_usual_name_or_declared_type(tmp_path: Path, columns: tuple[str, str]) -> None:
    data = load_data(str(parquet_folder(tmp_path / "d", columns=columns)))
    assert len(data.train) == 54
    assert data.classes == ("ant", "bee")


def test_parquet_without_names_numbers_its_classes(tmp_path: Path) -> None:
    parquet(tmp_path / "d" / "train-0.parquet", [3, 7] * 10, names=None)
    data = load_data(str(tmp_path / "d"))
    assert data.classes == ("3", "7")
    assert set(data.train.labels.tolist()) == {0, 1}


def test_parquet_labels_may_be_strings(tmp_path: Path) -> None:
    images = parquet(tmp_path / "d" / "train-0.parquet", ["owl", "ape"] * 10, names=None)
    data = load_data(str(tmp_path / "d"))
    assert data.classes == ("ape", "owl")
    everything = sum((content(split) for split in parts(data).values()), Counter())
    assert everything == expected(images, [1, 0] * 10)


def test_parquet_cells_may_be_plain_bytes_or_paths(tmp_path: Path) -> None:
    images = pixels(20)
    parquet(tmp_path / "a" / "train.parquet", [0, 1] * 10, cells=[encoded(image) for image in images])
    for number, image in enumerate(images):
        save(tmp_path / "b" / "files" / f"{number}.png", image)
    cells = [{"bytes": None, "path": f"files/{number}.png"} for number in range(20)]
    parquet(tmp_path / "b" / "train.parquet", [0, 1] * 10, cells=cells)
    for name in "ab":
        data = load_data(str(tmp_path / name))
        everything = sum((content(split) for split in parts(data).values()), Counter())
        assert everything == expected(images, [0, 1] * 10)


def test_parquet_files_may_carry_a_hash_in_their_names(tmp_path: Path) -> None:
    hashed_shards(tmp_path / "d", *(f"train-{number:05}-of-00002-9d40b6ad3a4b6ab{number}" for number in range(2)))
    data = load_data(str(tmp_path / "d"))
    assert data.test is not None
    assert (len(data.train) + len(data.validation), len(data.test)) == (20, 10)


@pytest.mark.parametrize("names", [("Train", "dev", "testing"), ("training", "evaluation", "test_set")])
def test_parquet_splits_are_known_however_people_call_them(tmp_path: Path, names: Sequence[str]) -> None:
    for name, count in zip(names, (10, 2, 4), strict=True):
        parquet(tmp_path / "d" / f"{name}-00000-of-00001.parquet", [0, 1] * count)
    data = load_data(str(tmp_path / "d"))
    assert {part: len(split) for part, split in parts(data).items()} == {"train": 20, "validation": 4, "test": 8}


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (pa.array([3, 5] * 10, pa.uint64()), pa.array([3, 5] * 4, pa.int16())),
        (pa.array(["3", "5"] * 10).dictionary_encode(), pa.array(["3", "5"] * 4, pa.large_string())),
    ],
    ids=["integers", "strings"],
)
def test_parquet_labels_are_the_same_in_any_width_and_encoding(
    tmp_path: Path, train: pa.Array, test: pa.Array
) -> None:
    for name, labels in (("train", train), ("test", test)):
        table = {"img": [encoded(image) for image in pixels(len(labels))], "label": labels}
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.table(table), tmp_path / "d" / f"{name}.parquet")
    data = load_data(str(tmp_path / "d"))
    assert data.classes == ("3", "5")
    assert parts(data)["test"].labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize("secret", [-1, None])
def test_parquet_split_with_secret_labels_is_left_alone(tmp_path: Path, secret: int | None) -> None:
    folder = parquet_folder(tmp_path / "d")
    parquet(folder / "plain_text" / "test-00000-of-00001.parquet", [secret] * 20)
    data = load_data(str(folder))
    assert {name: len(split) for name, split in parts(data).items()} == {"train": 48, "validation": 6, "test": 6}


def test_parquet_with_metadata_of_another_kind_is_read(tmp_path: Path) -> None:
    file = tmp_path / "d" / "train-0.parquet"
    for metadata in ("no json", "[]", '{"info": {"features": {"label": [{"_type": "ClassLabel"}]}}}'):
        parquet(file, [0, 1] * 10)
        pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": metadata}), file)
        assert load_data(str(tmp_path / "d")).classes == ("0", "1")


def test_hub_dataset_is_read_through_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []
    images = {"train": pixels(40, seed=1), "test": pixels(20, seed=2)}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})

    def load_dataset(name: str) -> Any:
        asked.append(name)
        tables = {}
        for split, some in images.items():
            columns = {"img": [{"bytes": encoded(i), "path": None} for i in some], "label": [0, 1] * (len(some) // 2)}
            tables[split] = datasets.Dataset.from_dict(columns, features=features)
        return datasets.DatasetDict(tables)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = load_data("cifar10")
    assert asked == ["uoft-cs/cifar10"]
    assert data.name == "uoft-cs/cifar10"
    assert data.classes == ("ant", "bee")
    assert content(data.train) + content(data.validation) == expected(images["train"], [0, 1] * 20)
    assert content(parts(data)["test"]) == expected(images["test"], [0, 1] * 10)
    streamed = load_data("someone/else", memory_limit=100, image_size=8)
    assert asked[1:] == ["someone/else"]
    assert isinstance(pickle.loads(pickle.dumps(streamed.train)), StreamSplit)
    assert len(images_of(streamed.train)) == 36


def test_digits_are_cut_70_15_15() -> None:
    data = load_data("digits")
    assert {name: len(split) for name, split in parts(data).items()} == {"train": 1257, "validation": 270, "test": 270}
    assert data.classes == tuple("0123456789")
    images = images_of(data.train)
    assert images.shape[1:] == (3, 8, 8)
    assert images.min() == 0
    assert images.max() == 255
    assert torch.equal(images[:, 0], images[:, 2])


CIFAR_NAMES = [f"c{number}" for number in range(10)]


def cifar_batches(folder: Path, protocol: int, kind: type = bytes) -> list[np.ndarray]:
    """The seven files, with text keys, or keys as bytes as the original's are once read by Python 3."""
    folder.mkdir(parents=True)
    key: Callable[[str], Any] = (lambda text: text.encode()) if kind is bytes else str
    batches = [pixels(20, 32, 32, seed=seed) for seed in range(6)]
    for images, name in zip(batches, [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"], strict=True):
        data = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(20, 3072)
        value = {key("data"): data, key("labels"): list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(value, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({key("label_names"): [key(n) for n in CIFAR_NAMES]}, protocol))
    return batches


@pytest.mark.parametrize(("protocol", "kind"), [(0, str), (2, bytes), (2, str), (5, bytes)])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_batches_are_read(tmp_path: Path, protocol: int, kind: type, inside: bool) -> None:
    batches = cifar_batches(tmp_path / "cifar-10-batches-py", protocol, kind)
    data = load_data(str(tmp_path if inside else tmp_path / "cifar-10-batches-py"))
    assert data.classes == tuple(CIFAR_NAMES)
    everything = content(data.train) + content(data.validation)
    assert everything == expected(np.concatenate(batches[:5]), [*range(10)] * 10)
    assert content(parts(data)["test"]) == expected(batches[5], [*range(10)] * 2)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pickle-was-run",)


class Codec:
    def __reduce__(self) -> Any:
        import _codecs

        return _codecs.encode, ("text", "rot13")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Evil(), r"the pickle asks for posix\.mkdir, which could run code"),
        (Codec(), "encoding 'rot13' is not allowed"),
        ({b"data": np.zeros((2, 3), np.uint8)}, r"expected pixels uint8 \[n, 3072\]"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, "expected 2 integer labels"),
        ([1, 2], "expected a dictionary, got list"),
    ],
)
def test_cifar_batches_run_nothing_and_hold_what_is_expected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cifar_batches(tmp_path / "d", 2)
    (tmp_path / "d" / "data_batch_3").write_bytes(pickle.dumps(value, 2))
    with pytest.raises(DataError, match=reason) as caught:
        load_data(str(tmp_path / "d"))
    assert "data_batch_3: " in str(caught.value)
    assert not Path("pickle-was-run").exists()


def test_cifar_batches_must_be_complete(tmp_path: Path) -> None:
    cifar_batches(tmp_path / "d", 2)
    (tmp_path / "d" / "data_batch_4").unlink()
    with pytest.raises(DataError, match="got no data_batch_4; unpack it again"):
        load_data(str(tmp_path / "d"))


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_image_folder_with_splits_keeps_them(tmp_path: Path, name: str) -> None:
    counts = {"train": {"b": 6, "a": 4}, name: {"a": 2, "b": 2}, "test": {"a": 3, "b": 3}}
    data = load_data(str(image_folder(tmp_path / "d", counts)))
    assert data.classes == ("a", "b")
    found = {part: split.labels.bincount().tolist() for part, split in parts(data).items()}
    assert found == {"train": [4, 6], "validation": [2, 2], "test": [3, 3]}
    first = torch.from_numpy(np.array(Image.open(tmp_path / "d" / "test" / "a" / "000.png"))).permute(2, 0, 1)
    assert torch.equal(images_of(parts(data)["test"])[0], first)


def test_class_folders_alone_are_cut_in_three(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 40, "b": 20}})
    data = load_data(str(root))
    found = {part: split.labels.bincount().tolist() for part, split in parts(data).items()}
    assert found == {"train": [32, 16], "validation": [4, 2], "test": [4, 2]}
    everything = sum((content(split) for split in parts(data).values()), Counter())
    assert len(everything) == 60  # all there, each once
    assert set(everything.values()) == {1}


def test_image_folder_takes_nested_folders_and_ignores_what_systems_leave_behind(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"train": {"a": 9, "b": 10}})
    save(root / "train" / "a" / "more" / "deep.PNG", pixels(1, seed=99)[0])
    for place in ("", "train", "train/a"):
        save(root / place / "@eaDir" / "000.png" / "SYNOPHOTO_THUMB_M.jpg", pixels(1)[0])
    for name in ("train/a/.DS_Store", "train/a/Thumbs.db", "train/.hidden/x.txt", "train/README.md", "LICENSE"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("not an image")
    data = load_data(str(root), validation=2)
    assert sum(len(split) for split in parts(data).values()) == 20


def test_what_upop_leaves_is_known_by_the_names_that_it_has() -> None:
    assert OURS == (MARK, KEEP, FILE)


@pytest.mark.parametrize("layout", ["", "train"])
def test_runs_that_are_kept_beside_the_classes_are_no_class(tmp_path: Path, layout: str) -> None:
    root = image_folder(tmp_path / "d", {layout: {"a": 20, "b": 20}})
    before = load_data(str(root))
    for folder in ("runs/half/.upop-run", "runs/many/study.json", "runs/many/seed0/.upop-run", "bench/bench.json"):
        file = root / folder
        save(file.parent / "widths.png", pixels(1)[0])
        file.write_text("{}")
    (root / "runs/.DS_Store").write_text("")
    after = load_data(str(root))
    assert (after.classes, after.fingerprint) == (before.classes, before.fingerprint)


def test_a_local_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path / "digits", {"": {"a": 10, "b": 10}})
    monkeypatch.chdir(tmp_path)
    assert load_data("digits").classes == ("a", "b")


def test_every_kind_of_image_becomes_upright_rgb(tmp_path: Path) -> None:
    root = tmp_path / "d" / "a"
    colour = pixels(1, 6, 4)[0]
    grey = colour[..., 0]
    root.mkdir(parents=True)
    Image.fromarray(colour).save(root / "0.png")
    Image.fromarray(grey).save(root / "1.png")
    Image.fromarray(np.dstack([colour, grey])).save(root / "2.png")  # alpha
    Image.fromarray(np.dstack([grey, grey])).save(root / "3.png")  # grey with alpha
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(root / "4.png", transparency=bytes([0] * 24))
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "5.png")  # 16 bit
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: shown turned by 90 degrees clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(colour))).save(root / "6.png", exif=exif)
    Image.fromarray(colour).convert("CMYK").save(root / "7.tif")
    for number in range(8, 12):
        Image.fromarray(colour).save(root / f"{number}.bmp")
    (tmp_path / "d" / "b").mkdir()
    for number in range(12):
        Image.fromarray(colour).save(tmp_path / "d" / "b" / f"{number}.bmp")
    data = load_data(str(root.parent), seed=1)
    found = sum((content(split) for split in parts(data).values()), Counter())
    gray3 = np.repeat(grey[..., None], 3, axis=2)
    palette_rgb = np.asarray(palette.convert("RGB"))
    wanted = [colour, gray3, colour, gray3, palette_rgb, gray3, colour, colour, *[colour] * 4]
    assert found == expected(np.stack([*wanted, *[colour] * 12]), [0] * 12 + [1] * 12)


# What is stored for each EXIF orientation from 1 on, of an image that is shown upright.
LYING: list[Callable[[np.ndarray], np.ndarray]] = [
    np.asarray,
    np.fliplr,
    lambda image: np.rot90(image, 2),
    np.flipud,
    lambda image: image.swapaxes(0, 1),
    np.rot90,
    lambda image: np.rot90(image, 2).swapaxes(0, 1),
    lambda image: np.rot90(image, 3),
]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_images_that_lie_in_any_way_are_of_one_size_and_set_upright(tmp_path: Path, ending: str) -> None:
    colour = pixels(1, 6, 4)[0]
    for number, name in itertools.product(range(16), "ab"):
        file = tmp_path / "d" / name / f"{number:02}.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        Image.fromarray(np.ascontiguousarray(LYING[number % 8](colour))).save(file, exif=exif)
    data = load_data(str(tmp_path / "d"))
    found = sum((content(split) for split in parts(data).values()), Counter())
    assert found == expected(np.stack([colour] * 32), [0] * 16 + [1] * 16)


def odd_exif(orientation: int) -> bytes:
    """EXIF whose XResolution is text, as some cameras write it."""
    entries = struct.pack("<HHIHHHHI4s", 0x0112, 3, 1, orientation, 0, 0x011A, 2, 4, b"72\0\0")
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


def test_a_photograph_with_odd_exif_is_turned_all_the_same(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}}, height=6, width=4)
    Image.new("RGB", (6, 4), (250, 0, 0)).save(root / "a" / "odd.jpg", exif=odd_exif(6))
    data = load_data(str(root))
    assert sum(len(split) for split in parts(data).values()) == 21
    assert data.train.images.shape[2:] == (6, 4)


# Sizes, memory, streams


def test_images_of_one_size_are_kept_as_they_are(tmp_path: Path) -> None:
    data = load_data(str(image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}}, height=5, width=9)))
    assert images_of(data.train).shape[1:] == (3, 5, 9)


def mixed_sizes(root: Path, odd: int = 3) -> Path:
    image_folder(root, {"": {"a": 100, "b": 100}}, height=40, width=40)
    save(root / "a" / f"{odd:03}.png", pixels(1, 64, 48, seed=77)[0])
    return root


# One that the look at the first, middle and last images meets; then the shorter side of 64 x 48 becomes 32 (28 * 256 /
# 224), the longer 43. And one that it does not meet: then nothing is cut off the central square.
@pytest.mark.parametrize(("odd", "size", "left", "top"), [(3, (32, 43), 2, 7), (65, (28, 37), 0, 4)])
def test_images_of_differing_sizes_are_resized_and_cropped_to_one(
    tmp_path: Path, odd: int, size: tuple[int, int], left: int, top: int
) -> None:
    root = mixed_sizes(tmp_path / "d", odd)
    data = load_data(str(root), image_size=28)
    again = load_data(str(root), image_size=28)
    everything = torch.cat([images_of(split) for split in parts(data).values()])
    assert everything.shape == (200, 3, 28, 28)
    image = Image.open(root / "a" / f"{odd:03}.png").resize(size, Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(image.crop((left, top, left + 28, top + 28)))).permute(2, 0, 1)
    assert (everything == wanted).flatten(1).all(dim=1).sum() == 1
    assert again.fingerprint == data.fingerprint


def test_sizes_known_to_differ_are_not_found_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = mixed_sizes(tmp_path / "d", odd=65)
    load_data(str(root), image_size=28)
    calls = decodes(monkeypatch)
    load_data(str(root), image_size=28)
    assert calls == []


@pytest.mark.parametrize("source", ["files", "parquet", "parquet, no cache"])
def test_a_stream_gives_the_images_that_memory_would_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    if source == "files":
        folder = mixed_sizes(tmp_path / "d")
        held = load_data(str(folder), image_size=28)
    else:
        folder = tmp_path / "d"
        cells = [encoded(pixels(1, 8 + n % 3, 9, seed=n)[0]) for n in range(60)]
        parquet(folder / "train-0.parquet", [0, 1] * 30, cells=cells)
        held = load_data(str(folder), image_size=28)
        if source == "parquet, no cache":
            (tmp_path / "file").write_text("")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    streamed = load_data(str(folder), image_size=28, memory_limit=1000)
    for part in ALL_PARTS:
        one, other = parts(held)[part], parts(streamed)[part]
        assert isinstance(one, MemorySplit)
        assert isinstance(other, StreamSplit)
        assert len(one) == len(other)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, images_of(pickle.loads(pickle.dumps(other))))


def test_a_damaged_copy_for_streaming_is_made_again(tmp_path: Path, cache_folder: Path) -> None:
    folder = str(parquet_folder(tmp_path / "d"))
    wanted = images_of(load_data(folder, memory_limit=1, image_size=8).train)
    (copy,) = cache_folder.glob("*.arrow")
    size = copy.stat().st_size
    # A new file, as another process would leave: the old one is still mapped here.
    copy.unlink()
    copy.write_bytes(b"broken")
    _mapped.cache_clear()
    assert torch.equal(images_of(load_data(folder, memory_limit=1, image_size=8).train), wanted)
    assert copy.stat().st_size == size


def test_a_stream_is_not_needed_where_resized_images_fit(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}}, height=64, width=64)
    assert images_of(load_data(str(root), image_size=24).train).shape[2:] == (64, 64)
    small = load_data(str(root), image_size=24, memory_limit=20 * 3 * 24**2)
    assert isinstance(small.train, MemorySplit)
    assert small.train.images.shape[2:] == (24, 24)


@pytest.mark.parametrize("odd", [3, 65])
def test_a_model_sees_as_much_of_a_picture_whatever_the_memory_and_the_subset(tmp_path: Path, odd: int) -> None:
    image_folder(tmp_path / "d" / "train", {"": {"a": 100, "b": 100}}, height=40, width=40)
    image_folder(tmp_path / "d" / "test", {"": {"a": 2, "b": 2}}, height=40, width=40)
    save(tmp_path / "d" / "train" / "a" / f"{odd:03}.png", pixels(1, 64, 48)[0])
    found = []
    for options in ({}, {"memory_limit": 204 * 3 * 28**2}, {"memory_limit": 10**5}, {"subset": 4}):
        data = load_data(str(tmp_path / "d"), image_size=28, **options)
        x, _ = next(iter(batches(parts(data)["test"], size=28, workers=0)))
        found.append((data.shorter_side, x))
    assert {shorter for shorter, _ in found} == {32 if odd == 3 else 28}
    for _, x in found[1:]:
        assert (x - found[0][1]).abs().mean() < 0.02  # rounded to bytes before or not


def test_fingerprint_follows_content(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path / "d")
    held, streamed = load_data(str(folder)), load_data(str(folder), memory_limit=10)
    assert len(held.fingerprint) == len(streamed.fingerprint) == 64
    assert load_data(str(folder)).fingerprint == held.fingerprint
    assert load_data(str(folder), seed=1).fingerprint != held.fingerprint
    assert load_data(str(folder), memory_limit=10).fingerprint == streamed.fingerprint
    parquet(folder / "plain_text" / "test-00000-of-00001.parquet", [0, 1] * 10, seed=3)  # other labels
    assert load_data(str(folder)).fingerprint != held.fingerprint
    assert load_data(str(folder), memory_limit=10).fingerprint != streamed.fingerprint
    parquet(folder / "plain_text" / "test-00000-of-00001.parquet", [1, 0] * 10, seed=4)  # other images
    assert load_data(str(folder)).fingerprint != held.fingerprint


# Cuts


def test_cut_is_pinned() -> None:
    """The same on every platform and in every version, or results cannot be compared."""
    labels = np.array([0, 1, 2] * 10)
    _, part = cut(labels, 6, seed=0, stream=1, what="", classes="abc")
    assert part.tolist() == [7, 10, 11, 15, 18, 23]
    _, other = cut(labels, 6, seed=1, stream=1, what="", classes="abc")
    assert other.tolist() != part.tolist()


@pytest.mark.parametrize("sizes", [(10, 10, 10), (100, 7, 2), (2, 2, 200), (33, 34, 35)])
@pytest.mark.parametrize("count", [3, 10, 17])
def test_cut_is_stratified_disjoint_and_complete(sizes: tuple[int, ...], count: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), sizes))
    rest, part = cut(labels, count, seed=5, stream=0, what="", classes="abc")
    assert sorted([*rest, *part]) == list(range(sum(sizes)))
    assert len(part) == count
    for label, size in enumerate(sizes):
        amount = (labels[part] == label).sum()
        share = count * size / sum(sizes)
        assert 1 <= amount < size
        # Off its share by less than one, but for what the minimum of one image takes or gives.
        slack = 3 if min(sizes) == 2 else 1
        assert abs(amount - share) < slack


def test_splits_are_the_same_every_time_and_do_not_move_with_each_other(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 50, "b": 50}})
    one, two = load_data(str(root)), load_data(str(root))
    wide = load_data(str(root), validation=0.3)
    assert torch.equal(images_of(one.validation), images_of(two.validation))
    assert len(wide.validation) == 30
    assert content(parts(wide)["test"]) == content(parts(one)["test"])  # whatever is held out for validation
    assert content(load_data(str(root), seed=3).validation) != content(one.validation)


def test_validation_is_a_tenth_or_what_is_asked_for(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path / "d"))
    for asked, count in ((None, 6), (10, 10), (0.5, 30)):
        data = load_data(folder, validation=asked)
        assert len(data.validation) == count
        assert data.validation.labels.bincount().tolist() == [count // 2, count // 2]
        assert len(data.train) == 60 - count
        assert len(parts(data)["test"]) == 20


def test_subset_is_stratified_and_part_of_the_whole(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path / "d"))
    whole, some = load_data(folder), load_data(folder, subset=10)
    for part, count in zip(ALL_PARTS, (10, 6, 10), strict=True):  # validation has six in all
        assert parts(some)[part].labels.bincount().tolist() == [count // 2, count // 2]
        assert content(parts(some)[part]) <= content(parts(whole)[part])


def test_subset_alone_does_not_decode_the_rest(tmp_path: Path, cache_folder: Path) -> None:
    folder = image_folder(tmp_path / "d", {"": {"a": 50, "b": 50}})
    before = load_data(str(folder), subset=4)
    used = set(sum((content(split) for split in parts(before).values()), Counter()))
    assert not list(cache_folder.glob("*"))
    for file in folder.rglob("*.png"):
        pixel = np.asarray(Image.open(file)).transpose(2, 0, 1).tobytes()
        if pixel not in {image for image, _ in used}:
            file.write_bytes(b"broken")
    assert load_data(str(folder), subset=4).fingerprint == before.fingerprint


# Cache


def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with each image decoded from now on."""
    import upop.data.items

    calls: list[int] = []
    real = upop.data.items.decode

    def counted(items: Any, index: int, size: int | None) -> Any:
        calls.append(index)
        return real(items, index, size)

    monkeypatch.setattr(upop.data.items, "decode", counted)
    return calls


def test_a_second_load_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    folder = parquet_folder(tmp_path / "d")
    first = load_data(str(folder))
    calls = decodes(monkeypatch)
    second = load_data(str(folder))
    subset = load_data(str(folder), subset=10)
    assert calls == []
    assert second.fingerprint == first.fingerprint
    assert content(subset.train) <= content(first.train)
    assert not list(cache_folder.glob("*.tmp"))
    assert isinstance(second.train, MemorySplit)
    second.train.images.zero_()  # the splits are copies, not the cache
    assert load_data(str(folder)).fingerprint == first.fingerprint


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}})
    before = load_data(str(folder))
    save(folder / "a" / "003.png", pixels(1, seed=55)[0])
    os.utime(folder / "a" / "003.png", (1, 1))
    assert load_data(str(folder)).fingerprint != before.fingerprint


@pytest.mark.parametrize("limit", [2**30, 1])
@pytest.mark.parametrize("statistics", [True, False])
def test_a_changed_file_that_a_table_names_is_decoded_again(tmp_path: Path, limit: int, statistics: bool) -> None:
    cells: list[dict[str, Any]] = [{"bytes": encoded(image), "path": "nowhere.png"} for image in pixels(20)]
    cells[3] = {"bytes": None, "path": "files/3.png"}
    save(tmp_path / "d" / "files" / "3.png", pixels(1, seed=1)[0])
    table = tmp_path / "d" / "train.parquet"
    parquet(table, [0, 1] * 10, cells=cells)
    pq.write_table(pq.read_table(table), table, write_statistics=statistics)
    options = {"memory_limit": limit, "image_size": 8}
    one = load_data(str(tmp_path / "d"), **options)
    assert load_data(str(tmp_path / "d"), **options).fingerprint == one.fingerprint
    grey = np.full((1, 8, 8, 3), 90, np.uint8)
    save(tmp_path / "d" / "files" / "3.png", grey[0])
    os.utime(tmp_path / "d" / "files" / "3.png", (1, 1))
    other = load_data(str(tmp_path / "d"), **options)
    assert other.fingerprint != one.fingerprint
    changed = sum((content(split) for split in parts(other).values()), Counter())
    assert expected(grey, [1]) <= changed


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def other_shape(file: Path) -> None:
    np.save(file, np.zeros((3, 3, 8, 8), np.uint8))


def other_type(file: Path) -> None:
    np.save(file, np.zeros((80, 3, 8, 8), np.int16))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        other_shape,
        other_type,
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"rubbish"),
        lambda file: file.write_bytes(pickle.dumps(Evil())),
        lambda file: (file.unlink(), file.mkdir()),
    ],
)
def test_a_damaged_cache_is_ignored(
    tmp_path: Path, cache_folder: Path, damage: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = parquet_folder(tmp_path / "d")
    before = load_data(str(folder))
    for file in cache_folder.glob("*-kept.npy"):
        damage(file)
    calls = decodes(monkeypatch)
    assert load_data(str(folder)).fingerprint == before.fingerprint
    assert len(calls) == 80


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = parquet_folder(tmp_path / "d")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load_data(str(folder)).train) == 54


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_folder: Path) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(load_data(str(parquet_folder(tmp_path / "d"))).train) == 54
    assert list(cache_folder.glob("*")) == []


# Broken files


@pytest.mark.parametrize("limit", [2**30, 10])
def test_a_broken_file_is_named_or_skipped_on_request(tmp_path: Path, limit: int) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 30, "b": 30}})
    whole = content(load_data(str(root), memory_limit=limit, image_size=8).train)
    (root / "a" / "007.png").write_bytes(encoded(pixels(1)[0])[:60])
    (root / "b" / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"b/notes\.txt: expected an image, got a file ending in '\.txt'; remove it"):
        load_data(str(root))
    data, again = (load_data(str(root), skip_bad=True, memory_limit=limit, image_size=8) for _ in range(2))
    assert data.skipped == again.skipped == (f"{root}/b/notes.txt", f"{root}/a/007.png")
    assert sum(len(split) for split in parts(data).values()) == 59
    assert content(data.train) <= whole  # no other image moved
    assert again.fingerprint == data.fingerprint
    (root / "b" / "notes.txt").unlink()
    with pytest.raises(DataError, match=r"a/007\.png: expected an image, got OSError: .*; remove or replace"):
        [images_of(split) for split in parts(load_data(str(root), memory_limit=limit)).values()]


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_broken_file_that_is_held_out_is_found_before_training_where_images_are_streamed(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "d", {split: {"a": 5, "b": 5} for split in ("train", "val", "test")})
    broken = root / part / "b" / "001.png"
    broken.rename(tmp_path / "sound")
    broken.write_bytes(b"broken")
    with pytest.raises(DataError, match=rf"d/{part}/b/001\.png: expected an image, got 6 bytes"):
        load_data(str(root), memory_limit=1)
    (tmp_path / "sound").rename(broken)
    (root / "train" / "a" / "002.png").write_bytes(b"broken")
    calls = decodes(monkeypatch)
    assert len(load_data(str(root), memory_limit=1).train) == 10  # the first epoch will meet it
    assert len(calls) == 20
    assert len(load_data(str(root), memory_limit=1, skip_bad=True).train) == 9
    assert len(calls) == 30
    load_data(str(root), memory_limit=1)
    assert len(calls) == 30


def test_a_subset_out_of_the_cache_skips_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 30, "b": 30}})
    for number in (3, 12, 25):
        (root / "a" / f"{number:03}.png").write_bytes(b"broken")
    load_data(str(root), skip_bad=True)
    calls = decodes(monkeypatch)
    cached = [load_data(str(root), skip_bad=True, subset=8, seed=seed) for seed in range(4)]
    assert len(calls) == sum(len(data.skipped) for data in cached)  # which are tried again, and no others
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    for seed, data in enumerate(cached):
        fresh = load_data(str(root), skip_bad=True, subset=8, seed=seed)
        assert (fresh.skipped, fresh.fingerprint) == (data.skipped, data.fingerprint)
    assert len({data.skipped for data in cached}) > 1


@pytest.mark.parametrize("limit", [2**30, 10])
def test_an_image_that_could_not_be_read_once_is_no_longer_skipped(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import upop.data.items

    root = image_folder(tmp_path / "d", {"": {"a": 30, "b": 30}})
    (root / "b" / "003.png").write_bytes(b"broken")
    real = upop.data.items.read_bytes

    def refusing(path: Path, **options: Any) -> bytes:
        if path.name == "007.png":
            raise PermissionError(path)
        return real(path, **options)

    options = {"skip_bad": True, "memory_limit": limit, "image_size": 8}
    with monkeypatch.context() as patch:
        patch.setattr(upop.data.items, "read_bytes", refusing)
        data = load_data(str(root), **options)
        assert len(data.skipped) == 3
        assert load_data(str(root), **options).skipped == data.skipped
    for _ in range(2):
        assert load_data(str(root), **options).skipped == (f"{root}/b/003.png",)


def test_a_broken_image_in_a_table_is_named_by_its_row(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(image), "path": None} for image in pixels(20)]
    cells[11]["bytes"] = b"no image"
    parquet(tmp_path / "d" / "train-0.parquet", [0, 1] * 10, cells=cells)
    with pytest.raises(DataError, match=r"d/train-0\.parquet row 11: expected an image, got 8 bytes that Pillow"):
        load_data(str(tmp_path / "d"))
    data = load_data(str(tmp_path / "d"), skip_bad=True)
    assert data.skipped == (f"{tmp_path}/d/train-0.parquet row 11",)
    with pytest.raises(DataError, match="row 11"):  # although a cache is there now
        load_data(str(tmp_path / "d"))


def test_a_split_of_broken_files_alone_is_an_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"train": {"a": 10, "b": 10}, "test": {"a": 1, "b": 1}})
    for file in (root / "test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="d without its broken files: expected images in test, got none; add"):
        load_data(str(root), skip_bad=True)


def test_one_class_alone_is_refused(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 20}})
    with pytest.raises(DataError, match=r"expected 2 classes or more, got 1 \(a\)"):
        load_data(str(root))


def test_a_link_to_nowhere_is_a_broken_file(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}})
    (root / "a" / "zzz.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"a/zzz\.png: expected an image, got FileNotFoundError"):
        load_data(str(root))
    assert load_data(str(root), skip_bad=True).skipped == (f"{root}/a/zzz.png",)


def test_a_class_of_broken_files_alone_is_an_error(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}})
    for file in (root / "b").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="d without its broken files: class 'b' has no image in train"):
        load_data(str(root), skip_bad=True)


# Messages


def test_unknown_names_get_the_nearest_known_one() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'cifr10': expected cifar10, .*; did you mean 'cifar10'\?"):
        load_data("cifr10")
    with pytest.raises(DataError, match=r"unknown data set '/no/such/folder': expected .* a folder that exists"):
        load_data("/no/such/folder")
    with pytest.raises(DataError, match="unknown data set ''"):
        load_data("")


def test_hub_dataset_without_train_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"label": [0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict({"all": table}))
    with pytest.raises(DataError, match="a/b: expected a split 'train', got all; choose another"):
        load_data("a/b")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train", "holdout"), "a/b: expected splits called train, validation and test, got holdout; download it"),
        (("train", "valid", "validation"), "a/b: expected one validation split, got valid and validation"),
        (("train", "eval", "testing"), None),
        (("train", "test", "noisy"), None),
    ],
)
def test_splits_of_a_hub_dataset_are_known_by_several_names_and_never_lost(
    monkeypatch: pytest.MonkeyPatch, names: Sequence[str], message: str | None
) -> None:
    import datasets

    cells = [{"bytes": encoded(image), "path": None} for image in pixels(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    table = datasets.Dataset.from_dict({"img": cells, "label": [0, 1] * 10}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(dict.fromkeys(names, table)))
    if message:
        with pytest.raises(DataError, match=message):
            load_data("a/b")
    else:
        data = load_data("a/b")
        assert len(parts(data)["test"]) == 20
        assert len(data.validation) == (20 if "eval" in names else 2)


def test_no_network_is_said_in_one_line() -> None:
    with pytest.raises(
        DataError,
        match=r"could not load nobody/nothing from the Hub: it is not in the cache; unset HF_HUB_OFFLINE, or give a "
        "local folder",
    ) as caught:
        load_data("nobody/nothing")
    assert "\n" not in str(caught.value)


def no_images(root: Path) -> None:
    root.mkdir()
    (root / "README.md").write_text("")


def loose_images(root: Path) -> None:
    save(root / "a.png", pixels(1)[0])


def empty_class(root: Path) -> None:
    image_folder(root, {"": {"a": 10, "b": 10}})
    (root / "c").mkdir()


def other_classes(root: Path) -> None:
    image_folder(root, {"train": {"a": 10, "b": 10}, "test": {"a": 3, "c": 3}})


def no_train(root: Path) -> None:
    image_folder(root, {"val": {"a": 10}, "test": {"a": 3}})


def two_validations(root: Path) -> None:
    image_folder(root, {"train": {"a": 10}, "val": {"a": 3}, "valid": {"a": 3}})


def one_each(root: Path) -> None:
    image_folder(root, {"": {"a": 10, "b": 2}})


def no_label_column(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1], names=None, columns=("img", "y"))


def no_image_column(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1], names=None, columns=("x", "label"))


def text_as_image(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1], cells=["a", "b"])


def columns_differ(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 5)
    parquet(root / "test-0.parquet", [0, 1] * 5, columns=("img", "labels"))


def shard_missing(root: Path) -> None:
    parquet_folder(root)
    (root / "plain_text" / "train-00001-of-00002.parquet").unlink()


def hashed_shards(root: Path, *shards: str) -> None:
    for name in ("test-00000-of-00001-1b2c3d4e5f607182", *shards):
        parquet(root / "data" / f"{name}.parquet", [0, 1] * 5)


def hashed_shard_missing(root: Path) -> None:
    hashed_shards(root, "train-00000-of-00002-9d40b6ad3a4b6ab6")


def uploaded_twice(root: Path) -> None:
    hashed_shards(root, *(f"train-{number:05}-of-00002-{name}" for number in range(2) for name in ("9d40", "b6ad")))


def uploaded_twice_in_parts(root: Path) -> None:
    hashed_shards(root, "train-00000-of-00002-9d40", "train-00000-of-00002-b6ad")


def uploaded_beside(root: Path) -> None:
    hashed_shards(root, "train-00000-of-00001-9d40", "train-0")


def shard_broken(root: Path) -> None:
    parquet_folder(root)
    (root / "plain_text" / "train-00001-of-00002.parquet").write_bytes(b"PAR1")


def two_sets(root: Path) -> None:
    parquet_folder(root)
    parquet(root / "other" / "train-0.parquet", [0, 1])


def unnamed_parquet(root: Path) -> None:
    parquet(root / "stuff.parquet", [0, 1])


def other_parquet_beside(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 10)
    parquet(root / "holdout.parquet", [0, 1] * 10)


def two_validation_files(root: Path) -> None:
    for name in ("train-0", "valid-0", "validation-0"):
        parquet(root / f"{name}.parquet", [0, 1] * 10)


def label_too_large(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1, 2] * 5)


def label_missing(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1, None] * 5)


def label_fraction(root: Path) -> None:
    parquet(root / "train-0.parquet", [0.5, 1.0] * 5, names=None)


def odd_labels(*labels: Any) -> Callable[[Path], None]:
    """A builder of train with these labels, ten times."""

    def build(root: Path) -> None:
        parquet(root / "train-0.parquet", labels * 10, names=None)

    return build


def label_types_differ(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 10, names=None)
    parquet(root / "test-0.parquet", ["0", "1"] * 10, names=None)


def unnamed_classes_differ(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 5, names=None)
    parquet(root / "test-0.parquet", [0, 2] * 5, names=None)


def class_only_in_test(root: Path) -> None:
    parquet(root / "train-0.parquet", [0] * 10)
    parquet(root / "test-0.parquet", [0, 1] * 5)


def class_nowhere(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 10, names=("ant", "bee", "cow"))


def empty_train(root: Path) -> None:
    parquet(root / "train-0.parquet", np.empty(0, np.int64), cells=pa.array([], pa.binary()))


def empty_test(root: Path) -> None:
    parquet(root / "train-0.parquet", [0, 1] * 10)
    parquet(root / "test-0.parquet", np.empty(0, np.int64), cells=pa.array([], pa.binary()))


def secret_train(root: Path) -> None:
    parquet(root / "train-0.parquet", [-1] * 10)


def a_file(root: Path) -> None:
    root.write_text("")


BAD_FOLDERS: list[tuple[Callable[[Path], None], str]] = [
    (no_images, r"d: no images: expected parquet files, .* or a folder per class, got README\.md; check the path"),
    (loose_images, r"d/a\.png: expected images inside class folders, got one beside them; move"),
    (empty_class, "d/c: expected images of class 'c', got none; add images or remove the folder"),
    (other_classes, "test: expected the same classes as in .*train, got 'b' in train but not in test; give both"),
    (no_train, "d: expected a folder train beside test, val, got none; add or rename it"),
    (two_validations, "d: expected one validation split, got val and valid; remove one"),
    (one_each, "d: expected 3 images .*, to cut validation and test from, got 2 of 'b'; add"),
    (no_label_column, "expected a column 'label' or 'labels' or 'fine_label', got img, y; rename"),
    (no_image_column, "expected a column 'img' or 'image', got x, label; rename"),
    (text_as_image, r"expected encoded images \(bytes, .*\) in column 'img', got string; convert"),
    (
        columns_differ,
        "test-0.parquet: expected columns 'img' and 'label' as in train-0.parquet, got img, labels; give",
    ),
    (shard_missing, "d: expected all 2 parquet files of train, got 1; complete the download"),
    (hashed_shard_missing, "d: expected all 2 parquet files of train, got 1; complete the download"),
    (uploaded_twice, "d: expected 2 parquet files of train, got 4 of several uploads; remove the others"),
    (uploaded_twice_in_parts, "d: expected all 2 parquet files of train, got 1; complete the download"),
    (uploaded_beside, "d: expected 1 parquet files of train, got 2 of several uploads; remove"),
    (shard_broken, "train-00001-of-00002.parquet: expected a parquet file, got .*; download it again"),
    (two_sets, "d: several data sets in it: other, plain_text; name the folder of one"),
    (unnamed_parquet, r"d: expected parquet files named train-\*\.parquet, got stuff\.parquet; rename"),
    (
        other_parquet_beside,
        r"d: expected parquet files named .*, got holdout\.parquet besides; rename it or take it out",
    ),
    (two_validation_files, "d: expected one validation split, got valid and validation; remove one"),
    (label_too_large, r"d: expected labels from 0 to 1 \(2 classes\), got 2; correct"),
    (label_missing, "d: expected a label for every image, got 5 empty in train"),
    (label_fraction, "d: expected labels as integers or strings, got double; convert"),
    (odd_labels([0], [1]), r"d: expected labels as integers or strings, got list<.*>; convert"),
    (odd_labels({"kind": 0}, {"kind": 1}), r"d: expected labels as integers or strings, got struct<.*>; convert"),
    (odd_labels(b"ape", b"owl"), "d: expected labels as integers or strings, got binary; convert"),
    (odd_labels(Decimal(0), Decimal(1)), "d: expected labels as integers or strings, got decimal.*; convert"),
    (odd_labels(np.uint64(0), np.uint64(2**64 - 1)), "d: labels cannot be used: .*18446744073709551615 .*; convert"),
    (label_types_differ, "d: expected labels of one type, got int64 in train and string in test; convert"),
    (unnamed_classes_differ, "d: expected the same classes in train and test, got 1 in one only; give"),
    (class_only_in_test, "d: expected the classes of train in test, got 'bee' besides; give both"),
    (class_nowhere, "d: class 'cow' has no image in train; add images or remove it"),
    (empty_train, "d: expected images in train, got none; add"),
    (empty_test, "d: expected images in test, got none; add"),
    (secret_train, r"d: expected labels from 0 to 1 \(2 classes\), got -1"),
    (a_file, "d: expected a folder, got a file; give the folder that holds it"),
]


@pytest.mark.parametrize(("build", "message"), BAD_FOLDERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_folder_is_explained_in_one_line(tmp_path: Path, build: Callable[[Path], None], message: str) -> None:
    build(tmp_path / "d")
    with pytest.raises(DataError, match=message) as caught:
        load_data(str(tmp_path / "d"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0}, "d: validation: expected 2 to 58 of 60 images, .* got 0; choose"),
        ({"validation": 59}, "d: validation: expected 2 to 58 of 60 images, .* got 59"),
        ({"validation": 1.5}, r"validation: expected a float between 0 and 1, got 1\.5"),
        ({"subset": 1}, "d: subset of train: expected 2 to 54 of 54 images, .* got 1"),
    ],
)
def test_impossible_cuts_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(str(parquet_folder(tmp_path / "d")), **options)


def test_validation_of_its_own_is_not_overruled(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "d", {"train": {"a": 10, "b": 10}, "val": {"a": 2, "b": 2}})
    with pytest.raises(DataError, match="validation=5 given, but the data set has a validation split of 4 images"):
        load_data(str(root), validation=5)


# Batches


def held(count: int, height: int = 8, width: int = 8, classes: int = 5) -> MemorySplit:
    images = torch.from_numpy(pixels(count, height, width)).permute(0, 3, 1, 2).contiguous()
    return MemorySplit(images, torch.arange(count) % classes)


def streamed(root: Path, count: int = 22) -> StreamSplit:
    folder = image_folder(root, {"train": {"a": count, "b": count}, "val": {"a": 2, "b": 2}, "test": {"a": 2, "b": 2}})
    split = load_data(str(folder), memory_limit=1, image_size=8).train
    assert isinstance(split, StreamSplit)
    return split


def batches(split: Split, **options: Any) -> Batches:
    return Batches(split, **{"batch_size": 8, "size": 8, "mean": MEAN, "std": STD, "num_classes": 5, **options})


def normalised(images: Tensor) -> Tensor:
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def same(one: Iterator[tuple[Tensor, Tensor]], other: Iterator[tuple[Tensor, Tensor]]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def test_evaluation_gives_every_image_once_in_order() -> None:
    split = held(21)
    loader = batches(split, augment=Augment(erasing=1.0))
    found = list(loader)
    assert len(loader) == len(found) == 3
    x, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(x, normalised(split.images), atol=1e-6, rtol=1e-6)
    assert torch.equal(y, split.labels)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_training_shuffles_by_seed_and_epoch_and_drops_what_does_not_fill_a_batch() -> None:
    split = held(21)
    loader = batches(split, train=True)
    epochs = [list(loader.epoch(epoch)) for epoch in (0, 0, 1)] + [list(batches(split, train=True, seed=1))]
    assert len(loader) == 2
    assert all(len(y) == 8 for epoch in epochs for _, y in epoch)
    assert same(iter(epochs[0]), iter(epochs[1]))
    assert not same(iter(epochs[0]), iter(epochs[2]))
    assert not same(iter(epochs[0]), iter(epochs[3]))
    seen = torch.cat([x for x, _ in epochs[0]])
    assert len(seen.unique(dim=0)) == 16  # nothing comes twice
    # Each comes with its own label.
    rows = {row.numpy().tobytes(): label for row, label in zip(normalised(split.images), split.labels, strict=True)}
    for x, y in epochs[0]:
        assert [rows[row.numpy().tobytes()] for row in x] == y.tolist()


def test_a_split_smaller_than_a_batch_is_one_batch() -> None:
    loader = batches(held(5), train=True)
    assert len(loader) == 1
    assert [len(y) for _, y in loader] == [5]


@pytest.mark.parametrize("kind", ["memory", "stream", "workers"])
def test_starting_at_batch_k_equals_an_uninterrupted_epoch(tmp_path: Path, kind: str) -> None:
    split: Split = held(44) if kind == "memory" else streamed(tmp_path / "d")
    augment = Augment(mixup=0.5, cutmix=0.5, erasing=0.5, color=0.4, randaugment=1)
    workers = 2 if kind == "workers" else 0
    loader = batches(split, train=True, augment=augment, workers=workers)
    whole = list(loader.epoch(3))
    again = batches(split, train=True, augment=augment, workers=workers)
    for start in (0, 2, 5):
        torch.rand(3)  # whatever else draws random numbers must not matter
        assert same(iter(whole[start:]), again.epoch(3, start))
    assert len(whole) == 5


def test_batches_leave_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    for split in (held(44), streamed(tmp_path / "d")):
        list(batches(split, train=True, augment=Augment(mixup=0.5), workers=1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("train", [False, True])
def test_ranks_share_every_batch(world: int, train: bool) -> None:
    split = held(25)
    ranks = [batches(split, train=train, batch_size=6, rank=rank, world=world) for rank in range(world)]
    alone = list(batches(split, train=train, batch_size=6))
    found = [list(rank) for rank in ranks]
    assert [len(rank) for rank in ranks] == [len(some) for some in found]
    for number, (x, y) in enumerate(alone):
        shares = [some[number] for some in found if number < len(some)]
        assert torch.equal(torch.cat([share for share, _ in shares]), x)
        assert torch.equal(torch.cat([share for _, share in shares]), y)
    assert sum(len(y) for some in found for _, y in some) == (24 if train else 25)
    if train:
        assert len({len(rank) for rank in ranks}) == 1


def test_ranks_draw_different_augmentations() -> None:
    image = held(1).images.expand(8, 3, 8, 8).clone()
    split = MemorySplit(image, torch.zeros(8, dtype=torch.int64))
    shares = [
        next(iter(batches(split, train=True, rank=rank, world=2, augment=Augment(erasing=1.0))))[0] for rank in (0, 1)
    ]
    assert not torch.equal(*shares)


def test_stream_and_memory_give_the_same_batches(tmp_path: Path) -> None:
    split = streamed(tmp_path / "d")
    copy = MemorySplit(images_of(split), split.labels)
    for train in (False, True):
        options = {"train": train, "augment": Augment(), "size": 12}
        assert same(iter(batches(split, workers=2, **options)), iter(batches(copy, **options)))


def test_workers_go_on_when_all_processes_of_a_run_are_asked_to_stop(tmp_path: Path) -> None:
    loader = iter(batches(streamed(tmp_path / "d"), batch_size=1, workers=2))
    next(loader)
    # By another process than their own: that one ends them.
    subprocess.run(["kill", "-TERM", *(str(child.pid) for child in multiprocessing.active_children())], check=True)
    assert len(list(loader)) == 43


def test_workers_go_on_when_they_are_asked_to_stop_before_they_have_begun(tmp_path: Path, monkeypatch) -> None:
    begin = signal_handling._set_worker_signal_handlers

    def asked() -> None:
        begin()  # from here on torch has workers end by a SIGTERM
        subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", asked)
    assert len(list(batches(streamed(tmp_path / "d"), batch_size=1, workers=2))) == 44


@pytest.mark.parametrize(("stored", "size"), [((8, 8), 20), ((32, 32), 12), ((10, 14), 10), ((40, 30), 16)])
def test_images_are_resized_as_pillow_does_it_after_cropping_to_a_square(stored: tuple[int, int], size: int) -> None:
    noise = held(6, *stored)
    # Mid-range values, since Pillow clips what overshoots after each of its two passes, and torch once.
    split = MemorySplit(noise.images // 2 + 64, noise.labels)
    x, _ = next(iter(batches(split, size=size, mean=(0, 0, 0), std=(1, 1, 1))))
    height, width = stored
    side = min(stored)
    left, top = (width - side) // 2, (height - side) // 2
    for image, result in zip(split.images, x, strict=True):
        square = Image.fromarray(image.permute(1, 2, 0).numpy()).crop((left, top, left + side, top + side))
        wanted = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        assert np.abs(result.permute(1, 2, 0).numpy() - wanted).max() < 2 / 255  # Pillow rounds twice


def test_resizing_does_not_overshoot() -> None:
    x, _ = next(iter(batches(held(6), size=20, mean=(0, 0, 0), std=(1, 1, 1))))
    assert x.min() == 0
    assert x.max() == 1


def test_mixing_gives_soft_labels() -> None:
    x, y = next(iter(batches(held(16), train=True, augment=Augment(cutmix=1.0))))
    assert x.shape == (8, 3, 8, 8)
    assert y.shape == (8, 5)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_file_met_in_a_stream_is_named_in_one_line(tmp_path: Path, workers: int) -> None:
    split = streamed(tmp_path / "d")
    (tmp_path / "d" / "train" / "b" / "005.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^\S*train/b/005\.png: expected an image") as caught:
        list(batches(split, workers=workers))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "world": 2}, "expected a rank from 0 to 1, got 2"),
        ({"world": 9}, "expected a batch_size of 9 or more .* got 8"),
        ({"world": 7, "train": True}, r"expected 7 images or more \(one per rank\), got 6"),
        ({"size": 0}, "expected a size of 1 pixel or more, got 0"),
        ({"std": (1, 1, 0)}, r"expected mean and std of 3 channels, std above 0, got .* and \(1, 1, 0\)"),
        ({"mean": (1,)}, "expected mean and std of 3 channels"),
        ({"num_classes": 3}, "expected labels below 3, got 4; give the model more classes"),
    ],
)
def test_batches_refuse_what_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(held(6), **options)


def test_batches_refuse_to_start_after_the_end() -> None:
    with pytest.raises(DataError, match="expected to start from batch 0 to 2, got 3"):
        batches(held(16)).epoch(0, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_never_make_the_host_wait_for_the_gpu_and_equal_those_of_the_cpu() -> None:
    split = held(64, 32, 32)
    augment = Augment(erasing=0.5, color=0.4, mixup=0.5, cutmix=0.5, randaugment=2)
    here, there = (batches(split, train=True, augment=augment, size=40, device=d) for d in ("cpu", "cuda"))
    list(there)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(there.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (u, v) in zip(here.epoch(1), found, strict=True):
        # All but a few: an operation that rounds makes a step of the last bit.
        assert ((x - u.cpu()).abs() > 1e-3 + 1e-3 * x.abs()).float().mean() < 1e-3
        torch.testing.assert_close(y, v.cpu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("Train", "Test"),
        ("TRAIN", "test"),
        ("train", "testing"),
        ("training_set", "test_set"),
        ("seg_train", "seg_test"),
    ],
    ids="-".join,
)
def test_splits_are_known_however_people_call_them(tmp_path: Path, names: tuple[str, str]) -> None:
    image_folder(tmp_path / "d", {names[0]: {"a": 10, "b": 10}, names[1]: {"a": 3, "b": 3}})
    data = load_data(str(tmp_path / "d"))
    assert data.classes == ("a", "b")
    assert data.test is not None
    assert (len(data.train) + len(data.validation), len(data.test)) == (20, 6)


@pytest.mark.parametrize("name", ["dev", "Val", "validation", "eval"])
def test_a_validation_split_is_known_however_people_call_it(tmp_path: Path, name: str) -> None:
    image_folder(tmp_path / "d", {"train": {"a": 10, "b": 10}, name: {"a": 3, "b": 2}})
    assert len(load_data(str(tmp_path / "d")).validation) == 5


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    image_folder(tmp_path / "d", {"": {"train": 6, "bus": 6, "test": 6}})
    assert load_data(str(tmp_path / "d")).classes == ("bus", "test", "train")


def test_images_beside_the_splits_are_not_left_out_in_silence(tmp_path: Path) -> None:
    image_folder(tmp_path / "d", {"train": {"a": 10, "b": 10}, "more": {"a": 3, "b": 2}})
    with pytest.raises(DataError, match=r"d: expected splits alone beside train, got more with images in it; call it"):
        load_data(str(tmp_path / "d"))
    (tmp_path / "d/more").rename(tmp_path / "d/.more")
    (tmp_path / "d/annotations").mkdir()
    (tmp_path / "d/annotations/a.txt").write_text("")
    assert load_data(str(tmp_path / "d")).classes == ("a", "b")


def test_a_file_that_is_no_image_is_named_with_its_size(tmp_path: Path) -> None:
    image_folder(tmp_path / "d", {"": {"a": 10, "b": 10}})
    (tmp_path / "d/a/000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"d/a/000\.png: expected an image, got 0 bytes that Pillow"):
        load_data(str(tmp_path / "d"))
