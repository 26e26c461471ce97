"""A script between an executor and one run: takes the run's lock, starts its command, says how it ended.

Runs on its own, on whatever machine the work goes to: it must not import anything of the package. One JSON request
comes on stdin, one JSON answer goes to stdout. When stdin ends, whoever asked is gone, however violently: then the
command and all that it started are ended, and only after that the lock is given back.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, Any

from filelock import FileLock

ATTEMPTS = 3  # of a command that a signal kills
GRACE_S = 20.0  # from asking a command to end to ending it: it writes a checkpoint
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class Command:
    """The command under guard, at most one process group at a time."""

    def __init__(self) -> None:
        self._group: int | None = None
        self._gate = threading.Lock()  # held for good once everything is to end: nothing starts or answers any more

    def run(self, request: dict[str, Any]) -> tuple[int, str]:
        """Exit code (negative: the signal) and what the command said last on stderr."""
        with Path(request["log"]).open("ab", buffering=0) as log:
            log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}\n".encode())
            with self._gate:
                process = subprocess.Popen(
                    request["command"],
                    cwd=request["cwd"],
                    env=os.environ | request["environment"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,
                )
                self._group = process.pid
            assert process.stderr is not None
            said: list[str] = []
            reader = threading.Thread(target=_copy, args=(process.stderr, log, said), daemon=True)
            reader.start()
            code = process.wait()
            _signal_group(process.pid, signal.SIGKILL)  # what it left behind
            reader.join(GRACE_S)
            return code, _last_line(said)

    def answer(self, answer: dict[str, Any]) -> None:
        """Tell whoever asked, and end this process; never where it was to end: that answer would be of the ending."""
        with self._gate:
            os.write(1, json.dumps(answer).encode())
            # The watching thread sits in a read of stdin, which an orderly end of the interpreter would trip over.
            os._exit(0)

    def end(self) -> None:
        """End the command, and this process with it."""
        self._gate.acquire()
        if self._group is not None:
            _signal_group(self._group, signal.SIGTERM)
            if not _gone(self._group, GRACE_S):
                _signal_group(self._group, signal.SIGKILL)
                _gone(self._group, GRACE_S)
        os._exit(1)


def main() -> None:
    # One process further away: a Ray worker that ends kills its children, but this one must live to end its own.
    if child := os.fork():
        os.close(0)
        os.close(1)
        os.waitpid(child, 0)
        return
    request = json.loads(sys.stdin.readline())
    command = Command()

    def terminate(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=command.end).start()

    def watch() -> None:
        sys.stdin.buffer.read()
        command.end()

    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=watch, daemon=True).start()
    with FileLock(request["lock"]):
        try:
            for attempt in range(1, ATTEMPTS + 1):  # noqa: B007
                code, line = command.run(request)
                if code >= 0:
                    break
            answer = {"code": code, "line": line, "attempts": attempt}
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            answer = {"code": 127, "line": f"{where}{error.strerror} on {socket.gethostname()}", "attempts": 1}
    command.answer(answer)


def _die_with_parent() -> None:
    # Only for a guard that is killed itself; Linux only.
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _copy(source: IO[bytes], log: IO[bytes], lines: list[str]) -> None:
    for line in source:
        log.write(line)
        if text := line.decode(errors="replace").strip():
            lines.append(text.rpartition("\r")[2])
            if not text.startswith("upop: "):
                del lines[:-50]


def _last_line(lines: list[str]) -> str:
    ours = [line for line in lines if line.startswith("upop: ")]
    return (ours or lines or [""])[-1].removeprefix("upop: ")[:1000]


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _gone(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return True
        time.sleep(0.02)
    return False


if __name__ == "__main__":
    main()
