"""From what a user calls a data set to its listing.
Must not decode images of files, split or cache.
"""

import re
from pathlib import Path

import numpy as np

from upop.data.folders import cifar_batches, image_folder, is_cifar_batches
from upop.data.listing import Listing
from upop.data.tables import hub_dataset, parquet_folder, parquet_names
from upop.errors import DataError, nearest, one_line

HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
KNOWN = (*HUB_NAMES, "digits")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def find(spec: str, *, skip_bad: bool) -> Listing:
    """A local path that exists, else a name we know, else a name on the Hub."""
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        try:
            return _folder(path, skip_bad=skip_bad)
        except OSError as error:
            raise DataError(f"{spec}: cannot be read: {one_line(error)}; check its permissions") from error
    if spec and path.exists():
        raise DataError(f"{spec}: expected a folder, got a file; give the folder that holds it")
    if spec == "digits":
        return _digits()
    if spec in HUB_NAMES or HUB_NAME.fullmatch(spec):
        return hub_dataset(HUB_NAMES.get(spec, spec))
    raise DataError(
        f"unknown data set {spec!r}: expected {', '.join(KNOWN)}, a folder that exists or owner/name on the Hub"
        f"{nearest(spec, KNOWN)}"
    )


def _folder(folder: Path, *, skip_bad: bool) -> Listing:
    for place in (folder, folder / "cifar-10-batches-py"):
        if is_cifar_batches(place):
            return cifar_batches(place)
    if parquet_names(folder):
        return parquet_folder(folder)
    return image_folder(folder, skip_bad=skip_bad)


def _digits() -> Listing:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels; 70 % train, 15 % validation, 15 % test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return Listing(
        name="digits",
        classes=tuple(map(str, digits.target_names)),
        images=np.repeat(grey[:, None], 3, axis=1),
        labels=digits.target.astype(np.int64),
        parts={"train": np.arange(len(grey))},
        share=0.15,
    )
