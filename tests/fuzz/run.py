"""Feed every reader of upop hostile files, each in a process of its own, and see that it refuses them well.

    python tests/fuzz/run.py --inputs 2000 --replay tests/fuzz/corpus.json

An input is a valid example of `readers` after a few `mutations`. What reads it either accepts it, or ends with exit
code 2 and one line on stderr. A traceback, a crash, more than `--seconds`, memory beyond `--mebibytes`, a file touched
outside of the output folder, a process started, code of the input run and a connection opened are findings: they are
listed, kept below `--keep`, and end in exit code 1. Linux only.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before torch: a process that has used its threads cannot be forked.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import mutations as m
import readers as r

ALLOWED = ("/dev/null", "/proc/self/", "/dev/shm/")
PLACES = ("pipe", "folder", "link to nowhere", "link to itself", "link to /dev/zero", "sparse", "removed", "empty")


@dataclass(frozen=True)
class Input:
    """One hostile input: of a reader, its file with that number, and what is done to it."""

    reader: str
    file: str
    mutations: list[m.Mutation]
    place: str = ""  # what is put in the file's place, one of PLACES


@dataclass(frozen=True)
class Outcome:
    """`verdict`: accepted, refused, or what went wrong; `line`: what was said; `grown`: MiB of memory at most."""

    verdict: str
    line: str
    seconds: float
    grown: float


def draw(chance: random.Random, base: Path, names: list[str]) -> Input:
    """A hostile input, the same for the same state of `chance`."""
    name = chance.choices(names, [r.READERS[name].weight for name in names])[0]
    file = chance.choice(files_of(base / name, r.READERS[name]))
    if chance.random() < 0.07:
        return Input(name, file, [], chance.choice(PLACES))
    kinds = m.kinds(file)
    count = chance.choice((1, 1, 1, 2, 3))
    return Input(
        name, file, [(chance.choice(kinds), round(chance.random(), 6), chance.getrandbits(16)) for _ in range(count)]
    )


def files_of(folder: Path, reader: r.Reader) -> list[str]:
    found = {
        p.relative_to(folder / "in").as_posix() for g in reader.files for p in (folder / "in").glob(g) if p.is_file()
    }
    assert found, f"{folder}: nothing to mutate"
    return sorted(found)


def try_input(given: Input, base: Path, work: Path, *, seconds: float, mebibytes: int) -> Outcome:
    """Mutate a copy of the reader's example in `work`, and read it in a process of its own."""
    prepare(given, base, work)
    canary = look(work)
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        be_the_reader(given.reader, work, mebibytes)
    status, usage = wait(child, seconds)
    taken = time.monotonic() - begun
    said = (work / "stderr").read_text(errors="replace")
    events = (work / "events").read_text(errors="replace").splitlines()
    grown = max(0.0, usage.ru_maxrss / 1024 - float((work / "began").read_text()))
    verdict = judge(status, said, events)
    if verdict in ("accepted", "refused") and look(work) != canary:
        verdict = "changed its input"
    if verdict in ("accepted", "refused") and grown > mebibytes:
        verdict = "memory"
    left = [p.name for p in (work / "out").rglob("*") if p.is_file() and "cache" not in p.parts]
    if verdict == "refused" and left:
        verdict = f"left {left[0]} behind"
    return Outcome(verdict, said.strip()[-2000:], taken, grown)


def prepare(given: Input, base: Path, work: Path) -> None:
    """The folders `in`, with the hostile file, and `out`, empty."""
    for name in ("in", "out"):
        shutil.rmtree(work / name, ignore_errors=True)
    shutil.copytree(base / given.reader / "in", work / "in", copy_function=shutil.copy2)
    (work / "out").mkdir(parents=True)
    file = work / "in" / given.file
    content = m.mutate(file.read_bytes(), given.file, given.mutations)
    times = file.stat().st_mtime_ns
    if given.place:
        file.unlink()
        put(file, given.place)
    else:
        file.write_bytes(content)
        os.utime(file, ns=(times, times))
    if (mend := r.READERS[given.reader].mend) is not None:
        with contextlib.chdir(work):
            mend()


def put(file: Path, place: str) -> None:
    if place == "pipe":
        os.mkfifo(file)
    elif place == "folder":
        file.mkdir()
    elif place == "sparse":
        with file.open("wb") as stream:
            stream.truncate(2**40)
    elif place == "empty":
        file.touch()
    elif place.startswith("link"):
        file.symlink_to({"link to nowhere": "nowhere", "link to itself": file.name}.get(place, "/dev/zero"))


def be_the_reader(name: str, work: Path, mebibytes: int) -> None:
    """In the child: read within bounds, under watch; never returns."""
    code = 70
    try:
        os.chdir(work)
        if (work / "in/cache").exists():
            shutil.copytree(work / "in/cache", work / "out/cache", symlinks=True, copy_function=copy_if_file)
        os.environ |= {"XDG_CACHE_HOME": str(work / "out/cache")}
        os.environ |= {"HOME": str(work / "out"), "HF_HOME": str(work / "out/hf")}
        for number, file in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        events = os.open("events", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        Path("began").write_text(str(resident()))
        bound(resource.RLIMIT_DATA, data_now() + (mebibytes << 20))
        bound(resource.RLIMIT_CORE, 0)
        bound(resource.RLIMIT_FSIZE, 256 << 20)
        watch(events, work)
        code = call(r.READERS[name].read)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def copy_if_file(source: str, target: str) -> None:
    """A pipe or a device cannot be copied, only made again."""
    if os.path.isfile(source):
        shutil.copy2(source, target)


def call(read: tuple[str, ...] | Callable[[], object]) -> int:
    from upop import cli
    from upop.errors import UpopError

    if isinstance(read, tuple):
        sys.argv = ["upop", *read]
        cli.main()
        return 0
    try:
        read()
    except (UpopError, OSError) as error:  # what the command line makes a line of
        sys.stderr.write(f"upop: {' '.join(str(error).split())}\n")
        return 2
    return 0


def bound(what: int, most: int) -> None:
    resource.setrlimit(what, (most, most))


def data_now() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) << 10


def resident() -> float:
    """MiB of this process; a child begins with less than its parent, whose mapped files it has not touched."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def watch(events: int, work: Path) -> None:
    """Note whatever a reader of files has no business with: Python says so to hooks that cannot be taken off."""
    inside, out = str(work / "in"), str(work / "out")
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    busy = False

    def note(what: str) -> None:
        os.write(events, f"{what[:300]}\n".encode(errors="replace"))

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        try:
            if event == "open" and isinstance(given[0], str | bytes):
                path = os.path.abspath(os.fsdecode(given[0]))
                if given[2] & writing and not path.startswith((out, *ALLOWED)) and path != out:
                    note(f"wrote: {path}")
            elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "shutil.rmtree"):
                at = given[-1] if event in ("os.remove", "os.rmdir") and given[-1] >= 0 else None
                start = os.getcwd() if at is None else os.readlink(f"/proc/self/fd/{at}")
                path = os.path.normpath(os.path.join(start, os.fsdecode(given[0])))
                if not path.startswith(out):
                    note(f"wrote: {event} {path}")
            elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"):
                note(f"started: {event} {given!r:.200}")
            elif event == "socket.connect":
                note(f"connected: {given!r:.200}")
            elif event == "pickle.find_class" and given[0] not in ("numpy", "numpy.core.multiarray", "_codecs"):
                note(f"unpickled: {given!r}")
            elif event == "exec" and getattr(given[0], "co_filename", "").startswith(inside):
                note(f"ran: {given[0].co_filename}")
        finally:
            busy = False

    sys.addaudithook(hook)


def wait(child: int, seconds: float) -> tuple[int | None, Any]:
    """The child's status and usage; None for one that had to be ended. Waiting for a busy machine is not counted."""
    begun = time.monotonic()
    while time.monotonic() - begun - queued(child) < seconds:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, _, usage = os.wait4(child, 0)
    return None, usage


def queued(child: int) -> float:
    """Seconds that a process could have run, had there been a processor for it."""
    try:
        return int(Path(f"/proc/{child}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


# The processor's and the system's names come with every result.
HARMLESS = ("started: subprocess.Popen ('git'", "started: subprocess.Popen ('uname'")


# In whatever words the bound on memory is met: our own line is one of them, and no refusal.
OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Cannot allocate", "not enough memory", "out of memory")


def judge(status: int | None, said: str, events: list[str]) -> str:
    if status is None:
        return "hang"
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    if serious := [event for event in events if not event.startswith(HARMLESS)]:
        return serious[0]
    if any(words in said for words in OUT_OF_MEMORY):
        return "memory"
    if "Traceback" in said or code not in (0, 2):
        return "traceback"
    if code == 2 and not (said.startswith("upop: ") and said.count("\n") == 1 and len(said) < 1500):
        return "more than one line" if said.count("\n") != 1 else "not our line"
    return "refused" if code == 2 else "accepted"


def look(work: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of everything around the output folder."""
    found = []
    for place, folders, files in os.walk(work):
        if Path(place) == work:
            folders[:] = [name for name in folders if name not in ("out",)]
            files = [name for name in files if name not in ("stdout", "stderr", "events", "began")]
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found.append((os.path.join(place, name), about.st_size, 0 if name == "in" else about.st_mtime_ns))
    return sorted(found)


def build_all(base: Path, work: Path, names: list[str]) -> None:
    """The valid examples, each made in a process of its own: making them starts threads, which must not be here.

    All are made where they will be read, since the cache of decoded images goes by paths and times.
    """
    for name in names:
        (work / "in").mkdir()
        if (child := os.fork()) == 0:
            code = 1
            try:
                os.chdir(work)
                os.environ["XDG_CACHE_HOME"] = str(work / "in/cache")
                r.READERS[name].build(Path("in"))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        if os.waitpid(child, 0)[1] != 0:
            raise SystemExit(f"{name}: the valid example could not be made")
        if name != "cached images":
            shutil.rmtree(work / "in/cache", ignore_errors=True)
        (base / name).mkdir(parents=True)
        shutil.move(work / "in", base / name / "in")


def check_examples(base: Path, work: Path, names: list[str], mebibytes: int) -> None:
    """A reader that refuses its valid example would pass every test."""
    for name in names:
        found = try_input(
            Input(name, files_of(base / name, r.READERS[name])[0], []), base, work, seconds=60, mebibytes=mebibytes
        )
        if found.verdict != "accepted":
            raise SystemExit(f"{name}: the valid example is not accepted: {found}")


def inputs(options: argparse.Namespace, base: Path, names: list[str]) -> Iterator[Input]:
    if options.replay:
        for values in json.loads(Path(options.replay).read_text()):
            if values["reader"] in names:
                yield Input(**{**values, "mutations": [tuple(change) for change in values["mutations"]]})
    for number in range(options.inputs):
        yield draw(random.Random(f"{options.seed}/{number}"), base, names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, help="how many hostile inputs")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--seconds", type=float, default=10, help="that a reading may take")
    parser.add_argument("--budget", type=float, help="stop trying after so many seconds")
    parser.add_argument("--mebibytes", type=int, default=1024, help="that a reading may add to the memory")
    parser.add_argument("--readers", help="only these, by comma")
    parser.add_argument("--replay", help="a file of inputs to begin with, such as corpus.json")
    parser.add_argument("--keep", help="folder for findings")
    parser.add_argument("--verbose", action="store_true", help="a line per input")
    options = parser.parse_args()
    names = options.readers.split(",") if options.readers else list(r.READERS)
    begun = time.monotonic()
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="upop-fuzz-") as folder:
        base, work = Path(folder) / "base", Path(folder) / "work"
        work.mkdir()
        build_all(base, work, names)
        check_examples(base, work, names, options.mebibytes)
        ready = time.monotonic() - begun
        verdicts: Counter[str] = Counter()
        per_reader: Counter[tuple[str, str]] = Counter()
        findings: list[tuple[Input, Outcome]] = []
        slowest, largest = (0.0, ""), (0.0, "")
        for number, given in enumerate(inputs(options, base, names)):
            if options.budget and time.monotonic() - begun - ready > options.budget:
                break
            found = try_input(given, base, work, seconds=options.seconds, mebibytes=options.mebibytes)
            good = found.verdict in ("accepted", "refused")
            verdicts[found.verdict if good else "findings"] += 1
            per_reader[given.reader, found.verdict if good else "findings"] += 1
            slowest, largest = max(slowest, (found.seconds, given.reader)), max(largest, (found.grown, given.reader))
            if options.verbose:
                print(f"{number} {described(given)}: {found.verdict} {found.line[:300]}")
            if not good:
                findings.append((given, found))
                keep(options.keep, number, given, found)
    for given, found in findings:
        print(f"{found.verdict}: {described(given)}: {found.line.splitlines()[-1:]}")
    for name in names:
        print(f"  {name}: " + ", ".join(f"{per_reader[name, v]} {v}" for v in ("accepted", "refused", "findings")))
    print(
        f"{sum(verdicts.values())} inputs: {verdicts['accepted']} accepted, {verdicts['refused']} refused, "
        f"{len(findings)} findings; slowest {slowest[0]:.1f} s ({slowest[1]}), most memory added {largest[0]:.0f} MiB "
        f"({largest[1]}); {time.monotonic() - begun:.0f} s in all, {ready:.0f} of them to get ready"
    )
    return 1 if findings else 0


def load_libraries() -> None:
    """Once, for all readers."""
    import datasets
    import matplotlib.pyplot
    import plotly.offline
    import pyarrow.parquet  # noqa: F401
    from transformers import AutoModelForImageClassification  # noqa: F401

    import upop.animate
    import upop.benchrun
    import upop.pretrained
    import upop.report.page
    import upop.run
    import upop.study
    from upop import cli

    del datasets, matplotlib, plotly, upop
    r.quiet()
    # What is imported only where it is needed is needed by all.
    sys.argv = ["upop", "analyze", "deit-digits"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main()


def described(given: Input) -> str:
    return f"{given.reader}: {given.file} {given.place or given.mutations}"


def keep(folder: str | None, number: int, given: Input, found: Outcome) -> None:
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"input": asdict(given), "outcome": asdict(found)}, indent=1)
        (Path(folder) / f"{number:05}.json").write_text(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
