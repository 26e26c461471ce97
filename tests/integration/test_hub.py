"""A model and a data set of a Hub on this machine: loaded rightly, and each failure one line in bounded time."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow.parquet import write_table

import upop

sys.path.insert(0, str(Path(__file__).parent))
import fake_hub

# One process for all: huggingface_hub reads its settings once, when it is imported. Its waiting is added up, not done.
CLIENT = """
import contextlib, io, json, sys, time
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from upop import cli

waited = 0.0

class Clock:
    def __getattr__(self, name):
        return getattr(time, name)

    def sleep(self, seconds):
        global waited
        waited += seconds

_http.time = file_download.time = Clock()
found = []
for arguments in json.loads(sys.argv[1]):
    out, err, waited, began, code = io.StringIO(), io.StringIO(), 0.0, time.monotonic(), 0
    sys.argv = ["upop", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
    found.append([code, out.getvalue(), err.getvalue(), time.monotonic() - began, waited])
json.dump(found, open(FOUND, "w"))
"""


def parquet(seed: int) -> bytes:
    images = np.random.default_rng(seed).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    cells = []
    for image in images:
        made = io.BytesIO()
        Image.fromarray(image).save(made, "PNG")
        cells.append({"bytes": made.getvalue(), "path": None})
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": column, "label": [0, 1] * 6})
    made = io.BytesIO()
    write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), made)
    return made.getvalue()


@pytest.fixture(scope="module")
def hub(make_model, tmp_path_factory):
    """Repositories by name, and the folder with the model."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    model = make_model(labels=2, image=8, patch=4, width=16, id2label={0: "ant", 1: "bee"})
    upop.save_pretrained(model, folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}')
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tables = {f"data/{split}-00000-of-00001.parquet": parquet(n) for n, split in enumerate(("train", "test"))}
    bad = ["private", "gated", "busy", "broken", "portal", "html", "slow", "cut", "short", "flipped", "loop", "closed"]
    config = json.loads(files["config.json"])
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.E"}}
    repositories = {
        "good/model": files,
        "good/data": tables,
        **{f"bad/{name}": files for name in bad},
        **{f"bad/{name}-data": tables for name in ("private", "broken", "cut", "flipped", "portal")},
        "bad/pickled": {"config.json": files["config.json"], "pytorch_model.bin": b"\x80\x04."},
        "bad/code": {
            **files,
            "config.json": json.dumps(config | evil).encode(),
            "evil.py": b"open('executed', 'w')\n",
        },
        "bad/paths": {**files, "model/../../../../escaped.safetensors": files["model.safetensors"]},
        "bad/script": {"script.py": b"open('executed', 'w')\n", "README.md": b"---\n---\n"},
    }
    return repositories, folder


@pytest.fixture(scope="module")
def said(hub, tmp_path_factory):
    """What each command says: exit code, stdout, stderr, seconds."""
    repositories, folder = hub
    home = tmp_path_factory.mktemp("around") / "home"
    home.mkdir()
    models = [name for name in repositories if name.startswith("bad/") and "config.json" in repositories[name]]
    data = [name for name in repositories if name.startswith("bad/") and name not in models]
    commands = {
        "model": ["analyze", "good/model"],
        "again": ["analyze", "good/model"],
        "eval": ["eval", "good/model", "--data", "good/data", "--device", "cpu"],
        "local": ["eval", str(folder), "--data", "good/data", "--device", "cpu"],
        **{name: ["analyze", name] for name in (*models, "bad/missing")},
        **{name: ["eval", str(folder), "--data", name] for name in data},
    }
    found = home / "found.json"
    with fake_hub.serve(repositories) as (address, asked):
        environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home / "cache")}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HOME": str(home)}
        run = subprocess.run(
            [sys.executable, "-c", f"FOUND = {str(found)!r}\n{CLIENT}", json.dumps(list(commands.values()))],
            env=environment,
            cwd=home,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert run.returncode == 0, run.stderr
    return dict(zip(commands, json.loads(found.read_text()), strict=True)), asked, home


def test_a_model_of_the_hub_is_loaded_and_comes_from_the_cache_the_second_time(said):
    answers, asked, _ = said
    assert answers["model"][0] == 0, answers["model"]
    assert "parameters" in answers["model"][1]
    assert answers["again"][:2] == answers["model"][:2]
    assert asked.count(f"/good/model/resolve/{fake_hub.COMMIT}/model.safetensors") <= 2  # one HEAD, one GET


def test_a_data_set_of_the_hub_is_read_and_the_model_is_that_of_the_local_folder(said):
    answers, _, _ = said
    assert answers["eval"][0] == 0, answers["eval"]
    assert "test accuracy" in answers["eval"][1]
    assert "12 images" in answers["eval"][1]
    assert answers["eval"][1] == answers["local"][1]


REFUSED = {
    "bad/missing": "there is none of that name, or it is private; check the name, or log in",
    "bad/private": "there is none of that name, or it is private; check the name, or log in",
    "bad/gated": "its owner gives access to those who ask",
    "bad/busy": "it answers 429, too many requests; wait",
    "bad/broken": "it answers 500; try again later",
    "bad/portal": "it answers with something else than JSON, as networks do that want you to sign in first",
    "bad/html": "expected readable JSON",
    "bad/slow": "not to be had from the Hub",
    "bad/cut": "not to be had from the Hub",
    "bad/short": "not to be had from the Hub",
    "bad/flipped": "damaged on the way, its digest is not the Hub's; delete",
    "bad/loop": "not to be had from the Hub",
    "bad/closed": "not to be had from the Hub",
    "bad/pickled": "found none; others, which can run code when they are loaded, are not read",
    "bad/code": "is known to code in the folder alone, which upop does not run",
    "bad/script": "scripts are no longer supported",
    "bad/private-data": "there is none of that name",
    "bad/broken-data": "could not load bad/broken-data from the Hub",
    "bad/cut-data": "could not load bad/cut-data from the Hub",
    "bad/flipped-data": "could not load bad/flipped-data from the Hub",
    "bad/portal-data": "could not load bad/portal-data from the Hub",
}


@pytest.mark.parametrize("name", REFUSED)
def test_each_failure_is_one_line_in_bounded_time(said, name):
    code, out, message, *seconds = said[0][name]
    assert code == 2, (out, message)
    assert message.startswith("upop: ")
    assert message.count("\n") == 1, message
    assert REFUSED[name] in message
    assert sum(seconds) < 180


def test_files_in_folders_of_a_repository_are_left_there(said):
    answers, asked, _ = said
    assert answers["bad/paths"][0] == 0, answers["bad/paths"]
    assert not [path for path in asked if "escaped" in path]


def test_nothing_was_run_and_nothing_lies_outside_of_the_caches(said):
    _, _, home = said
    assert not list(home.rglob("executed"))
    assert not list(home.parent.rglob("escaped*"))
