"""Image data sets, from a name or a folder to batches on the device.
Must not know models or training."""

from upop.augment import Augment
from upop.data.batches import Batches
from upop.data.load import load_data
from upop.data.splits import ImageData, MemorySplit, Split, StreamSplit
from upop.errors import DataError

__all__ = [
    "Augment",
    "Batches",
    "DataError",
    "ImageData",
    "MemorySplit",
    "Split",
    "StreamSplit",
    "load_data",
]
