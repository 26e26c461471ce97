"""Promises of collecting: the same numbers in small files, old ones gone, and nothing else of the folder touched."""

import json

import fake_results as fake
import pytest

from upop.collect import collect
from upop.errors import UpopError


@pytest.fixture
def source(tmp_path):
    runs = {"a": fake.result(), "b": fake.result(seed=1)}
    return fake.write(tmp_path / "runs", runs, about(*runs))


def about(*labels):
    return {"runs": {label: {"differences": {}, "state": "done", "error": None} for label in labels}, "dense": None}


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_every_result_is_there_to_the_number_and_older_ones_are_gone(tmp_path, source):
    target = tmp_path / "results"
    assert collect(source, target) == 2
    (target / "report.md").write_text("kept")
    (source / "a").rename(source / "c")
    fake.write(source, {}, about("b", "c"))
    assert collect(source, target) == 2
    assert names(target) == {"b.json", "c.json", "study.json", "report.md"}
    assert json.loads((target / "c.json").read_text()) == fake.result()


def test_results_of_runs_that_are_not_done_here_stay(tmp_path, source):
    target = tmp_path / "results"
    collect(source, target)
    before = (target / "b.json").read_text()
    failed = about("a", "b")
    failed["runs"]["b"]["state"] = "failed"
    fake.write(source, {"b": fake.result(seed=9)}, failed)  # a result that does not count, for its code perhaps
    assert collect(source, target) == 1
    (source / "b/result.json").unlink()
    fake.write(source, {}, about("a", "b"))
    assert collect(source, target) == 1
    assert (target / "b.json").read_text() == before
    assert names(target) == {"a.json", "b.json", "study.json"}


def test_nothing_is_removed_where_something_cannot_be_read(tmp_path, source):
    target = tmp_path / "results"
    collect(source, target)
    fake.write(source, {"c": fake.result(seed=2)}, about("b", "c"))
    (source / "c/result.json").write_text("{")
    with pytest.raises(UpopError, match=r"c/result\.json: expected readable JSON"):
        collect(source, target)
    assert names(target) == {"a.json", "b.json", "study.json"}


@pytest.mark.parametrize("stray", ["{", json.dumps(fake.result() | {"status": "running"})], ids=["broken", "running"])
def test_results_that_the_study_does_not_list_are_nobodys_business(tmp_path, source, stray):
    target = tmp_path / "results"
    (source / "stray").mkdir()
    (source / "stray/result.json").write_text(stray)
    for _ in range(2):
        assert collect(source, target) == 2
        assert names(target) == {"a.json", "b.json", "study.json"}


def test_another_studys_results_are_refused_and_left_alone(tmp_path, source):
    target = tmp_path / "results"
    collect(source, target)
    other = fake.write(tmp_path / "smoke", {"mine": fake.result()}, about("mine") | {"name": "smoke"})
    with pytest.raises(UpopError, match=r"holds the results of the study 'fake', these are of the study 'smoke'; "):
        collect(other, target)
    (other / "study.json").unlink()
    with pytest.raises(UpopError, match=r"holds the results of the study 'fake', these are of no study; name another"):
        collect(other, target)
    assert names(target) == {"a.json", "b.json", "study.json"}


def test_files_of_others_are_refused_and_left_alone(tmp_path, source):
    target = tmp_path / "project"
    target.mkdir()
    (target / "package.json").write_text('{"name": "mine"}')
    with pytest.raises(UpopError, match=r"package.json: expected nothing but results here, got another JSON file; "):
        collect(source, target)
    assert names(target) == {"package.json"}
