"""The output folder of a run: claimed once, written atomically, and described by where its numbers come from.

Knows files, not models or stages.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upop.disk import OLDER, delete, disk_errors, put_back, sweep, sync, take_away, write_whole
from upop.errors import UpopError
from upop.lock import LOCK, held, refuse_if_held
from upop.reading import check_file, read_json

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MARK = ".upop-run"  # says that a run of upop made the folder
RUN_FILES = ("config.toml", "metrics.jsonl", "log", "result.json", "trace.npz", "widths.png", "stages.png")
FILES = (*RUN_FILES, "search.html", "report.html", "report.md")  # and what other commands leave beside them
MODELS = ("dense", "slim", "model")  # of stages that are over
FOLDERS = (*MODELS, "last-good", "checkpoints")
TRACKED = "upop"  # what some trackers write: theirs to clear, since they begin before the folder is claimed

Stamp = list[int | None]  # when some of a run's files were changed, None for those that are not there


def is_main_process() -> bool:
    """Whether this process writes and speaks for all that a launcher started; known before any set-up."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class RunFolder:
    """The folder `path`, written by the main process only."""

    path: Path
    main: bool = True

    def check(self, *, overwrite: bool, sources: Iterable[str] = ()) -> None:
        """Raise UpopError where a run must not go.

        That is: over what it reads itself (`sources`), over an older run unless `overwrite`, into a folder with files
        of someone else, where it may not write.
        """
        if not self.main:
            return
        out = self.path.resolve()
        for source in map(Path, sources):
            if source.exists() and out in (source.resolve(), *source.resolve().parents):
                raise UpopError(f"out {self.path}: holds {source}, which this run reads; choose another folder")
        parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not parent.is_dir():
            raise UpopError(f"out {self.path}: expected a folder, but {parent} is a file; choose another name")
        if not os.access(parent, os.W_OK):
            raise UpopError(f"out {self.path}: cannot be written, no permission for {parent}; choose another folder")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        found = {p.name for p in self.path.iterdir() if not p.name.endswith(".partial")}
        foreign = found - {MARK, LOCK, TRACKED, *FILES, *FOLDERS}
        # A run that was killed before it had written anything leaves its lock, perhaps with what its tracker began.
        begun = LOCK not in found or found - {LOCK, TRACKED}
        if foreign or (found and begun and MARK not in found):
            what = sorted(foreign)[0] if foreign else "files"
            raise UpopError(f"out {self.path}: holds {what}, which no run of upop wrote; choose a new or empty folder")
        refuse_if_held(self.path)
        if not overwrite and MARK in found:
            if self.holds_checkpoints and not (self.path / "result.json").exists():
                raise UpopError(
                    f"out {self.path}: holds a run that was stopped; {self.way_on}, or start over with --overwrite"
                )
            early = "" if (self.path / "result.json").exists() else ", stopped before its first checkpoint"
            raise UpopError(f"out {self.path}: already holds a run{early}; choose another folder, or say --overwrite")

    def check_restart(self, config: str, *, kept: bool) -> None:
        """Raise UpopError where a run of `config` would start over, with nothing to go on from, on what may be missed.

        That is: models, unless of the minutes before a first checkpoint (`kept`: they are), and what is left of
        another configuration.
        """
        if not self.main or not (self.path / "config.toml").exists():
            return
        minutes_old = kept and not self.holds_checkpoints
        names = (*MODELS, *(() if minutes_old else ("last-good",)), "result.json")
        models = [name for name in names if (self.path / name).exists()]
        if models:
            raise UpopError(
                f"out {self.path}: holds a run that cannot be taken up, its {' and '.join(models)} would be lost; "
                "choose another folder, or add --overwrite"
            )
        if (self.path / "config.toml").read_text(encoding="utf-8") != config:
            raise UpopError(
                f"out {self.path}: holds a run with another configuration, stopped before its first checkpoint; "
                "choose another folder, or add --overwrite"
            )

    @property
    def way_on(self) -> str:
        """What to type to take up the run that was stopped here, as a shell takes it."""
        return f"go on with --resume {shlex.quote(str(self.path))}"

    @property
    def holds_checkpoints(self) -> bool:
        return any((self.path / "checkpoints").glob("[0-9]*"))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile the folder, made where there is none, is this run's alone."""
        if not self.main:
            yield
            return
        new = not self.path.exists()
        try:
            with contextlib.ExitStack() as stack:
                with disk_errors(self.path):
                    self.path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(held(self.path))
                yield
        finally:
            if new:
                with contextlib.suppress(OSError):  # there is something in it
                    self.path.rmdir()

    @property
    def stamp(self) -> Stamp:
        """What changes when a run begins in the folder, keeps a checkpoint or ends."""
        paths = [self.path / name for name in ("config.toml", "checkpoints", "result.json")]
        return [path.stat().st_mtime_ns if path.exists() else None for path in paths]

    def refuse_if_changed(self, stamp: Stamp) -> None:
        """Raise UpopError where another run has worked here since `stamp` was taken, before the folder was locked."""
        if self.main and self.stamp != stamp:
            raise UpopError(f"out {self.path}: another run has worked in it meanwhile; look at it, then start again")

    def sweep(self) -> None:
        """Take away what writes that were cut off have left, and put back what they had put aside."""
        if self.main:
            sweep(self.path)

    def tidy(self) -> None:
        """Take away what only a run that is not complete needs."""
        self.sweep()
        for name in ("last-good", "checkpoints"):
            self.remove(name)

    def claim(self, config: str) -> None:
        """Empty the folder of any older run, and save the resolved configuration."""
        if self.main:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                sweep(self.path)
                # Only what a run leaves, by name: whatever else lies here is not ours to delete.
                for name in FILES:
                    (self.path / name).unlink(missing_ok=True)
                # What stays, such as checkpoints, would be taken for this run's.
                for name in FOLDERS:
                    delete(self.path / name, quietly=False)
                self.write_text(MARK, "A run of upop; `upop prune --overwrite` may replace what it wrote here.\n")
                self.write_text("config.toml", config)

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        if self.main:
            write_whole(self.path / name, text)

    def write_folder(self, name: str, fill: Callable[[Path], None]) -> None:
        """Write a sub-folder whole or not at all; `fill` gets the folder to fill."""
        if self.main:
            with disk_errors(self.path / name):
                temporary, older = self.path / f".{name}.partial", self.path / f".{name}{OLDER}"
                shutil.rmtree(temporary, ignore_errors=True)
                try:
                    temporary.mkdir()
                    fill(temporary)
                    for path in (*temporary.rglob("*"), temporary):
                        sync(path)
                    # Aside first: what ends this between the two renames must not lose both.
                    if (self.path / name).exists():
                        shutil.rmtree(older, ignore_errors=True)
                        (self.path / name).rename(older)
                    temporary.rename(self.path / name)
                    sync(self.path)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
                    put_back(older)

    def add_line(self, name: str, values: dict[str, Any]) -> None:
        """Append a JSON line."""
        if self.main:
            with disk_errors(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")

    def size(self, name: str) -> int:
        """Bytes of a file, 0 where there is none."""
        return (self.path / name).stat().st_size if (self.path / name).exists() else 0

    def cut(self, name: str, size: int) -> None:
        """Take from a file what was added after it had `size` bytes."""
        if self.main and self.size(name) > size:
            os.truncate(self.path / name, size)

    def remove(self, name: str) -> None:
        """Take a sub-folder away; a kill meanwhile leaves none of it under its name."""
        if self.main and (self.path / name).exists():
            with contextlib.suppress(OSError):
                take_away(self.path / name)

    @contextlib.contextmanager
    def log_file(self) -> Iterator[None]:
        """Everything that upop logs meanwhile also goes to the file `log`."""
        if not self.main:
            yield
            return
        with disk_errors(self.path / "log"):
            handler = logging.FileHandler(self.path / "log", encoding="utf-8")
        # A full disk is reported by whoever writes results; logging would print a traceback for every line.
        handler.handleError = lambda record: None  # type: ignore[method-assign]
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("upop")
        before = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(before)
            handler.close()


def weights_hash(model: Path) -> str | None:
    """What tells the weights of a saved model folder from all others; None where there are none to read."""
    whole = model / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(model.glob("model*.safetensors*"))  # shards, and their index
    hashes = [_digest(file.resolve(), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    if len(hashes) <= 1:
        return hashes[0] if hashes else None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=64)
def _digest(file: Path, changed_ns: int, size: int) -> str:
    # Studies and checkpoints ask again and again for the same large file: it is read once while it stays as it is.
    return digest(file)[:16]


def digest(file: Path) -> str:
    """sha256 of a file's content, in hexadecimal. Raises UpopError for what is no ordinary file, such as a pipe."""
    check_file(file)
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def recorded(model: Path, data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy and loss per split that the run which made the folder `model` has measured on the same data.

    Empty where no run stands behind the folder, its weights have changed since, or the data are others.
    """
    try:
        result = read_json(model.parent / "result.json")
        same = result["weights"] == weights_hash(model) is not None and result["data"] == json.loads(json.dumps(data))
        stage = list(result["accuracy"])[-1]
        splits = result["accuracy"][stage]
        return {s: {key: float(result[key][stage][s]) for key in ("accuracy", "loss")} for s in splits} if same else {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def provenance(device: "torch.device", command: str | None = None) -> dict[str, Any]:
    """Command, versions and hardware behind a result; `command` in place of the process's own."""
    import torch

    import upop

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    commit = _git("rev-parse", "HEAD")
    packages = ("torch", "transformers", "accelerate", "numpy")
    return {
        "command": command or own_command(),
        # Of the source tree that upop runs from; none when it is installed as a package.
        "commit": f"{commit}{'-dirty' if _git('status', '--porcelain', '-uno') else ''}" if commit else None,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "versions": {
            "python": platform.python_version(),
            "upop": upop.__version__,  # a source tree on the path is not installed, and has no other
            **{name: metadata.version(name) for name in packages},
        },
        "hardware": {
            "device": gpu or _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
    }


def own_command() -> str:
    """What was typed to start this process, as one would type it again."""
    name = Path(sys.argv[0]).name
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--overwrite", "--go-on")]
    # `python -m upop.cli` is how launchers say it.
    return shlex.join(["upop" if name in ("cli.py", "__main__.py") else name, *arguments])


def _git(*arguments: str) -> str:
    source = Path(__file__).parent
    if not (source.parents[1] / ".git").exists():
        return ""
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return ""


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
