"""One run in a folder at a time, and nobody is kept out by one that is dead."""

import json
import multiprocessing
import os
import re
import signal
import socket
import time

import filelock
import pytest

from upop import lock
from upop.errors import UpopError
from upop.folder import RunFolder


def hold(folder, ready, grandchild):
    """Hold the lock until killed; with `grandchild`, as a data loader's worker does, in a second process too."""
    with lock.held(folder):
        if grandchild and os.fork() == 0:
            time.sleep(5)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Starts another process that holds `tmp_path`."""
    context = multiprocessing.get_context("fork")
    started = []

    def start(*, grandchild=False):
        ready = context.Event()
        process = context.Process(target=hold, args=(tmp_path, ready, grandchild))
        process.start()
        started.append(process)
        assert ready.wait(30)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_second_run_is_refused_and_told_who_is_at_work(holder, tmp_path):
    process = holder()
    (tmp_path / ".upop-run").write_text("")
    who = rf"another run works in it \(process {process.pid} on {re.escape(socket.gethostname())}, since 20.*\); wait"
    with pytest.raises(UpopError, match=who), lock.held(tmp_path):
        pass
    for overwrite in (False, True):
        with pytest.raises(UpopError, match=who):
            RunFolder(tmp_path).check(overwrite=overwrite)
    assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == process.pid, "the holder's words stay"


def test_a_killed_run_keeps_nobody_out(holder, tmp_path):
    process = holder()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lock.refuse_if_held(tmp_path)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_workers_that_outlive_a_killed_run_keep_nobody_out(holder, tmp_path):
    process = holder(grandchild=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock.held(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(self, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    lock.refuse_if_held(tmp_path)
    with lock.held(tmp_path):
        pass
    assert "this file system has no locks; start no second run into the folder" in caplog.text


def test_what_lies_in_the_lock_file_is_never_trusted(tmp_path):
    for text in ("", "[]", '{"pid": "x", "host": 1, "since": null}', "\0" * 10):
        (tmp_path / lock.LOCK).write_text(text)
        with lock.held(tmp_path):
            pass
