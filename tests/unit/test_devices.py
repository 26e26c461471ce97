"""Nothing meets on two devices, and a training step asks a GPU for one value: on a GPU that is not there."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import upop
from upop.augment import Augment
from upop.compensate import cut_and_compensate_, input_moments
from upop.data import Batches
from upop.data.splits import MemorySplit
from upop.evaluation import evaluate
from upop.families import find_structures
from upop.hook import SearchHook
from upop.oneshot import rank
from upop.recipe import FitOptions
from upop.trace import TraceRecorder
from upop.train import fit

sys.path.insert(0, str(Path(__file__).parents[1]))
import fakegpu

pytestmark = pytest.mark.skipif(not fakegpu.available(), reason="a GPU that is not there needs a C++ compiler")
STEPS = 4


@pytest.fixture(scope="module")
def _guard(tmp_path_factory):
    fakegpu.build_guard(tmp_path_factory.mktemp("guard"))


@pytest.fixture
def gpu(_guard):
    with fakegpu.fake_gpu() as gpu:
        yield gpu


@pytest.fixture
def accelerator(gpu, monkeypatch):
    """Accelerate as it is on a machine with a GPU; it leaves the model where it is."""
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda", 0))
    return Accelerator(cpu=True, device_placement=False)


def batches(**options):
    split = MemorySplit(torch.zeros(32, 3, 32, 32, dtype=torch.uint8), torch.arange(32) % 10)
    shape = {"batch_size": 8, "size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 10}
    return Batches(split, **shape, device="cuda", **options)


def test_it_refuses_what_a_gpu_refuses_and_counts_questions(gpu):
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="at least two devices"):
        on_gpu + on_cpu
    assert (on_gpu + on_cpu.to("cuda")).device.type == "cuda"
    assert on_cpu.sum().item() == 3, "the CPU computes"
    assert (gpu.asked, gpu.copied) == (0, 1)
    bool(on_gpu.sum() > 2)
    assert (gpu.asked, gpu.copied) == (1, 1)
    on_gpu[on_gpu.argsort()] = 2.0
    assert (gpu.asked, gpu.copied) == (1, 2), "a value of the CPU is a copy too"
    on_cpu.to("cuda", non_blocking=True)
    assert (gpu.asked, gpu.copied) == (1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"crop": 4},
        {"color": 0.4},
        {"erasing": 0.5},
        {"mixup": 0.2},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0},
        {"randaugment": 2},
    ],
    ids=str,
)
def test_batches_are_made_on_the_device_without_a_question(gpu, options):
    made = batches(train=True, augment=Augment(**options))
    before = gpu.copied
    for images, labels in made:
        assert (images.device.type, labels.device.type) == ("cuda", "cuda")
    assert (gpu.asked, gpu.copied) == (0, before)


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "muon"}, {"ema": 0.99}, {"distill": 0.5}, {"distill_features": 0.5}, {"accumulate": 2}],
    ids=str,
)
def test_a_training_step_asks_once(gpu, accelerator, make_model, options):
    teacher = make_model().to("cuda") if any("distill" in name for name in options) else None
    model = make_model().to("cuda")
    copied = []
    fitted = fit(
        model,
        batches(train=True),
        FitOptions(epochs=1, lr=1e-3, **options),
        accelerator=accelerator,
        teacher=teacher,
        report=lambda progress: copied.append(gpu.copied),
    )
    assert fitted.skipped == 0
    assert gpu.asked == STEPS
    assert copied[-1] == copied[0], "after the first step nothing is sent in a way that waits"


def searched(gpu, model, accelerator, steps, **options):
    options = {"target": upop.Target(params=0.5), **options}
    search = upop.Search(model, steps=steps, **options)
    hook = SearchHook(search, lambda: 0.5, 1e-3, TraceRecorder(search.structures, steps))
    copied = []
    fit(
        model,
        batches(train=True),
        FitOptions(epochs=steps / STEPS, lr=1e-3),
        accelerator=accelerator,
        hook=hook,
        report=lambda progress: copied.append(gpu.copied),
    )
    assert copied[-2] == copied[0], "between its first step and its last a search sends nothing in a way that waits"
    return search


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "progressive"},
        {"method": "unified", "sparsity": {"mlp": 1e-3}},
        {"method": "mask"},
        {"method": "magnitude"},
        {"method": "taylor"},
        {"method": "random"},
        {"method": "dense-continued", "target": None},
        {"structures": ("qk", "v", "mlp")},
        {"align": {"mlp": 8}},
        {"target": upop.Target(macs=0.4)},
        {"interval": 5, "gradient_order": "authors"},
    ],
    ids=str,
)
def test_a_search_and_what_it_leaves_are_on_the_device(gpu, accelerator, make_model, options):
    # Units that fall by eights are to be few parts of the model: for larger ones the search waits.
    model = make_model(layers=2 if "align" in options else 1).to("cuda")
    # The loop itself once a step; the search at every 20th, which one case comes to, and for its last decision by
    # weights.
    steps = 6 if options else 20
    search = searched(gpu, model, accelerator, steps, **options)
    assert search.done
    assert gpu.asked <= steps + 2 or options.get("method") == "magnitude"
    small = search.slim()
    assert {p.device.type for p in small.parameters()} == {"cuda"}
    assert small(torch.zeros(2, 3, 32, 32, device="cuda")).logits.device.type == "cuda"


@pytest.mark.parametrize("how", ["mean", "least-squares"])
@pytest.mark.parametrize("score", ["taylor", "gradient", "variance", "magnitude"])
def test_ranking_without_a_search_and_compensation_work_on_the_device(gpu, make_model, score, how):
    model = make_model().to("cuda")
    structures, images = find_structures(model), list(batches())
    scores = rank(model, structures, images, score=score)
    keep = {name: values.argsort() < len(values) // 2 for name, values in scores.items()}
    moments = input_moments(model, structures, (x for x, _ in images), covariance=how == "least-squares")
    cut_and_compensate_(model, structures, keep, moments, how=how)
    assert {p.device.type for p in upop.slim(model, keep).parameters()} == {"cuda"}


def test_evaluation_asks_at_the_end_alone(gpu, accelerator, make_model):
    model, images = make_model().to("cuda"), batches()
    before = gpu.copied
    with pytest.raises(AssertionError, match="every image counts once"):  # this GPU cannot count
        evaluate({"model": model}, images, accelerator=accelerator)
    assert (gpu.asked, gpu.copied) == (3, before)
