"""What people do around a model in a loop of their own: float16, accumulation, clipping, wrappers, compiling."""

import copy
import math

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

import upop
from upop.errors import ModelError, TrainingError
from upop.scores import MOST_OVERFLOWS

STEPS = 6
HALF = upop.Target(params=0.5)


@pytest.fixture
def model(make_model):
    return make_model("vit", image=16, patch=8, width=32, labels=5)


def batch(step, count=4):
    source = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 16, 16, generator=source), torch.randint(5, (count,), generator=source)


def task_loss(forward, step, rows=slice(None)):
    images, labels = batch(step)
    return F.cross_entropy(forward(pixel_values=images[rows]).logits, labels[rows])


def plain(model, *, forward=None, clip=None, **options):
    search = upop.Search(model, target=HALF, steps=STEPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for step in range(STEPS):
        (task_loss(model if forward is None else forward, step) + search.penalty()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        search.step()
        optimizer.zero_grad()
    return search


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---------------------------------------------------------------- float16


def test_steps_that_a_grad_scaler_skips_count_and_add_nothing_and_its_scale_is_taken_out(model):
    """Scales of 2^100 and more overflow in float32 too, so that this is the scaler of float16, at work."""
    options = {"target": HALF, "gradient_order": "authors", "shrink": "once", "sparsity": {"attn": 0.1, "mlp": 0.1}}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-30, growth_interval=3)
    twin = copy.deepcopy(model)
    search = upop.Search(model, steps=STEPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    taken, scales = [], []
    for step in range(STEPS):
        scales.append(scaler.get_scale())
        scaler.scale(100 * task_loss(model, step) + search.penalty()).backward()
        scaler.step(optimizer)
        search.step(scaler)
        scaler.update()
        optimizer.zero_grad()
        if scaler.get_scale() >= scales[-1]:
            taken.append(step)
    assert 1 <= len(taken) < STEPS
    assert len({scales[step] for step in taken}) > 1, "the scale grew in between"
    reference = upop.Search(twin, steps=len(taken), **options)
    for step in taken:
        (100 * task_loss(twin, step) + reference.penalty()).backward()
        reference.step()
    found = search.state_dict()
    assert found["steps_done"] == STEPS
    for name, score in reference.state_dict()["scores"].items():
        torch.testing.assert_close(found["scores"][name], score, rtol=1e-5, atol=1e-7)
    assert search.slim().num_labels == 5


class Scale:
    """A scaler that never helps."""

    def get_scale(self):
        return 2.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("normalise", ["zscore", "rank", "none"])
def test_a_broken_gradient_under_a_scaler_leaves_the_scores_as_they_are(bad, normalise, model):
    search = upop.Search(model, target=HALF, steps=9, normalise=normalise)
    (task_loss(model, 0) + search.penalty()).backward()
    search.step(Scale())
    before = search.state_dict()["scores"]
    (task_loss(model, 1) * bad).backward()
    search.step(Scale())
    after = search.state_dict()
    assert after["steps_done"] == 2
    assert same(after["scores"], before)


def test_gradients_that_no_scale_mends_end_the_search(model):
    search = upop.Search(model, target=HALF, steps=10 * MOST_OVERFLOWS)
    broken = [torch.full_like(mask, math.nan) for mask in search.masks.values.values()]

    def steps(count):
        for _ in range(count):
            for mask, gradient in zip(search.masks.values.values(), broken, strict=True):
                mask.grad = gradient
            search.step(Scale())

    steps(MOST_OVERFLOWS - 1)
    task_loss(model, 0).backward()
    search.step(Scale())
    steps(MOST_OVERFLOWS - 1)
    with pytest.raises(TrainingError, match=f"NaN or infinite for {MOST_OVERFLOWS} steps, whatever the scale"):
        steps(1)


def test_accelerate_hands_its_scaler_on_where_it_has_one(model):
    from accelerate import Accelerator

    twin = copy.deepcopy(model)
    accelerator = Accelerator(cpu=True)
    search = upop.Search(twin, target=HALF, steps=STEPS)
    prepared, optimizer = accelerator.prepare(twin, torch.optim.SGD(twin.parameters(), lr=0.05))
    prepared.train()
    for step in range(STEPS):
        accelerator.backward(task_loss(prepared, step) + search.penalty())
        search.step(accelerator.scaler)
        optimizer.step()
        optimizer.zero_grad()
    assert same(search.keep(), plain(model).keep())


# ---------------------------------------------------------------- accumulation, clipping


def test_micro_batches_decide_as_one_batch(model):
    model.double()
    expected = upop.Search(twin := copy.deepcopy(model), target=HALF, steps=STEPS)
    search = upop.Search(model, target=HALF, steps=STEPS)
    for step in range(STEPS):
        images, labels = (part.double() if part.is_floating_point() else part for part in batch(step))
        (F.cross_entropy(twin(pixel_values=images).logits, labels) + expected.penalty()).backward()
        expected.step()
        for half in (slice(0, 2), slice(2, 4)):
            loss = F.cross_entropy(model(pixel_values=images[half]).logits, labels[half]) + search.penalty()
            (loss / 2).backward()
        search.step()
    assert same(search.keep(), expected.keep())


def test_clipping_the_models_gradients_leaves_those_of_masks_alone(model):
    twin = copy.deepcopy(model)
    searches = []
    for each, clip in ((model, None), (twin, 1e-3)):
        search = upop.Search(each, target=HALF, steps=2)
        (task_loss(each, 0) + search.penalty()).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(each.parameters(), clip)
        search.step()
        searches.append(search.state_dict()["scores"])
    assert same(*searches)


# ---------------------------------------------------------------- wrappers


def test_data_parallel_is_refused_before_and_after_the_search_is_made(model):
    with pytest.raises(ModelError, match=r"^DataParallel: expected the model itself.*use DistributedDataParallel"):
        upop.Search(nn.DataParallel(model), target=HALF, steps=3)
    search = upop.Search(model, target=HALF, steps=3)
    # What a replica does on the second GPU: it holds the forward of the original, whose weights are on the first.
    linear = model.get_submodule(search.structures[0].producers[0].path)
    with pytest.raises(ModelError, match=r"its weights are on cpu, its input on meta; nn\.DataParallel copies"):
        linear(torch.empty(2, linear.in_features, device="meta"))


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_under_ddp_is_searched_by_its_module(one_process, model):
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(twin)
    with pytest.raises(ModelError, match=r"^DistributedDataParallel: expected the model itself.*pass its \.module"):
        upop.Search(wrapped, target=HALF, steps=3)
    search = plain(wrapped.module, forward=wrapped)
    assert same(search.keep(), plain(model).keep())
    assert type(search.slim()).__name__ == "PrunedViTForImageClassification"


def test_sharded_weights_are_refused(one_process, model):
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(model)
    with pytest.raises(ModelError, match=r"expected a whole weight in every process, got a DTensor"):
        upop.Search(sharded, target=HALF, steps=3)


@pytest.mark.slow
def test_a_model_that_was_compiled_and_used_before_is_searched_all_the_same(model):
    expected = plain(copy.deepcopy(model))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(pixel_values=batch(0)[0])
    with pytest.raises(ModelError, match=r"^OptimizedModule: expected the model itself.*_orig_mod"):
        upop.Search(compiled, target=HALF, steps=3)
    search = plain(compiled._orig_mod, forward=compiled)
    for name, score in expected.state_dict()["scores"].items():
        torch.testing.assert_close(search.state_dict()["scores"][name], score, rtol=1e-3, atol=1e-3)
    assert same(search.keep(), expected.keep())
