"""What the report needs of a result and of a study.json, as tests of plain values.

Whoever wrote the file: what passes here is what the rest of the report may count on. Must not read files.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Fault = tuple[str, str, Any]  # dotted key, what is expected there, what is there
Test = Callable[[Any], bool]
STAGES = ("dense", "search", "slim", "retrain")
LARGEST = 1e18  # of any number: beyond, sums and pictures of it are no numbers any more


def first_fault(data: Mapping[str, Any]) -> Fault | None:
    """What is wrong with a result, or None."""
    return next(_faults(data, _result(data)), None)


def first_study_fault(data: Mapping[str, Any]) -> Fault | None:
    """What is wrong with a study.json, or None."""
    return next(_faults(data, _study()), None)


def _faults(data: Mapping[str, Any], wanted: Iterator[tuple[str, str, Test]]) -> Iterator[Fault]:
    for key, expected, right in wanted:
        value: Any = data
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not right(value):
            yield key, expected, value


def _result(data: Mapping[str, Any]) -> Iterator[tuple[str, str, Test]]:
    """(dotted key, what is expected there, a test of it), first for every result, then for pruned ones."""
    yield "config", "an object of settings", lambda value: _is_settings(value) and bool(value)
    yield "given", "null or an object of settings", lambda value: value is None or _is_settings(value)
    for key in ("accuracy", "versions", "hardware"):
        yield key, "an object", lambda value: isinstance(value, dict) and bool(value)
    yield "command", "text", _is_text
    yield "config.seed", "a whole number", _is_whole
    for key in ("config.method", "config.target"):
        yield key, "text", _is_text
    for key in ("hardware", "versions"):
        yield key, "plain values", _is_settings
    yield "seconds", "numbers per stage", lambda value: value is None or _all(value, _is_number)
    yield "warnings", "a list", lambda value: value is None or isinstance(value, list)
    yield "data", "null or name, classes, images and fingerprint", _is_data
    yield "start", "null or text", _is_text_or_null
    yield "accuracy.dense", "an object", lambda value: isinstance(value, dict)
    yield "accuracy", f"some of {', '.join(STAGES)}", lambda value: set(value) <= set(STAGES)
    for stage in data["accuracy"]:
        for split in ("validation",) if stage == "search" else ("validation", "test"):
            yield f"accuracy.{stage}.{split}", "a fraction", lambda value: _is_number(value) and 0 <= value <= 1
    yield "config.max_drop", "null or a number", lambda value: value is None or _is_number(value)
    if set(data["accuracy"]) == {"dense"} or data["config"]["method"] == "dense-continued":
        return
    yield "gap", "null or a number", lambda value: value is None or _is_number(value)
    for key in ("ratio.prunable", "ratio.params"):
        yield key, "a number", _is_number
    for key in ("params.before", "params.after", "macs.before", "macs.after"):
        yield key, "a number", lambda value: _is_number(value) and value > 0
    yield "widths", "units per kind and layer, before and after", _are_widths
    yield "latency", "milliseconds per batch size, before and after", _is_latency
    yield "trajectory", "null or step, ratio and mean_mask", _is_trajectory
    yield "checks", "null or step, ratio and accuracy of each", _are_checks


def _study() -> Iterator[tuple[str, str, Test]]:
    yield "name", "text", _is_text
    yield "base", "an object of settings", _is_settings
    yield "dense", "null or text", _is_text_or_null
    yield "runs", "an object with the state of each run", lambda value: _all(value, _is_entry)


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("state", ""), str)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _all(value: Any, test: Test) -> bool:
    """Whether this is an object, and all its values pass."""
    return isinstance(value, dict) and all(map(test, value.values()))


def _is_row(value: Any, test: Test = _is_number) -> bool:
    """Whether this is a list that holds something, and all of it passes."""
    return isinstance(value, list) and bool(value) and all(map(test, value))


def _is_settings(value: Any) -> bool:
    """Names and plain values: settings are compared, sorted and shown."""
    return _all(value, lambda each: each is None or isinstance(each, str | bool) or _is_number(each))


def _is_data(value: Any) -> bool:
    if value is None:
        return True
    classes, images = (value.get("classes"), value.get("images")) if isinstance(value, dict) else (None, None)
    known = isinstance(value, dict) and _is_text_or_null(value.get("fingerprint"))
    return known and isinstance(classes, list) and (images is None or _all(images, _is_whole))


def _are_widths(value: Any) -> bool:
    if not (_all(value, lambda side: _all(side, _is_row)) and {"before", "after"} <= set(value)):
        return False
    before, after = value["before"], value["after"]
    if set(before) != set(after):
        return False
    return all(len(before[kind]) == len(after[kind]) and min(before[kind]) > 0 for kind in before)


def _is_latency(value: Any) -> bool:
    def is_side(side: Any) -> bool:
        return isinstance(side, dict) and _is_number(side.get("median_ms")) and side["median_ms"] > 0

    return _all(
        value, lambda sides: isinstance(sides, dict) and is_side(sides.get("before")) and is_side(sides.get("after"))
    )


def _is_trajectory(value: Any) -> bool:
    if value is None:
        return True
    if not (isinstance(value, dict) and _is_row(value.get("step")) and _is_row(value.get("ratio"))):
        return False
    frames, masks = len(value["step"]), value.get("mean_mask")
    return len(value["ratio"]) == frames and bool(masks) and _all(masks, lambda rows: _is_table(rows, frames))


def _is_table(rows: Any, count: int) -> bool:
    """Whether these are `count` rows of numbers, all of one length."""
    return _is_row(rows, _is_row) and len(rows) == count and len({len(row) for row in rows}) == 1


def _are_checks(value: Any) -> bool:
    def is_check(check: Any) -> bool:
        return isinstance(check, dict) and all(_is_number(check.get(key)) for key in ("step", "ratio", "accuracy"))

    return value is None or (isinstance(value, list) and all(map(is_check, value)))
