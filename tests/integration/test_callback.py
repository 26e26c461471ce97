"""The callback for the Hugging Face Trainer decides what a loop of one's own decides, and survives interruptions."""

import copy
import json
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import upop
from upop.callback import PLAIN, TENSORS, SearchCallback
from upop.drive import Drive

STEPS, BATCH = 8, 4
HALF = upop.Target(params=0.5)
# The installed versions warn about each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def samples(count=STEPS * BATCH):
    source = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=source), "labels": i % 5} for i in range(count)]


class Stream(IterableDataset):
    """In the order of `samples`, again and again."""

    def __iter__(self):
        while True:
            yield from samples()


@pytest.fixture
def model(make_model):
    return make_model("vit", image=16, patch=8, width=32, labels=5)


@pytest.fixture
def trainer(tmp_path):
    def make(model, *callbacks, data=None, compute_metrics=None, lr=0.05, **arguments):
        steps = arguments.pop("max_steps", STEPS)
        settings = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": BATCH,
            "max_steps": steps,
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "learning_rate": lr,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
        }
        return Trainer(
            model,
            TrainingArguments(**{**settings, **arguments}),
            train_dataset=data or Stream(),
            eval_dataset=samples(8),
            compute_metrics=compute_metrics,
            callbacks=list(callbacks),
        )

    return make


def batches(steps=STEPS):
    data = samples()
    for step in range(steps):
        part = [data[(step * BATCH + i) % len(data)] for i in range(BATCH)]
        yield torch.stack([s["pixel_values"] for s in part]), torch.tensor([s["labels"] for s in part])


def own_loop(model, *, lr=0.05, lr_mask=2 / STEPS, clip=None, **options):
    """The README's loop, with trained masks in the optimizer and the penalty in the loss."""
    search = upop.Search(model, target=HALF, steps=STEPS, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    masks = search.trained_masks()
    mask_optimizer = torch.optim.AdamW(masks, lr=lr_mask, weight_decay=0) if masks else None
    model.train()
    for images, labels in batches():
        (model(pixel_values=images, labels=labels).loss + search.penalty()).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if mask_optimizer is not None:
            mask_optimizer.step()
            mask_optimizer.zero_grad()
        search.step()
        optimizer.zero_grad()
    return search


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["upop", "unified", "mask", "taylor"])
def test_the_trainer_keeps_what_a_loop_of_ones_own_keeps(method, model, trainer):
    expected = own_loop(copy.deepcopy(model), method=method).state_dict()
    callback = SearchCallback(target=HALF, method=method)
    trainer(model, callback).train()
    found = callback.search.state_dict()
    assert same(found["keep"], expected["keep"])
    for name, mask in expected["masks"].items():
        torch.testing.assert_close(found["masks"][name], mask)
    assert count(callback.slim()) == pytest.approx(count(model) / 2, rel=0.02)


def test_clipped_gradients_of_the_weights_leave_those_of_masks_alone(model, trainer):
    expected = own_loop(copy.deepcopy(model), clip=0.1)
    callback = SearchCallback(target=HALF)
    trainer(model, callback, max_grad_norm=0.1).train()
    assert same(callback.search.keep(), expected.keep())


def test_two_micro_batches_decide_as_one_batch(model, trainer):
    model.double()
    data = [{**s, "pixel_values": s["pixel_values"].double()} for s in samples(64)]
    keeps = []
    for micro, accumulate in ((4, 1), (2, 2)):
        callback = SearchCallback(target=HALF)
        arguments = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulate}
        trainer(copy.deepcopy(model), callback, data=data, **arguments).train()
        assert callback.search.steps_done == STEPS
        keeps.append(callback.search.keep())
    assert same(*keeps)


def test_the_slimmed_model_of_a_bf16_training_computes_like_the_masked_one_in_float32(model, trainer, images):
    callback = SearchCallback(target=HALF)
    trainer(model, callback, bf16=True).train()
    small = callback.slim()
    assert "forward" not in vars(small)
    assert not hasattr(small, "_is_accelerate_prepared")
    with torch.no_grad():
        x = images(2)[:, :, :16, :16]
        logits = type(callback.search.model).forward(callback.search.model.eval(), pixel_values=x).logits
        torch.testing.assert_close(small(pixel_values=x).logits, logits)
        assert small(pixel_values=x).logits.dtype == torch.float32


def test_a_slimmed_model_is_pruned_again(model, trainer):
    for _ in range(2):
        callback = SearchCallback(target=upop.Target(params=0.1))
        trainer(model, callback).train()
        before, model = count(model), callback.slim()
        assert count(model) == pytest.approx(0.9 * before, rel=0.01)


def test_the_ratio_is_in_the_trainers_logs(model, trainer):
    callback = SearchCallback(target=upop.Target(prunable=0.5))
    running = trainer(model, callback)
    running.train()
    ratios = [entry["upop_ratio"] for entry in running.state.log_history if "loss" in entry]
    assert ratios == sorted(ratios)
    assert (len(ratios), ratios[0], ratios[-1]) == (STEPS, 0.0, 0.5)


def test_ratio_and_parameters_left_reach_the_trainers_trackers(model, trainer, tmp_path):
    dense = count(model)
    callback = SearchCallback(target=HALF)
    running = trainer(model, callback, report_to=["tensorboard"])
    running.train()
    [file] = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent)).Reload()
    told = {name: [e.value for e in events.Scalars(f"train/upop_{name}")] for name in ("ratio", "params")}
    kept = [entry for entry in running.state.log_history if "upop_ratio" in entry]
    assert told["ratio"] == pytest.approx([entry["upop_ratio"] for entry in kept])
    assert told["params"] == [entry["upop_params"] for entry in kept]
    assert told["params"][0] == dense
    assert told["params"][-1] == count(callback.slim())
    assert told["params"] == sorted(told["params"], reverse=True)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("method", ["upop", "unified"])
def test_a_resumed_training_ends_as_an_uninterrupted_one(method, model, trainer, caplog):
    start = copy.deepcopy(model)
    data = samples(16)
    settings = {"data": data, "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch", "lr": 1e-3}
    whole = SearchCallback(target=HALF, method=method)
    expected = trainer(model, whole, lr_scheduler_type="linear", **settings)
    expected.train()
    folder = f"{expected.args.output_dir}/checkpoint-5"
    shutil.rmtree(f"{expected.args.output_dir}/checkpoint-{STEPS}")

    broken = SearchCallback(target=HALF, method=method)
    trainer(copy.deepcopy(start), broken, StopAt(5), lr_scheduler_type="linear", **settings).train()
    with pytest.raises(upop.UpopError, match="5 of 8 steps are done"):
        broken.slim()
    resumed = SearchCallback(target=HALF, method=method)
    again = trainer(start, resumed, lr_scheduler_type="linear", **settings)
    with caplog.at_level(logging.WARNING, logger="upop"):
        again.train(resume_from_checkpoint=folder)
    assert same(resumed.search.keep(), whole.search.keep())
    found, wanted = again.model.state_dict(), expected.model.state_dict()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=f"{name} was not restored")
    assert "the Trainer restored" in caplog.text


def test_a_checkpoint_holds_the_search_without_a_pickle_and_only_the_right_one_is_taken_up(model, trainer, tmp_path):
    start = copy.deepcopy(model)
    settings = {"save_strategy": "steps", "save_steps": 4, "optim": "adamw_torch", "data": samples(16)}
    trainer(model, SearchCallback(target=HALF), **settings).train()
    folder = tmp_path / "out" / "checkpoint-4"
    assert json.loads((folder / PLAIN).read_text())["search"]["steps_done"] == 4

    with pytest.raises(upop.UpopError, match="saved with steps=8, this search has 9"):
        trainer(copy.deepcopy(start), SearchCallback(target=HALF), max_steps=9, **settings).train(str(folder))
    away = tmp_path / "away"
    folder.rename(away)
    message = f"expected {PLAIN} and {TENSORS} in the checkpoint of step 4"
    with pytest.raises(upop.UpopError, match=message):
        trainer(copy.deepcopy(start), SearchCallback(target=HALF), **settings).train(str(away))
    told = SearchCallback(target=HALF, resume_from=away)
    trainer(copy.deepcopy(start), told, **settings).train(str(away))
    assert told.search.done
    # A folder of the same step, from another run.
    shutil.copytree(away, folder)
    other = tmp_path / "other"
    shutil.copytree(away, other)
    nn.init.normal_(start.classifier.weight)
    start.save_pretrained(other)
    with pytest.raises(upop.UpopError, match="is not the checkpoint that the Trainer has resumed from"):
        trainer(start, SearchCallback(target=HALF), **settings).train(str(other))


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_an_open_ended_search_asks_the_trainer_for_its_accuracies(model, trainer):
    callback = SearchCallback(target=None, max_drop=0.3, checks=3)
    trainer(model, callback, compute_metrics=accuracy, eval_on_start=True, max_steps=15).train()
    history = callback.search.growth.history
    assert [entry["step"] for entry in history][:4] == [0, 4, 8, 12]
    assert callback.search.done
    assert 0 < count(callback.slim()) <= count(model)


def test_an_open_ended_search_that_is_told_no_accuracy_says_which_metrics_there_are(model, trainer):
    with pytest.raises(upop.UpopError, match=r"set TrainingArguments\(eval_on_start=True\)"):
        trainer(model, SearchCallback(target=None, max_drop=0.1), max_steps=30).train()
    with pytest.raises(
        upop.UpopError, match=r"expected 'eval_accuracy' among the metrics of the evaluation, got .*loss"
    ):
        trainer(model, SearchCallback(target=None, max_drop=0.1), max_steps=30, eval_on_start=True).train()


class Silent(Trainer):
    """Steps its optimizer without a word to its callbacks."""

    def _inner_training_loop(self, *args, **kwargs):
        handler = self.callback_handler
        handler.on_optimizer_step = lambda args, state, control: control
        return super()._inner_training_loop(*args, **kwargs)


def test_a_trainer_that_does_not_call_its_callbacks_is_found_out_at_once(model, tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=50, use_cpu=True, report_to=[], save_strategy="no")
    silent = Silent(model, arguments, train_dataset=Stream(), callbacks=[SearchCallback(target=HALF)])
    with pytest.raises(upop.UpopError, match="optimizer steps taken: 1, seen by the search: 0"):
        silent.train()


def test_what_cannot_work_is_refused_before_training(model, trainer):
    several = trainer(model, SearchCallback(target=HALF))
    several.args._n_gpu = 2
    with pytest.raises(upop.UpopError, match=r"nn\.DataParallel \(one process, 2 GPUs\)"):
        several.callback_handler.on_train_begin(several.args, several.state, several.control)
    best = trainer(model, SearchCallback(target=HALF))
    best.args.load_best_model_at_end = True
    with pytest.raises(upop.UpopError, match="set it to False"):
        best.train()
    with pytest.raises(upop.UpopError, match="unknown option 'methode'; did you mean 'method'"):
        SearchCallback(target=HALF, methode="upop")
    with pytest.raises(upop.UpopError, match="leave steps out"):
        SearchCallback(target=HALF, steps=3)
    with pytest.raises(upop.UpopError, match=r"no search before Trainer\.train"):
        SearchCallback(target=HALF).slim()


@pytest.mark.parametrize("wrapper", ["lora", "quantised"])
def test_an_adapter_or_a_quantised_layer_is_named(wrapper, model, trainer):
    kind = type("Linear8bitLt" if wrapper == "quantised" else "LoraLinear", (nn.Linear,), {})
    model.vit.layers[1].mlp.fc1 = kind(32, 128)
    with pytest.raises(
        upop.UpopError, match=rf"mlp\.fc1: expected a plain torch\.nn\.Linear, got .*{kind.__name__}; merge"
    ):
        trainer(model, SearchCallback(target=HALF)).train()


def test_a_step_that_overflowed_counts_and_adds_nothing_and_a_loss_scale_is_taken_out(model):
    images, labels = next(batches())
    searches = []
    for scale in (1.0, 1024.0):
        twin = copy.deepcopy(model)
        drive = Drive(upop.Search(twin, target=HALF, steps=3, gradient_order="authors"))
        (twin(pixel_values=images, labels=labels).loss * scale).backward()
        drive.step(scale=scale)
        searches.append(drive.search.state_dict()["scores"])
        (twin(pixel_values=images, labels=labels).loss * float("inf")).backward()
        drive.step(scale=scale, skipped=True)
        assert drive.search.steps_done == 2
        assert same(drive.search.state_dict()["scores"], searches[-1])
    for name, score in searches[0].items():
        torch.testing.assert_close(searches[1][name], score)


def test_the_callback_reads_scale_and_overflow_from_accelerates_optimizer(model):
    """No GradScaler runs on a CPU: the events, with an optimizer that behaves as Accelerate's does under fp16."""
    callback = SearchCallback(target=HALF)
    args = TrainingArguments(use_cpu=True, report_to=[])
    state = SimpleNamespace(global_step=0, max_steps=2, is_hyper_param_search=False)
    optimizer = SimpleNamespace(
        param_groups=[{"lr": 0.1}], scaler=SimpleNamespace(get_scale=lambda: 512.0), step_was_skipped=True
    )
    callback.on_train_begin(args, state, None, model=model)
    images, labels = next(batches())
    (model(pixel_values=images, labels=labels).loss * float("inf")).backward()
    callback.on_pre_optimizer_step(args, state, None, optimizer=optimizer)
    callback.on_optimizer_step(args, state, None, optimizer=optimizer)
    assert callback.search.steps_done == 1
    assert all(not score.any() for score in callback.search.state_dict()["scores"].values())


@pytest.mark.slow
def test_a_compiled_training_keeps_the_same(model, trainer):
    expected = own_loop(copy.deepcopy(model))
    callback = SearchCallback(target=HALF)
    # What is compiled from the graphs is another test's, and takes half a minute.
    trainer(model, callback, torch_compile=True, torch_compile_backend="aot_eager").train()
    assert same(callback.search.keep(), expected.keep())


def test_a_slimmed_models_own_training_goes_on_from_the_model_that_is_loaded_from_its_checkpoint(
    model, trainer, tmp_path
):
    """As docs/own-loop.md says: transformers restores but a part of a ViT's weights, with no search to mend it."""
    callback = SearchCallback(target=HALF)
    trainer(model, callback).train()
    slimmed = callback.slim()
    retrained = copy.deepcopy(slimmed)
    trainer(retrained, max_steps=6, save_strategy="steps", save_steps=3, output_dir=str(tmp_path / "again")).train()
    checkpoint = tmp_path / "again/checkpoint-3"
    resumed = upop.from_pretrained(str(checkpoint)).train()
    trainer(resumed, max_steps=6, output_dir=str(tmp_path / "again")).train(resume_from_checkpoint=str(checkpoint))
    assert count(slimmed) == count(resumed)
    assert same(resumed.state_dict(), retrained.state_dict())
    assert not same(resumed.state_dict(), slimmed.state_dict())
