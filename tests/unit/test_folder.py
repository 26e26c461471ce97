"""A run's folder is written whole or not at all, and never over what is not a run."""

import contextlib
import errno
import os
import shutil
import stat
from importlib import metadata
from pathlib import Path

import pytest
import torch

import upop
from upop import checkpoint
from upop.errors import UpopError
from upop.folder import MARK, TRACKED, RunFolder, provenance
from upop.lock import LOCK


def test_a_sub_folder_appears_only_when_it_is_whole(tmp_path):
    folder = RunFolder(tmp_path)

    def fill(path):
        (path / "first").write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(UpopError, match=r"model: cannot be written \(No space left on device\)"):
        folder.write_folder("model", fill)
    assert list(tmp_path.iterdir()) == []


def test_an_older_sub_folder_stays_when_the_new_one_cannot_be_written(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_folder("model", lambda path: (path / "weights").write_text("good") and None)

    def fill(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(UpopError):
        folder.write_folder("model", fill)
    assert (tmp_path / "model/weights").read_text() == "good"


def test_what_ends_a_write_between_its_two_renames_loses_neither(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    write = lambda text: folder.write_folder("model", lambda path: (path / "weights").write_text(text) and None)  # noqa: E731
    write("good")
    rename = Path.rename

    def fails(self, target):
        if self.name == ".model.partial":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fails)
        with pytest.raises(UpopError, match="Input/output error"):
            write("better")
    assert (tmp_path / "model/weights").read_text() == "good"
    # And a kill there, which nothing of ours survives:
    (tmp_path / "model").rename(tmp_path / ".model.older.partial")
    (tmp_path / ".model.partial").mkdir()
    folder.sweep()
    assert (tmp_path / "model/weights").read_text() == "good"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_run_takes_nothing_over_that_an_older_one_had_put_aside(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim("a = 1\n")
    (tmp_path / "run/.last-good.older.partial").mkdir()
    folder.check(overwrite=True)
    folder.claim("a = 2\n")
    folder.tidy()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {MARK, "config.toml"}


def test_a_file_is_replaced_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_text("result.json", "1")
    folder.write_text("result.json", "2")
    assert (tmp_path / "result.json").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_what_gets_a_name_is_on_the_disk_before_and_its_name_after(tmp_path, monkeypatch):
    done, rename, fsync = [], Path.rename, os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(os.fstat(fd).st_ino) or fsync(fd))

    def renamed(self, target):
        inside = {path.stat().st_ino for path in (self, *self.rglob("*"))}
        assert inside <= set(done)
        done.clear()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(Path, "replace", renamed)
    folder = RunFolder(tmp_path)
    folder.write_folder("model", lambda path: (path / "weights").write_text("good") and None)
    assert done == [tmp_path.stat().st_ino]
    folder.write_text("result.json", "{}")
    assert done == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO], ids=errno.errorcode.get)
def test_where_folders_cannot_be_brought_onto_the_disk_a_run_goes_on_and_a_broken_disk_is_told(
    tmp_path, monkeypatch, number
):
    fsync = os.fsync

    def fails(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(UpopError, match="cannot be written") if number == errno.EIO else contextlib.nullcontext():
        checkpoint.Keeper(tmp_path / "checkpoints", 5).save({"step": 1})
        RunFolder(tmp_path).write_folder("model", lambda path: None)
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "model"}


def test_only_the_main_process_writes(tmp_path):
    folder = RunFolder(tmp_path / "run", main=False)
    folder.check(overwrite=False)
    folder.claim("")
    folder.write_text("a", "")
    folder.write_folder("b", lambda path: None)
    folder.add_line("c", {})
    with folder.log_file():
        pass
    assert list(tmp_path.iterdir()) == []


def test_claiming_empties_an_older_run_only(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim("a = 1\n")
    folder.write_text("result.json", "{}")
    folder.write_folder("model", lambda path: None)
    folder.check(overwrite=True)
    folder.claim("a = 2\n")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {MARK, "config.toml"}
    assert (tmp_path / "run/config.toml").read_text() == "a = 2\n"
    with pytest.raises(UpopError, match="already holds a run"):
        folder.check(overwrite=False)


def test_claiming_and_tidying_take_links_away_and_not_what_they_lead_to(tmp_path):
    folder, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "large disk"
    folder.claim("a = 1\n")
    elsewhere.mkdir()
    (elsewhere / "00000001").touch()
    for emptied in (lambda: folder.claim("a = 2\n"), folder.tidy):
        (tmp_path / "run/checkpoints").symlink_to(elsewhere)
        emptied()
        assert {path.name for path in (tmp_path / "run").iterdir()} == {MARK, "config.toml"}
    assert (elsewhere / "00000001").exists()


def test_what_cannot_be_taken_away_is_not_left_for_the_next_run(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.claim("")
    (tmp_path / "run/checkpoints").mkdir()

    def fails(path, *, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(UpopError, match="cannot be written"):
        folder.claim("")


def test_a_folder_of_someone_else_is_never_touched_whatever_its_files_are_called(tmp_path):
    (tmp_path / "config.toml").write_text("title = 'my site'")
    with pytest.raises(UpopError, match="no run of upop wrote"):
        RunFolder(tmp_path).check(overwrite=True)


@pytest.mark.parametrize("names", [[LOCK], [LOCK, TRACKED], [".model.partial"]], ids=str)
def test_a_folder_in_which_a_run_was_killed_before_it_wrote_anything_is_free(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    RunFolder(tmp_path).check(overwrite=False)
    (tmp_path / "config.toml").touch()
    with pytest.raises(UpopError, match="no run of upop wrote"):
        RunFolder(tmp_path).check(overwrite=True)


def test_a_folder_called_as_a_tracker_s_is_no_run_by_itself(tmp_path):
    (tmp_path / TRACKED).mkdir()  # such as the sources of upop
    with pytest.raises(UpopError, match="no run of upop wrote"):
        RunFolder(tmp_path).check(overwrite=True)


def test_what_was_put_beside_a_run_is_not_deleted_with_it(tmp_path):
    folder = RunFolder(tmp_path)
    folder.claim("")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UpopError, match=r"holds thesis\.txt, which no run of upop wrote"):
        folder.check(overwrite=True)


def test_an_empty_or_new_folder_is_free(tmp_path):
    RunFolder(tmp_path).check(overwrite=False)
    RunFolder(tmp_path / "deep/er").check(overwrite=False)


def test_a_source_tree_that_is_not_installed_knows_its_version(monkeypatch):
    def version(name):
        if name == "upop":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    assert provenance(torch.device("cpu"))["versions"]["upop"] == upop.__version__
