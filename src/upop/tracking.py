"""What trackers (TensorBoard, Weights & Biases, MLflow, Trackio ..) are told of a run: numbers, settings, pictures.

Accelerate speaks to them. Must not let one end a run: a tracker that fails is left out from then on.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from upop.errors import UpopError, nearest, said
from upop.folder import TRACKED

log = logging.getLogger(__name__)

# What metrics.jsonl calls shorter.
NAMES = {"lr": "learning_rate", "images_per_s": "images_per_second", "params": "parameters"}
PACKAGES = {"comet_ml": "comet-ml"}


def parse_trackers(text: str | None) -> tuple[str, ...]:
    """`tensorboard,wandb` as names of trackers that can be used here; none for None.

    Raises UpopError for a name that Accelerate does not know, and for a tracker that is not installed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    if text is not None and not names:
        raise UpopError(f"tracker {text!r}: expected some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, got none")
    known = {*LOGGER_TYPE_TO_CLASS, "all"}
    # What others have registered is a class at hand; of Accelerate's own the library may be missing.
    own = {name for name, tracker in LOGGER_TYPE_TO_CLASS.items() if tracker.__module__.startswith("accelerate.")}
    there = {str(tracker.value) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise UpopError(
                f"tracker {name!r}: expected some of {', '.join(sorted(known))}, got {name!r}{nearest(name, known)}"
            )
        if name in own - there:
            package = PACKAGES.get(name, name)
            raise UpopError(f"tracker {name!r}: is not installed; pip install {package}, or leave it out")
    return names


class Tracking:
    """The trackers of one run, those that its Accelerator was made with; nobody where there are none."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._accelerator, self._folder = accelerator, folder
        self.warnings: list[str] = []  # what a reader of the result must know
        self._go_on: dict[str, dict[str, Any]] = {}

    def start(self, config: Mapping[str, Any], go_on: Mapping[str, Any] | None) -> None:
        """Begin a run of each tracker; with `go_on`, the `state()` of a run that was stopped, go on with those.

        Raises UpopError where a tracker cannot begin, such as for want of a login; nothing is then left behind.
        """
        if not self._accelerator.log_with:
            return
        place = self._folder / TRACKED
        new = not self._folder.exists()
        if go_on is None and self._accelerator.is_main_process:
            # TensorBoard would show what an older run has left here as part of this one.
            shutil.rmtree(place, ignore_errors=True)
        name = self._folder.resolve().name
        names = {
            "wandb": {"name": os.environ.get("WANDB_NAME", name)},
            "mlflow": {"run_name": os.environ.get("MLFLOW_RUN_NAME", name)},
        }
        try:
            self._accelerator.init_trackers(TRACKED, config=dict(config), init_kwargs={**names, **(go_on or {})})
        except Exception as error:  # whatever their libraries raise
            for tracker in self._trackers:
                with contextlib.suppress(Exception):  # those that have not begun cannot end
                    tracker.finish()
            self._accelerator.trackers = []
            if go_on is None and self._accelerator.is_main_process:
                shutil.rmtree(self._folder if new else place, ignore_errors=True)
            which = ", ".join(str(tracker) for tracker in self._accelerator.log_with)
            raise UpopError(f"tracker {which}: cannot start ({said(error, 300)}); log in, or leave it out") from error
        self._go_on = {tracker.name: found for tracker in self._trackers if (found := _identity(tracker))}

    def state(self) -> dict[str, Any]:
        """For `start` of the process that goes on with this run."""
        return self._go_on

    def log(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Numbers as `<prefix>/<name>`, at an optimizer step of the whole run."""
        named = {f"{prefix}/{NAMES.get(key, key)}": float(value) for key, value in values.items()}
        for tracker in self._trackers:
            self._guarded(tracker, lambda tracker=tracker: tracker.log(named, step=step))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """PNG files, each under its own name; one that could not be drawn is no fault of a tracker."""
        if self._accelerator.is_main_process:
            for tracker in self._trackers:
                for file in filter(Path.exists, files):
                    self._guarded(tracker, lambda tracker=tracker, file=file: _show(tracker, file, step))

    def close(self) -> None:
        """End the runs of all trackers. Idempotent."""
        for tracker in self._trackers:
            self._guarded(tracker, tracker.finish)
        self._accelerator.trackers = []

    @property
    def _trackers(self) -> list[Any]:
        # A copy: one that fails is taken out meanwhile.
        return list(self._accelerator.trackers)

    def _guarded(self, tracker: Any, call: Any) -> None:
        if tracker not in self._accelerator.trackers:
            return
        try:
            call()
        except Exception as error:  # a server that is gone, a full disk, a library's own fault
            self._accelerator.trackers.remove(tracker)
            self.warnings.append(f"tracker {tracker.name}: failed ({said(error, 300)}) and was told nothing more")
            log.warning("%s", self.warnings[-1])


def final_numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """What a Result comes down to, flat: `accuracy/retrain/test`, `parameters/after`, `latency_ms/batch_1/after` .."""
    found: dict[str, float] = {}
    for key in ("accuracy", "loss"):
        for stage, splits in result[key].items():
            found |= {f"{key}/{stage}/{split}": value for split, value in splits.items()}
    for key, name in (("params", "parameters"), ("macs", "macs")):
        found |= {f"{name}/{when}": result[key][when] for when in ("before", "after")}
    for batch, times in result["latency"].items():
        found |= {f"latency_ms/batch_{batch}/{when}": time["median_ms"] for when, time in times.items()}
    ratio = (result["ratio"] or {}).items()
    # A target may be a text, such as 11M.
    found |= {f"ratio/{name}": value for name, value in ratio if isinstance(value, int | float)}
    return found | {f"seconds/{stage}": value for stage, value in result["seconds"].items()}


def _identity(tracker: Any) -> dict[str, Any] | None:
    """What makes a tracker go on with its present run in another process; None where the folder is enough."""
    if tracker.name == "wandb":
        return {"id": tracker.tracker.id, "resume": "allow"}
    if tracker.name == "trackio":
        return {"name": tracker.tracker.name, "resume": "allow"}
    if tracker.name == "mlflow":
        return {"run_id": tracker.tracker.info.run_id}
    return None


def _show(tracker: Any, file: Path, step: int) -> None:
    """Each library takes pictures in its own way; one that takes none has the file in the run's folder."""
    name = f"pictures/{file.stem}"
    if tracker.name == "mlflow":
        tracker.log_artifact(str(file), "pictures")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(str(file))}, step=step)
    elif hasattr(tracker, "log_images"):
        with Image.open(file) as image:
            pixels_1HWC = np.asarray(image.convert("RGB"))[None]
        # The others look at each picture for themselves.
        options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels_1HWC}, step=step, **options)
    else:
        log.info("tracker %s: takes no pictures; see %s", tracker.name, file)
