"""A share of the fuzzing that `run.py` does, and properties of the readers that can be tried in this process."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import upop
from upop.bench import Bench
from upop.errors import UpopError
from upop.latency import LatencyTable
from upop.reading import parse_json
from upop.report.form import first_fault, first_study_fault
from upop.trace import load_trace
from upop.vetting import vet

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]
fake, m, readers = (importlib.import_module(name) for name in ("fake_results", "mutations", "readers"))

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
trees = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)


def mutations_of(name):
    one = st.tuples(st.sampled_from(m.kinds(name)), st.floats(0, 1, exclude_max=True), st.integers(0, 2**16))
    return st.lists(one, min_size=1, max_size=3)


def read_or_one_line(read):
    """What was read, or None where it was refused in one line; anything else is raised."""
    try:
        return read()
    except UpopError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return None


def test_hostile_inputs_are_refused_in_one_line_within_bounds():
    """Every reader, in processes of their own: what was found before, and some new ones."""
    done = subprocess.run(
        [sys.executable, HERE / "run.py", "--replay", HERE / "corpus.json", "--inputs", "40", "--budget", "10"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    tried = re.search(r"^(\d+) inputs: .* 0 findings", done.stdout, flags=re.MULTILINE)
    assert tried, done.stdout
    assert int(tried[1]) >= 5


@quick
@given(st.text() | trees.map(json.dumps))
def test_any_text_is_an_object_or_one_line(text):
    found = read_or_one_line(lambda: parse_json(text))
    assert found is None or isinstance(found, dict)


@quick
@given(st.data(), trees)
def test_any_change_of_a_result_is_judged_without_a_traceback(data, tree):
    """What passes is shown by the report, which `run.py` tries."""
    made = fake.result()
    assert first_fault(made) is None
    place = made
    for _ in range(data.draw(st.integers(0, 3))):
        inside = [key for key, value in place.items() if isinstance(value, dict) and value]
        if inside:
            place = place[data.draw(st.sampled_from(sorted(inside)))]
    place[data.draw(st.sampled_from(sorted(place)))] = tree
    if isinstance(made.get("accuracy"), dict) and isinstance(made.get("config"), dict):
        first_fault(made)
    first_study_fault({"name": "x", "base": tree, "runs": tree})


@quick
@given(trees)
def test_what_is_no_table_is_refused(tree):
    values = tree if isinstance(tree, dict) else {"points": tree, "dense_ms": tree, "widths": tree}
    with pytest.raises(UpopError):
        LatencyTable.from_dict(values)
    with pytest.raises(UpopError):
        Bench.from_dict({"schema": 1, "status": "complete", **values})


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    readers.build_trace(folder)
    file = folder / "run/trace.npz"
    return file, file.read_bytes()


@quick
@given(mutations=mutations_of("x.npz"))
def test_a_damaged_trace_is_refused_or_read(trace, mutations):
    file, content = trace
    file.write_bytes(m.mutate(content, file.name, mutations))
    found = read_or_one_line(lambda: load_trace(file))
    assert found is None or found.masks.ndim == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    readers.build_model(folder)
    return folder / "model"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_damaged_model_folder_is_vetted_without_a_traceback(model, name):
    content = (model / name).read_bytes()

    @quick
    @given(mutations_of(name))
    def vetted(mutations):
        (model / name).write_bytes(m.mutate(content, name, mutations))
        read_or_one_line(lambda: vet(model))

    try:
        vetted()
    finally:
        (model / name).write_bytes(content)
    assert upop.from_pretrained(model) is not None


# ---------------------------------------------------------------- the watch must see what it watches for

WRONG = {
    "open('../escaped', 'w')": "wrote: ",
    "import subprocess; subprocess.Popen(['true'])": "started: ",
    "import pickle; pickle.loads(b'cos\\nsystem\\n.')": "unpickled: ",
    "bytearray(2**31)": "memory",
    "import time; time.sleep(60)": "hang",
    "raise ValueError('x')": "traceback",
    "import os; os.kill(os.getpid(), 11)": "killed by SIGSEGV",
    "import socket; socket.socket().connect_ex(('127.0.0.1', 9))": "connected: ",
    "exec(compile('1', IN + '/f.py', 'exec'))": "ran: ",
    "open('out/half', 'w').close(); raise UpopError('no')": "left half",
    "raise UpopError('two\\nlines' * 1000)": "not our line",
    "raise UpopError('no')": "refused",
    "pass": "accepted",
}
WATCHER = """
import json, sys
from pathlib import Path
import readers, run
from upop import cli
from upop.errors import UpopError
base, work = Path(sys.argv[1]) / "base", Path(sys.argv[1]) / "work"
(base / "x/in").mkdir(parents=True)
work.mkdir()
(base / "x/in/f").write_text("x")
found = []
for code in json.loads(sys.argv[2]):
    names = {"UpopError": UpopError, "IN": str(work / "in")}
    readers.READERS["x"] = readers.Reader(print, lambda: exec(code, names), ("*",))
    given = run.Input("x", "f", [])
    found.append(run.try_input(given, base, work, seconds=2, mebibytes=256).verdict)
print(json.dumps(found))
"""


def test_what_a_reader_must_not_do_is_found(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WATCHER, str(tmp_path), json.dumps(list(WRONG))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = dict(zip(WRONG, json.loads(done.stdout), strict=True))
    assert {code: verdict for code, verdict in found.items() if not verdict.startswith(WRONG[code])} == {}
