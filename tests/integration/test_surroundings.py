"""Full disks, read-only folders, kills: nothing half-written is read as whole, nothing that was computed is lost."""

import builtins
import contextlib
import errno
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import upop
from upop import checkpoint, cli, disk, folder, stages
from upop.config import make_config
from upop.errors import UpopError
from upop.run import prune, resume

# A search alone: every kind of file is written, in the least time.
OPTIONS = {
    "model": "deit-digits-2layers",
    "data": "digits",
    "stages": "search",
    "subset": 40,
    "batch_size": 20,
    "epochs_search": 1,
    "threads": 1,
    "latency_seconds": 0.01,
    "checkpoint_minutes": 1e-9,
}


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run(out, **options):
    return prune(make_config({**OPTIONS, **options, "out": str(out)}))


def test_a_reader_of_the_output_that_goes_away_ends_nothing(tmp_path):
    code = "from upop.cli import show; from pathlib import Path; input()\n"
    code += "for _ in range(9): show.out.print('x' * 9000)\n"
    code += "Path('went on').touch()"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, b"")
    assert (tmp_path / "went on").exists()


def test_without_pictures_and_card_the_model_and_the_result_are_there_and_say_what_is_missing(tmp_path, monkeypatch):
    def half(result, path):
        path.write_bytes(b"half of it")
        full()

    for picture in stages.PICTURES:
        monkeypatch.setitem(stages.PICTURES, picture, half)
    monkeypatch.setattr(stages, "model_card", full)
    result = run(tmp_path / "run")
    for name in (*stages.PICTURES, "README.md"):
        assert f"{name}: could not be written (No space left on device); all else is there" in result["warnings"]
        assert not (tmp_path / "run" / name).exists()
    assert json.loads((tmp_path / "run/result.json").read_text())["warnings"] == result["warnings"]
    upop.from_pretrained(tmp_path / "run/model")


def test_without_room_for_the_result_the_run_is_finished_later_and_no_training_is_lost(tmp_path, monkeypatch):
    real = folder.write_whole

    def write(path, text):
        if path.name == "result.json":
            with folder.disk_errors(path):
                full()
        real(path, text)

    monkeypatch.setattr(folder, "write_whole", write)
    with pytest.raises(UpopError, match=r"the model itself is whole, in .*run/model; go on with --resume .*run"):
        run(tmp_path / "run")
    upop.from_pretrained(tmp_path / "run/model")
    steps = (tmp_path / "run/metrics.jsonl").read_text()
    monkeypatch.setattr(folder, "write_whole", real)
    assert resume(tmp_path / "run")["status"] == "complete"
    assert (tmp_path / "run/metrics.jsonl").read_text() == steps, "nothing was trained again"


# ---------------------------------------------------------------- every single write


@contextlib.contextmanager
def one_line(expected):
    """The error passes through, if it is one line that says `expected`."""
    try:
        yield
    except UpopError as error:
        if expected not in str(error) or "\n" in str(error):
            raise AssertionError(str(error)) from error
        raise


class Disk:
    """A disk with room for so many writes: the next one, and all after it, fail. Counts where it never fails."""

    def __init__(self, monkeypatch, room=10**9):
        self.room, self.writes, self.real = room, 0, builtins.open
        for place, name in ((builtins, "open"), (io, "open"), (os, "mkdir"), (os, "replace"), (os, "rename")):
            self._watch(monkeypatch, place, name)
        self._watch(monkeypatch, checkpoint, "save_file")

    def _watch(self, monkeypatch, place, name):
        real = getattr(place, name)

        def watched(*arguments, **keywords):
            mode = arguments[1] if len(arguments) > 1 else keywords.get("mode", "r")
            writing = name != "open" or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writing and "run" in str(arguments[1] if name == "save_file" else arguments[0]):
                self.writes += 1
                if self.writes > self.room:
                    full()
            return real(*arguments, **keywords)

        monkeypatch.setattr(place, name, watched)


def test_wherever_the_disk_is_full_one_line_says_so_and_what_is_there_is_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(patch)
        run(tmp_path / "run")
    assert disk.writes > 20, "the run must be seen to write"
    # At its beginning, among its checkpoints and models, and at its very end.
    for room in (0, disk.writes // 3, 3 * disk.writes // 4, disk.writes - 1):
        out = tmp_path / f"run{room}"
        with monkeypatch.context() as patch:
            Disk(patch, room)
            with contextlib.suppress(UpopError), one_line("No space left on device"):
                run(out)
        if (out / "result.json").exists():
            assert json.loads((out / "result.json").read_text())["status"] == "complete"
        for name in ("dense", "slim", "model", "last-good"):
            if (out / name).exists():
                upop.from_pretrained(out / name)
        assert not [path for path in out.rglob("*.partial") if path.parent.name != "checkpoints"]


def test_a_full_disk_while_a_model_is_saved_leaves_the_older_one(tmp_path, make_model, monkeypatch):
    upop.save_pretrained(make_model(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    runs = folder.RunFolder(tmp_path)
    with pytest.raises(UpopError, match="No space left on device"):
        runs.write_folder("model", full)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


# ---------------------------------------------------------------- a real limit, and a real kill


def test_a_real_limit_on_the_size_of_files_is_one_line(tmp_path):
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))
    try:
        with pytest.raises(UpopError, match=r"cannot be written .*File too large") as refused:
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run/result.json").exists()
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run/checkpoints").iterdir()), "half a checkpoint would be in the way of the next"


def write_for_ever(path):
    """In a process that is to be killed; it never returns."""

    def fill(path):
        with (path / "model.safetensors").open("wb") as file:
            for _ in range(20):
                file.write(bytes(2**20))

    with contextlib.suppress(BaseException):
        runs = folder.RunFolder(path)
        for number in itertools.count(1):
            disk.write_whole(path / "result.json", json.dumps({"number": number, "rest": "x" * 2**20}))
            runs.write_folder("model", fill)
    os._exit(1)


def test_what_a_kill_leaves_is_whole_or_not_there(tmp_path):
    for wait in (0.06, 0.23):
        if (child := os.fork()) == 0:
            write_for_ever(tmp_path)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it wrote until then"
        if (tmp_path / "result.json").exists():
            assert len(json.loads((tmp_path / "result.json").read_text())["rest"]) == 2**20
        # Between two renames the older one is aside, whole; else what is left of it is on its way out.
        found = next((p for p in (tmp_path / "model", tmp_path / ".model.older.partial") if p.exists()), None)
        assert found is None or (found / "model.safetensors").stat().st_size == 20 * 2**20


# ---------------------------------------------------------------- folders that are not to be written

READ_ONLY = [
    ["report", "results"],
    ["animate", "run"],
    ["export", "model", "--out", "out/export", "--format", "torch"],
    ["bench", "model", "model", "--out", "out/bench", "--seconds", "0.01", "--batches", "1", "--runtimes", "eager"],
    ["prune", "--model", "deit-digits", "--data", "digits", "--out", "out/run"],
]


@pytest.mark.parametrize("arguments", READ_ONLY, ids=lambda arguments: arguments[0])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, make_model, arguments):
    """By injection: whoever is root may write anywhere."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))
    import readers

    readers.build_results(tmp_path)
    readers.build_trace(tmp_path)
    upop.save_pretrained(make_model(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def read_only(*arguments, **keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    real = io.open

    def opened(file, mode="r", *more, **keywords):
        if isinstance(file, str | Path) and str(file) != os.devnull and set(mode) & set("wax+"):
            read_only(file)
        return real(file, mode, *more, **keywords)

    monkeypatch.setattr(os, "mkdir", read_only)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(sys, "argv", ["upop", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert message.startswith("upop: ")
    assert message.count("\n") == 1, message
    assert "Read-only file system" in message
    assert sorted(tmp_path.rglob("*")) == before
