"""Promises of the model card and of publishing: what the result says, in the Hub's form; one line when it fails."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects

from upop.card import CARD, Parent, find_parent, model_card
from upop.errors import ModelError
from upop.publish import push

DATA = Path(__file__).parents[1] / "data"  # what two real runs left
HALF = json.loads((DATA / "half.json").read_text())
DENSE = json.loads((DATA / "dense.json").read_text())
DEIT = Parent("facebook/deit-tiny-patch16-224", "facebook/deit-tiny-patch16-224", "apache-2.0")


def header(card):
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_says_what_the_result_says():
    card = model_card(HALF, DEIT, name="half")
    for fact in (
        "without 50 % of its parameters",
        "| parameters | 2,693,578 | 1,344,675 | 0.499 |",
        "| MACs an image | 182,849,664 | 90,090,894 | 0.493 |",
        "| ms, batch 64, float32, cpu | 176.75 | 101.95 | 0.577 |",
        "| accuracy, % | validation, 5,000 images | test, 10,000 images |",
        "| dense | 82.18 | 82.08 |",
        "| slimmed, before retraining | 78.00 | 78.93 |",
        "| pruned and retrained | 83.74 | 83.17 |",
        "| head dims, shared by all heads | 64 | 15 35 38 34 33 18 |",
        "AMD EPYC (2 threads of 2 cores, Linux)",
        'upop.from_pretrained("half")',
        "trust_remote_code=True",
        HALF["command"],
        "shi2023upop",
        "That of its parent: apache-2.0",
    ):
        assert fact in card, fact


def test_the_card_has_the_hubs_metadata():
    data = header(model_card(HALF, DEIT, name="half"))
    assert data["library_name"] == "transformers"
    assert data["base_model"] == "facebook/deit-tiny-patch16-224"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["uoft-cs/cifar10"]
    assert data["metrics"] == ["accuracy"]
    assert {"upop", "pruning"} <= set(data["tags"])
    (index,) = data["model-index"]
    (found,) = index["results"]
    assert (index["name"], found["dataset"]["split"], found["metrics"][0]["value"]) == ("half", "test", 0.8317)


def test_a_dense_models_card_speaks_of_no_pruning():
    card = model_card(DENSE, Parent("`tiny`, a built-in shape", own=True), name="dense")
    assert "not pruned" in card
    assert "trust_remote_code" not in card
    assert "shi2023upop" not in card
    assert "Not chosen yet: it was trained from random weights" in card
    assert "license" not in header(card)


def test_a_run_that_removed_nothing_says_so():
    """As `dense-continued`, or a search that could remove nothing within its budget."""
    size, widths = HALF["params"]["before"], HALF["widths"]["before"]
    result = HALF | {"params": {"before": size, "after": size}, "widths": {"before": widths, "after": widths}}
    card = model_card(result, DEIT, name="whole")
    assert "by upop; not pruned." in card
    for untrue in ("without 0 %", "smaller and faster", "pruned and retrained", "layers differ in width"):
        assert untrue not in card
    assert "| retrained | 83.74 | 83.17 |" in card
    assert "modeling_upop.py" in card, "it was saved as a slimmed model all the same"


def test_what_is_trained_on_is_loaded_as_what_it_is():
    """By the stage `dense` or `retrain` alone, from a slimmed model or from one that never was."""
    retrained = DENSE | {
        key: {"dense": DENSE[key]["dense"], "retrain": DENSE[key]["dense"]} for key in ("accuracy", "loss")
    }
    for result in (DENSE, retrained):
        card = model_card(result, Parent("mine", slimmed=True), name="on")
        assert "by upop; pruned before, not again." in card
        assert "trust_remote_code=True" in card
        card = model_card(result, Parent("mine"), name="on")
        assert "by upop; not pruned." in card
        assert "trust_remote_code" not in card


def test_widths_of_a_dense_model_are_from_the_least_to_the_most():
    widths = HALF["widths"] | {"before": {"attn": [17, 23, 27, 29, 23, 17], "mlp": [768] * 6}}
    card = model_card(HALF | {"widths": widths}, DEIT, name="half")
    assert "| head dims, shared by all heads | 17 to 29 | 15 35" in card
    assert "| hidden neurons | 768 | 528" in card


def test_images_of_ones_own_are_no_data_set_of_the_hub():
    result = HALF | {"data": HALF["data"] | {"name": "photos"}, "warnings": ["at chance"]}
    card = model_card(result, Parent("mine"), name="half")
    assert "datasets" not in header(card)
    assert header(card)["model-index"][0]["results"][0]["dataset"] == {
        "name": "photos",
        "type": "imagefolder",
        "split": "test",
    }
    assert "> **at chance**" in card
    assert "Unknown: nothing says the licence" in card


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\nbase_model: a/b\n---\n# x\n", Parent("a/b", "a/b", "mit")),
        ("---\nlicense: [mit]\nbase_model: [a/b, c/d]\n---\n", Parent("a model of one's own (`mine`)")),
        ("# no metadata\n", Parent("a model of one's own (`mine`)")),
        ("---\nlicense: {\n---\n", Parent("a model of one's own (`mine`)")),
        (None, Parent("a model of one's own (`mine`)")),
    ],
    ids=["known", "lists", "no metadata", "no YAML", "no card"],
)
def test_the_parents_licence_and_name_are_those_of_its_card(tmp_path, card, expected):
    folder = tmp_path / "mine"
    folder.mkdir()
    if card is not None:
        (folder / CARD).write_text(card)
    assert find_parent(str(folder), folder) == expected


def test_a_parent_of_the_hub_goes_by_its_name_there(tmp_path):
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\nbase_model: someone/else\n---\n")
    assert find_parent("facebook/deit-tiny", tmp_path) == Parent(
        "facebook/deit-tiny", "facebook/deit-tiny", "apache-2.0"
    )
    assert find_parent("deit-tiny", None).own


@pytest.mark.parametrize(("kind", "slimmed"), [("upop_vit", True), ("vit", False)])
def test_a_parent_that_was_slimmed_is_known_by_its_config(tmp_path, kind, slimmed):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert find_parent("mine", tmp_path).slimmed == slimmed


# ---------------------------------------------------------------- publishing


class FakeHub:
    """Stands in for huggingface_hub.HfApi."""

    calls: list = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, **options):
        pass

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{name}"

    def upload_folder(self, **options):
        self.calls.append(("upload", options["repo_id"], options))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(FakeHub, "error", None)
    return FakeHub


@pytest.fixture
def run(make_model, tmp_path):
    """The folder of a run: a model in it, and things that are nobody's business."""
    make_model().save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run" / "log").write_text("secret")
    for name in (
        "notes.txt",
        "model_old/model.safetensors",
        "models/secret/a.safetensors",
        "model-drafts/a.index.json",
    ):
        (tmp_path / "run" / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "model" / name).write_text("secret")
    return tmp_path / "run"


@pytest.mark.parametrize("private", [True, False])
def test_the_model_folder_of_a_run_is_uploaded_private_unless_told_otherwise(hub, run, private):
    address = push(run, "me/half", private=private) if not private else push(run, "me/half")
    assert address == "https://huggingface.co/me/half"
    (_, made, options), (_, name, sent) = hub.calls
    assert made == name == "me/half"
    assert options == {"private": private, "exist_ok": True}
    assert sent["folder_path"] == run / "model"
    files = [str(path.relative_to(run / "model")) for path in (run / "model").rglob("*") if path.is_file()]
    rules = {rule: sent[rule] for rule in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(files, **rules)) == {"config.json", "model.safetensors"}
    assert push(run / "model", "me/half") == address


def test_what_is_no_sound_model_is_not_uploaded(hub, run, tmp_path):
    with pytest.raises(ModelError, match=r"empty: expected a model folder, or that of a complete run"):
        push(tmp_path / "empty", "me/half")
    with pytest.raises(ModelError, match=r"^half: expected owner/name"):
        push(run, "half")
    (run / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"model\.safetensors: damaged or cut short"):
        push(run, "me/half")
    assert not hub.calls


def test_without_a_network_one_line_says_so(run):
    # The tests are offline: this is the library's own answer.
    with pytest.raises(ModelError, match=r"^me/half: .*model could not be uploaded: HF_HUB_OFFLINE is set; unset it$"):
        push(run, "me/half")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route\nto host"), r"ConnectionError: no route to host; check the network and try again"),
        (type("Refused", (Exception,), {"response": type("R", (), {"status_code": 403})})(), r"hf auth login"),
    ],
    ids=["network", "forbidden"],
)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, run, error, message):
    hub.error = error
    with pytest.raises(ModelError, match=message) as refused:
        push(run, "me/half")
    assert "\n" not in str(refused.value)
