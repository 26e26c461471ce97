"""The same jobs, carried out in this process, in several, by Ray and by Slurm's stand-in, come out the same."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from upop import executors
from upop.errors import StopError, UpopError
from upop.executors import Job, Outcome, make_executor
from upop.executors.jobs import guard_command, guard_request

WRITES = "open('made', 'a').write('once\\n')"
SLEEPS = "import time; time.sleep(60)"
REFUSES = "import sys; print('working'); sys.exit('first\\nupop: epochs: expected 1 or more, got 0')"
BREAKS = "print('working'); raise KeyError('patch')"
KILLED_ONCE = f"""
import os, pathlib
if not pathlib.Path('tried').exists():
    pathlib.Path('tried').touch()
    os.kill(os.getpid(), 9)
{WRITES}
"""
SLOW_ONCE = f"""
import pathlib, time
if not pathlib.Path('tried').exists():
    pathlib.Path('tried').touch()
    time.sleep(60)
{WRITES}
"""
SURVIVES = f"""
import pathlib, time
pathlib.Path(f'began-{{os.getpid()}}').touch()
time.sleep(1.5)
{WRITES}
"""
STOPPED_ONCE = f"""
import pathlib, sys
if not pathlib.Path('tried').exists():
    pathlib.Path('tried').touch()
    sys.exit(75)
{WRITES}
"""
KILLED = "import os; open('tried', 'a').write('x'); os.kill(os.getpid(), 9)"
TIMED = "import time; a = time.time(); time.sleep({seconds}); open('times', 'w').write(f'{a} {time.time()}')"


@pytest.fixture(scope="module")
def ray():
    """One Ray for the module: an executor joins a Ray that is connected already, and leaves it running."""
    pytest.importorskip("ray")
    from upop.executors.ray import connection

    with connection("local", cores=2) as ray:
        yield ray


@pytest.fixture(params=["local", "processes", "ray", "slurm"])
def make(request):
    """Factory of executors of each kind: `make(workers)`."""
    name = request.param
    if name == "ray":
        request.getfixturevalue("ray")
    if name == "slurm":
        pytest.importorskip("submitit")

    def build(workers=2):
        workers = 1 if name == "local" else workers
        address = "local" if name in ("ray", "slurm") else None
        return make_executor(name, workers=workers, address=address)

    build.kind = name
    return build


@pytest.fixture
def make_job(tmp_path):
    """Factory of jobs that run a line of Python in a folder of their own."""

    def make(label, code, *, threads=1):
        folder = tmp_path / label
        folder.mkdir()
        command = (sys.executable, "-c", f"import os; os.chdir({str(folder)!r})\n{code}")
        return Job(label, command, folder, threads, lambda: in_this_process(command))

    return make


def in_this_process(command):
    """What a job's `call` does here: the command, its refusal as an exception."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UpopError(done.stderr.strip().splitlines()[-1].removeprefix("upop: "))


def carry_out(executor, jobs):
    started = []
    outcomes = {outcome.label: outcome for outcome in executor.run(jobs, started.append)}
    assert sorted(started) == sorted(job.label for job in jobs), "each job starts, and is said to, once"
    return outcomes


def processes_of(folder):
    """Ids of the processes that have `folder` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def ancestors(pid):
    """A command's guard, the process that started that one, the worker, and so on."""
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def soon(condition, seconds=40.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    return condition()


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def test_the_same_jobs_come_out_the_same_whoever_carries_them_out(make, make_job):
    jobs = [
        make_job("writes", WRITES),
        make_job("refuses", REFUSES),
        make_job("breaks", BREAKS),
        make_job("killed-once", KILLED_ONCE),
    ]
    outcomes = carry_out(make(), jobs)
    assert outcomes == {
        "writes": Outcome("writes"),
        "refuses": Outcome("refuses", "epochs: expected 1 or more, got 0"),
        "breaks": Outcome("breaks", "KeyError: 'patch'"),
        "killed-once": Outcome("killed-once"),
    }
    assert [(job.folder / "made").read_text() for job in (jobs[0], jobs[3])] == ["once\n", "once\n"]
    if make.kind != "local":
        assert "working" in jobs[1].log.read_text()
        assert not processes_of(jobs[0].folder.parent)


def test_no_more_than_the_workers_run_at_a_time(make, make_job):
    # Long enough for two to meet, where a worker takes a second to start.
    timed = TIMED.replace("{seconds}", {"local": "0.1", "processes": "0.7"}.get(make.kind, "1.5"))
    jobs = [make_job(f"timed-{number}", timed) for number in range(4)]
    assert not any(outcome.error for outcome in carry_out(make(2), jobs).values())
    times = [tuple(map(float, (job.folder / "times").read_text().split())) for job in jobs]
    most = max(sum(began <= moment < ended for began, ended in times) for moment, _ in times)
    assert most == (1 if make.kind == "local" else 2)


def test_nothing_goes_on_when_nobody_waits_for_it_any_more(make, make_job):
    if make.kind == "local":
        pytest.skip("nothing runs beside this process")
    if make.kind == "slurm":
        pytest.skip("submitit's stand-in for Slurm is seen to leave a command behind at times; Slurm ends its cgroup")
    child = (
        f"import subprocess, sys; open('begun', 'w'); subprocess.run([sys.executable, '-c', {SLEEPS!r}, os.getcwd()])"
    )
    jobs = [make_job("short", WRITES), make_job("long", child), make_job("later", WRITES)]
    outcomes = make().run(jobs, lambda label: None)
    assert next(outcomes) == Outcome("short")
    assert soon((jobs[1].folder / "begun").exists)
    outcomes.close()
    assert soon(lambda: not processes_of(jobs[1].folder)), "the command and its own child are gone"


def test_a_command_that_is_killed_again_and_again_is_lost_not_refused(make_job):
    job = make_job("killed", KILLED)
    outcome = carry_out(make_executor("processes"), [job])["killed"]
    assert outcome.lost
    assert outcome.error.startswith("killed by SIGKILL, 3 times")
    assert (job.folder / "tried").read_text() == "xxx"


def test_a_guard_that_is_killed_takes_its_command_along_and_is_replaced(make_job):
    job = make_job("slow-once", SLOW_ONCE)

    def kill_guard(label):
        assert soon((job.folder / "tried").exists)
        (command,) = processes_of(job.folder)
        kill(ancestors(command)[0])

    assert list(make_executor("processes").run([job], kill_guard)) == [Outcome("slow-once")]
    assert (job.folder / "made").read_text() == "once\n"


@pytest.mark.slow
def test_a_killed_ray_worker_loses_no_run_and_does_none_twice(ray, make_job):
    job = make_job("survivor", SURVIVES)
    seen = []

    def kill_worker(label):
        assert soon(lambda: list(job.folder.glob("began-*")))
        (command,) = processes_of(job.folder)
        seen.extend((command, *ancestors(command)[:3]))
        assert b"ray::" in Path(f"/proc/{seen[3]}/cmdline").read_bytes()
        kill(seen[3])

    assert list(make_executor("ray", workers=2, address="local").run([job], kill_worker)) == [Outcome("survivor")]
    assert (job.folder / "made").read_text() == "once\n"
    assert len(list(job.folder.glob("began-*"))) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in seen)


@pytest.mark.slow
def test_a_killed_slurm_job_is_submitted_again(make_job, monkeypatch):
    submitit = pytest.importorskip("submitit")
    # How long submitit waits for a result to show up on a shared file system.
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 1)
    job = make_job("survivor", SURVIVES)

    def kill_worker(label):
        assert soon(lambda: list(job.folder.glob("began-*")))
        (command,) = processes_of(job.folder)
        kill(ancestors(command)[2])

    executor = make_executor("slurm", address="local")
    assert list(executor.run([job], kill_worker)) == [Outcome("survivor")]
    assert (job.folder / "made").read_text() == "once\n"


SBATCH = """#!/bin/bash
number=$(( $(ls -d {there}/job-* 2>/dev/null | wc -l) + 1 ))
cp "$1" {there}/job-$number
SLURM_JOB_ID=$number SLURM_PROCID=0 bash "$1" >/dev/null 2>&1 &
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do case $1 in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
SACCT = """#!/bin/bash
echo "JobID|State|NodeList"
for job in {there}/job-*; do echo "${job##*-}|RUNNING|here"; done
"""


def test_slurm_is_asked_for_what_was_wished(make_job, tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    there = tmp_path / "programs"
    there.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "sacct": SACCT, "scancel": "#!/bin/bash"}.items():
        (there / name).write_text(text.replace("{there}", str(there)))
        (there / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{there}:{os.environ['PATH']}")
    jobs = [make_job("writes", WRITES, threads=3), make_job("refuses", REFUSES, threads=3)]
    executor = make_executor("slurm", gpus=1, partition="short", minutes=90, memory_gb=16)
    outcomes = carry_out(executor, jobs)
    assert outcomes["writes"] == Outcome("writes")
    assert outcomes["refuses"].error == "epochs: expected 1 or more, got 0"
    asked = (there / "job-1").read_text()
    wishes = ("cpus-per-task=3", "gpus-per-node=1", "job-name=writes", "mem=16GB", "partition=short", "time=90")
    assert all(f"#SBATCH --{wish}\n" in asked for wish in wishes)


def test_a_run_that_was_stopped_from_outside_is_taken_up_again(make_job):
    job = make_job("stopped", STOPPED_ONCE)
    assert list(make_executor("processes").run([job], lambda label: None)) == [Outcome("stopped")]
    assert (job.folder / "made").read_text() == "once\n"


def test_a_guard_that_is_to_end_gives_no_answer(make_job):
    stops = "import pathlib, signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
    job = make_job("stops", f"{stops} pathlib.Path('began').touch(); time.sleep(60)")
    # `main` forks: the guard proper is the child, in a session of its own as an executor has it.
    guard = subprocess.Popen(
        guard_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    guard.stdin.write(guard_request(job))
    guard.stdin.flush()
    assert soon((job.folder / "began").exists)
    (command,) = processes_of(job.folder)
    os.kill(ancestors(command)[0], signal.SIGTERM)
    assert guard.stdout.read() == ""
    guard.communicate()


def test_two_guards_never_run_in_one_folder_at_the_same_time(make_job):
    job = make_job("one", "import time; open('log', 'a').write('<'); time.sleep(0.5); open('log', 'a').write('>')")
    guards = [
        subprocess.Popen(guard_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for guard in guards:
        guard.stdin.write(guard_request(job))
        guard.stdin.flush()
    for guard in guards:
        assert '"code": 0' in guard.stdout.read()
        guard.communicate()
    assert (job.folder / "log").read_text() == "<><>"


def test_each_process_gets_a_gpu_of_those_that_may_be_seen_and_its_threads(make_job, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    tells = "open('told', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['OMP_NUM_THREADS'])"
    jobs = [make_job(f"job-{number}", f"import time; time.sleep(0.3)\n{tells}", threads=3) for number in range(3)]
    executor = make_executor("processes")
    assert executor.workers == 2
    carry_out(executor, jobs[:2])
    assert [(job.folder / "told").read_text() for job in jobs[:2]] == ["4 3", "GPU-7 3"]
    carry_out(make_executor("processes", gpus=0), jobs[2:])
    assert (jobs[2].folder / "told").read_text() == " 3"


def test_a_command_that_cannot_start_says_why(make_job):
    job = make_job("absent", "")
    job = Job(job.label, ("/no/such/python",), job.folder)
    outcome = carry_out(make_executor("processes"), [job])["absent"]
    assert outcome.error.startswith("/no/such/python: No such file or directory")
    assert not outcome.lost


def test_in_this_process_a_bug_is_an_outcome_and_an_interrupt_is_not(tmp_path):
    def bug():
        return {}["patch"]

    for error in (KeyboardInterrupt, StopError("dense: stopped by SIGTERM")):

        def interrupt(error=error):
            raise error

        jobs = [Job("bug", (), tmp_path, call=bug), Job("interrupt", (), tmp_path, call=interrupt)]
        outcomes = make_executor().run(jobs, lambda label: None)
        assert next(outcomes) == Outcome("bug", "KeyError: 'patch'")
        with pytest.raises((KeyboardInterrupt, StopError)):
            next(outcomes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("procesess", {}, r"expected one of local, processes, ray, slurm.*did you mean 'processes'"),
        ("processes", {"workers": 0}, r"workers: expected 1 or more, got 0"),
        ("local", {"workers": 2}, r"workers: the executor local has 1, got 2"),
        ("processes", {"gpus": 2}, r"gpus: expected 0 or 1"),
        ("ray", {"address": "somewhere"}, r"ray address: expected .*'somewhere'"),
        ("ray", {"address": "ray://127.0.0.1:9"}, r"no Ray answers there"),
        ("slurm", {"address": "lokal"}, r"did you mean 'local'"),
        ("slurm", {"minutes": 0}, r"minutes: expected 1 or more"),
        ("slurm", {"memory_gb": 0}, r"memory_gb: expected more than 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_at_once(name, options, message):
    if name in ("ray", "slurm"):
        pytest.importorskip({"ray": "ray", "slurm": "submitit"}[name])
    began = time.monotonic()
    with pytest.raises(UpopError, match=message) as error:
        make_executor(name, **options)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 6


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "slurm")])
def test_a_missing_package_says_what_to_install(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UpopError, match=rf'pip install "upop\[{package}\]"'):
        make_executor(name)


def test_slurm_without_its_programs_is_refused(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(UpopError, match="sbatch is not on this machine"):
        make_executor("slurm")


def test_no_ray_and_no_submitit_is_imported_before_it_is_needed():
    for path in Path(executors.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"ray", "submitit"}
