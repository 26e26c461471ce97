"""Results of run folders as one small file each, to be checked in beside the report.

Must not change a number; needs no torch.
"""

import json
import shutil
from pathlib import Path

from upop.errors import UpopError
from upop.folder import write_whole
from upop.reading import read_json
from upop.report.records import load_results

KEEP = "study.json"


def collect(source: Path, target: Path) -> int:
    """Copy every result below `source` to `target/<label>.json`, and study.json; returns how many results.

    Older results of the same study that no run in `source` stands behind any more are removed. Raises UpopError where
    `source` holds no results, or broken ones, and where `target` holds those of another study, or other JSON files.
    """
    load_results(source)  # refuses what is broken before anything is copied
    labels = {path.parent.name: path for path in source.glob("*/result.json")}
    if not labels:
        raise UpopError(f"{source}: expected run folders with a result.json each, found none; run the study first")
    others = [path for path in sorted(target.glob("*.json")) if path.name != KEEP]
    for path in others:
        if not _is_result(path):
            raise UpopError(
                f"{path}: expected nothing but results here, got another JSON file; name a folder for them alone "
                "with --out"
            )
    ours, theirs = _study(source), _study(target)
    if others and ours != theirs:
        raise UpopError(
            f"{target}: holds the results of {theirs or 'no study'}, these are of {ours or 'no study'}; name another "
            "folder with --out"
        )
    target.mkdir(parents=True, exist_ok=True)
    for old in others:
        if ours is not None and old.stem not in labels:
            old.unlink()
    for label, path in labels.items():
        text = json.dumps(read_json(path), separators=(",", ":"))
        write_whole(target / f"{label}.json", text + "\n")
    if (source / KEEP).is_file():
        shutil.copyfile(source / KEEP, target / KEEP)
    return len(labels)


def _study(folder: Path) -> str | None:
    """The study that a folder is of, in words."""
    try:
        return f"the study {read_json(folder / KEEP)['name']!r}"
    except (OSError, ValueError, KeyError):
        return None


def _is_result(path: Path) -> bool:
    try:
        found = read_json(path, finite=False)
    except (OSError, ValueError, UpopError):
        return False
    return {"schema", "status", "config", "accuracy"} <= set(found)
