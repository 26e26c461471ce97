"""Promises about running a model in the ways it is deployed."""

import copy
import shutil
import tempfile
from typing import ClassVar

import pytest
import torch
from torch import nn

from upop import slim
from upop.errors import ModelError, UpopError
from upop.families import find_structures
from upop.runtimes import make_runner, onnx_session, write_onnx

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")


@pytest.fixture(scope="module")
def slimmed(make_model, random_keep):
    # Of one layer: a compiler takes seconds for each, and the file of ONNX writes all alike.
    model = make_model("teacher", layers=1)
    return slim(model, random_keep(find_structures(model)))


class Plain(nn.Module):
    """A model that is no Hugging Face model, and answers with a tensor."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        return self.head(x.flatten(1))


class NotesThreads(Plain):
    """Keeps the number of threads of every pass; on the class, since runners run a copy."""

    seen: ClassVar[list[int]] = []

    def forward(self, x):
        self.seen.append(torch.get_num_threads())
        return super().forward(x)


@pytest.mark.parametrize(
    "runtime", ["eager", "onnx", pytest.param("compile", marks=[needs_compiler, pytest.mark.slow])]
)
def test_every_runtime_gives_the_logits_of_the_slimmed_model(slimmed, images, logits_of, runtime):
    pixels = images(3)
    expected = logits_of(slimmed, pixels)
    run = make_runner(slimmed, pixels, runtime=runtime)
    for logits in (run(), run()):
        assert isinstance(logits, torch.Tensor)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_weights_give_float32_logits_near_the_models(slimmed, images, logits_of):
    expected = logits_of(slimmed, images(3))
    found = make_runner(slimmed, images(3), dtype="bfloat16")()
    assert found.dtype == torch.float32
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert 0 < difference < 0.05


@pytest.mark.parametrize("runtime", ["eager", "onnx"])
def test_the_model_stays_as_it_was_and_runners_keep_what_they_were_made_of(slimmed, images, runtime):
    model = copy.deepcopy(slimmed).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attention = model.config._attn_implementation
    run = make_runner(model, images(2), runtime=runtime, dtype="float32")
    make_runner(model, images(2), dtype="bfloat16")
    first = run().clone()
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.deit.layernorm.weight.zero_()
    assert torch.equal(run(), first)


def test_models_that_answer_with_a_tensor_run_too(images):
    model, pixels = Plain().eval(), images(2)
    expected = model(pixels).detach()
    for runtime in ("eager", "onnx"):
        torch.testing.assert_close(make_runner(model, pixels, runtime=runtime)(), expected)


def test_a_pass_runs_on_as_many_threads_as_asked_and_gives_them_back(images):
    NotesThreads.seen.clear()
    before = torch.get_num_threads()
    make_runner(NotesThreads(), images(2), threads=before + 1)()
    make_runner(NotesThreads(), images(2))()
    assert NotesThreads.seen == [before + 1, before]
    assert torch.get_num_threads() == before


def test_onnx_sessions_take_torchs_threads_and_do_not_spin(images, tmp_path):
    write_onnx(Plain(), tmp_path / "m.onnx", images(1))
    for wanted, expected in ((None, torch.get_num_threads()), (3, 3)):
        options = onnx_session(tmp_path / "m.onnx", threads=wanted).get_session_options()
        assert options.intra_op_num_threads == expected
        assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_the_onnx_runtime_leaves_no_files_behind(images, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = make_runner(Plain(), images(2), runtime="onnx")
    assert list(tmp_path.iterdir()) == []
    assert run().shape == (2, 10)


@needs_compiler
def test_the_ninth_compiled_model_is_compiled_too(images):
    from torch._dynamo.utils import counters

    counters.clear()
    for _ in range(9):
        make_runner(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2)), images(2), runtime="compile")
    assert counters["stats"]["unique_graphs"] == 9


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"runtime": "onxn"}, r"runtime: expected one of eager, compile, onnx, got 'onxn'; did you mean 'onnx'\?"),
        (
            {"dtype": "bfloat61"},
            r"dtype: expected one of float32, bfloat16, got 'bfloat61'; did you mean 'bfloat16'\?",
        ),
        ({"runtime": "onnx", "dtype": "bfloat16"}, r"runtime onnx: expected dtype float32.*use eager or compile"),
        ({"threads": 0}, r"threads: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(images, choice, message):
    with pytest.raises(UpopError, match=message) as refused:
        make_runner(Plain(), images(2), **choice)
    assert "\n" not in str(refused.value)


def test_missing_onnx_packages_are_named_with_the_way_to_get_them(images, monkeypatch):
    monkeypatch.setattr("upop.runtimes.find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(UpopError, match=r'onnx: onnxscript not installed; run: pip install "upop\[onnx\]"'):
        make_runner(Plain(), images(2), runtime="onnx")


def test_a_model_that_does_not_compile_is_refused_in_one_line(images, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("\x1b[31mno compiler\x1b[0m found\nat line 3")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fails)
    with pytest.raises(ModelError, match=r"Plain: torch.compile failed \(no compiler found\); .* use runtime eager"):
        make_runner(Plain(), images(2), runtime="compile")


def test_an_onnx_file_that_cannot_be_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match=r"^m.onnx: onnxruntime cannot run it \(.*; try another --opset") as refused:
        onnx_session(tmp_path / "m.onnx")
    assert str(tmp_path) not in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UpopError, match="the model is on tpu"):
        onnx_session(tmp_path / "m.onnx", device="tpu")
