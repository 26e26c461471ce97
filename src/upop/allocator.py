"""The C library's allocator, told to keep what is freed; must not change anything else of the process.

With glibc's defaults a pass that frees a few MB gives them back to the system and faults every page in again on the
next pass: a quarter of the time of DeiT-Tiny's pass of 8 images, or none of it, by how the heap happens to lie. Models
of different sizes are then not compared, their luck is.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_LARGEST_MMAP_THRESHOLD = 32 * 2**20  # of glibc on 64 bit: larger blocks are mapped and unmapped each time
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process, for the rest of its life; True where that could be set (glibc)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
