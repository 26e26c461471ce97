"""Results of run folders as one small file each, to be checked in beside the report.

Must not change a number; needs no torch.
"""

import json
import shutil
from pathlib import Path

from upop.disk import write_whole
from upop.errors import UpopError
from upop.reading import read_json
from upop.report.records import load_results

KEEP = "study.json"


def collect(source: Path, target: Path) -> int:
    """Copy the results below `source` to `target/<label>.json`, and study.json; returns how many results.

    Where `source` has a study.json, only runs that are done by it are copied, and older results of runs that it no
    longer lists are removed; those of runs that are merely not done in `source` stay. Raises UpopError where `source`
    holds no results, or broken ones, and where `target` holds those of another study, or other JSON files.
    """
    results = load_results(source)  # refuses what is broken before anything is copied
    listed = {*results.study.get("runs", {}), results.study.get("dense")}
    found = {path.parent.name: path for path in source.glob("*/result.json")}
    texts = {
        label: json.dumps(read_json(path), separators=(",", ":")) + "\n"
        for label, path in found.items()
        if not results.study or label in listed - set(results.absent)
    }
    if not texts:
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
    for label, text in texts.items():
        write_whole(target / f"{label}.json", text)
    if (source / KEEP).is_file():
        shutil.copyfile(source / KEEP, target / KEEP)
    for old in others:
        if ours is not None and old.stem not in listed:
            old.unlink()
    return len(texts)


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
