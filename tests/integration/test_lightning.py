"""The Lightning callback; and the three loops (Trainer, Lightning, plain or Accelerate) decide the same."""

import copy
import csv
import logging

import pytest
import torch
from family_models import make_stand_in
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import upop

pytest.importorskip("lightning.pytorch")
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

from upop.lightning import SearchCallback

STEPS, BATCH, LR = 6, 4, 0.05
HALF = upop.Target(params=0.5)
# Lightning warns of its own small workers, logs and loggers.
pytestmark = pytest.mark.filterwarnings("ignore")


def samples(count=STEPS * BATCH):
    source = torch.Generator().manual_seed(3)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=source), "labels": i % 5} for i in range(count)]


class Stream(IterableDataset):
    """In the order of `samples`, again and again."""

    def __iter__(self):
        while True:
            yield from samples()


class Module(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=LR)


@pytest.fixture
def model(make_model):
    return make_model("vit", image=16, patch=8, width=32, labels=5)


@pytest.fixture
def fit(tmp_path):
    def run(model, callback, *, module=Module, ckpt_path=None, **options):
        settings = {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        trainer = Trainer(callbacks=[callback], **{**settings, **options})
        trainer.fit(module(model), DataLoader(Stream(), batch_size=BATCH), ckpt_path=ckpt_path)
        return trainer

    return run


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def plain(model, method, tmp_path):
    search = upop.Search(model, target=HALF, steps=STEPS, method=method)
    groups = [{"params": model.parameters()}]
    optimizers = [torch.optim.SGD(groups, lr=LR)]
    if search.trains_masks:
        optimizers.append(torch.optim.AdamW(search.trained_masks(), lr=2 / STEPS, weight_decay=0))
    model.train()
    for _, batch in zip(range(STEPS), DataLoader(Stream(), batch_size=BATCH), strict=False):
        (model(**batch).loss + search.penalty()).backward()
        for optimizer in optimizers:
            optimizer.step()
        search.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return search


def accelerated(model, method, tmp_path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR)]
    search = upop.Search(model, target=HALF, steps=STEPS, method=method)
    if search.trains_masks:
        optimizers.append(torch.optim.AdamW(search.trained_masks(), lr=2 / STEPS, weight_decay=0))
    model, loader, *optimizers = accelerator.prepare(model, DataLoader(Stream(), batch_size=BATCH), *optimizers)
    model.train()
    for _, batch in zip(range(STEPS), loader, strict=False):
        accelerator.backward(model(**batch).loss + search.penalty())
        for optimizer in optimizers:
            optimizer.step()
        search.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    return search


def hugging_face(model, method, tmp_path):
    from transformers import Trainer, TrainingArguments

    from upop.callback import SearchCallback

    callback = SearchCallback(target=HALF, method=method)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Stream(), callbacks=[callback]).train()
    return callback.search


@pytest.mark.parametrize("method", ["upop", "unified"])
def test_all_loops_keep_the_same_units(method, model, fit, tmp_path):
    callback = SearchCallback(target=HALF, method=method)
    fit(copy.deepcopy(model), callback)
    expected = callback.search.keep()
    assert not all(bool(keep.all()) for keep in expected.values())
    for loop in (plain, accelerated, hugging_face):
        assert same(loop(copy.deepcopy(model), method, tmp_path).keep(), expected), loop.__name__


@pytest.mark.parametrize(
    "options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}]
)
def test_precision_accumulation_and_clipping_end_in_a_model_of_half_the_size(options, model, fit):
    callback = SearchCallback(target=HALF)
    trainer = fit(model, callback, **options)
    assert (callback.search.steps_done, trainer.global_step) == (STEPS, STEPS)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (callback.slim(), model)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.02)
    assert float(trainer.callback_metrics["upop_ratio"]) == pytest.approx(callback.search.ratio)


def test_ratio_and_parameters_left_reach_lightnings_loggers(model, fit, tmp_path):
    callback = SearchCallback(target=HALF)
    fit(model, callback, logger=CSVLogger(tmp_path), log_every_n_steps=2)
    [file] = tmp_path.rglob("metrics.csv")
    rows = list(csv.DictReader(file.open()))
    assert len(rows) == STEPS // 2
    assert float(rows[-1]["upop_ratio"]) == pytest.approx(callback.search.ratio)
    assert float(rows[-1]["upop_params"]) == sum(p.numel() for p in callback.slim().parameters())
    assert float(rows[0]["upop_params"]) > float(rows[-1]["upop_params"])


@pytest.mark.parametrize("start", [2.0**14, 2.0**120])
def test_float16_decides_as_if_there_were_no_scale_and_overflows_add_nothing(start, model, fit):
    """With the scale so large, the first steps overflow, are skipped and count."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=1000, backoff_factor=2.0**-60)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    callback = SearchCallback(target=HALF)
    trainer = fit(model, callback, plugins=[plugin])
    assert (callback.search.steps_done, trainer.global_step) == (STEPS, STEPS)
    assert (scaler.get_scale() < start) == (start > 2.0**100)
    scores = callback.search.state_dict()["scores"]
    assert all(score.isfinite().all() for score in scores.values())
    assert any(score.any() for score in scores.values())
    assert sum(p.numel() for p in callback.slim().parameters()) < 0.52 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("method", ["upop", "unified"])
def test_a_resumed_fit_ends_as_an_uninterrupted_one(method, model, fit, tmp_path):
    start = copy.deepcopy(model)

    class StopAt(SearchCallback):
        """Saves and stops after three steps."""

        state_key = "upop.lightning.SearchCallback"

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")
                trainer.should_stop = True

    class FromThird(Stream):
        def __iter__(self):
            data = samples()
            yield from data[3 * BATCH :]
            yield from data

    whole = SearchCallback(target=HALF, method=method)
    fit(copy.deepcopy(start), whole)
    fit(copy.deepcopy(start), StopAt(target=HALF, method=method), min_steps=0)
    torch.load(tmp_path / "three.ckpt", weights_only=True)
    resumed = SearchCallback(target=HALF, method=method)
    type(resumed).state_key = "upop.lightning.SearchCallback"
    module = Module(start)
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[resumed],
    )  # fmt: skip
    trainer.fit(module, DataLoader(FromThird(), batch_size=BATCH), ckpt_path=tmp_path / "three.ckpt")
    assert same(resumed.search.keep(), whole.search.keep())
    weights = resumed.search.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.search.model.state_dict().items())


def test_a_step_without_a_loss_counts_and_adds_nothing(model, fit):
    class Skips(Module):
        def training_step(self, batch, index):
            return None if index == 2 else super().training_step(batch, index)

    callback = SearchCallback(target=HALF)
    trainer = fit(model, callback, module=Skips)
    assert (trainer.global_step, callback.search.steps_done) == (STEPS, STEPS)
    assert sum(p.numel() for p in callback.slim().parameters()) < 0.52 * sum(p.numel() for p in model.parameters())


def test_an_optimizer_that_asks_for_gradients_several_times_a_step_takes_the_search_one_step_further(model, fit):
    seen = []

    class Newton(Module):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.01, max_iter=3)

        def on_train_batch_end(self, outputs, batch, index):
            seen.append((self.trainer.global_step, callback.search.steps_done))

    callback = SearchCallback(target=HALF)
    fit(model, callback, module=Newton)
    assert seen == [(step, step) for step in range(1, STEPS + 1)]


def test_a_model_that_is_not_the_one_in_use_is_found_out_all_the_same(model, fit):
    class Other(Module):
        def __init__(self, model):
            super().__init__(model)
            self.used = torch.nn.Linear(3 * 16 * 16, 5)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.used(batch["pixel_values"].flatten(1)), batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    with pytest.raises(upop.UpopError, match="no gradient has reached the masks"):
        fit(model, SearchCallback(target=HALF, attribute="model"), module=Other)


def test_a_search_that_was_never_taken_up_does_not_enter_the_next_training(model, fit):
    callback = SearchCallback(target=HALF)
    fit(copy.deepcopy(model), callback)
    callback.load_state_dict(callback.state_dict())  # as of a fit(ckpt_path=...) that then failed
    fit(model, callback, max_steps=4)
    assert callback.search.steps == callback.search.steps_done == 4


def test_a_second_fit_of_the_same_trainer_is_refused_and_leaves_the_masks_of_the_first_on(model, fit):
    callback = SearchCallback(target=HALF)
    trainer = fit(model, callback)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    image = samples()[0]["pixel_values"][None]
    expected = model.eval()(image).logits
    with pytest.raises(upop.UpopError, match=f"goes on at step {STEPS} without; make a new Trainer"):
        trainer.fit(Module(model), DataLoader(Stream(), batch_size=BATCH))
    assert torch.equal(model.eval()(image).logits, expected)


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=STEPS + 1)


def cyclic(optimizer):
    return torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=LR / 10, max_lr=LR, step_size_up=2)


@pytest.mark.parametrize("schedule", [one_cycle, cyclic])
def test_masks_are_trained_at_no_more_than_their_peak_rate(model, fit, schedule):
    class Scheduled(Module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]

    rates = []

    class Watching(SearchCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            rates.append(self._driven()._optimizer.param_groups[0]["lr"])

    fit(model, Watching(target=HALF, method="unified", lr_mask=0.01), module=Scheduled)
    assert max(rates) == pytest.approx(0.01, rel=0.03)
    assert min(rates) < 0.01 or schedule is cyclic


def test_what_cannot_work_is_refused_before_training(model, fit):
    with pytest.raises(upop.UpopError, match="cannot be had under Lightning"):
        SearchCallback(target=None, max_drop=0.1)
    with pytest.raises(upop.UpopError, match="unknown option 'intervall'; did you mean 'interval'"):
        SearchCallback(target=HALF, intervall=2)
    with pytest.raises(upop.UpopError, match=r"no search before Trainer\.fit"):
        SearchCallback(target=HALF).slim()
    with pytest.raises(upop.UpopError, match="the length of the training is unknown"):
        fit(model, SearchCallback(target=HALF), max_steps=-1, max_epochs=-1)

    class Two(Module):
        def __init__(self, model):
            super().__init__(model)
            self.teacher = copy.deepcopy(model)

    with pytest.raises(upop.UpopError, match=r"expected one model that can be pruned, found model, teacher"):
        fit(model, SearchCallback(target=HALF), module=Two)
    with pytest.raises(upop.UpopError, match=r"attribute='modle'"):
        fit(model, SearchCallback(target=HALF, attribute="modle"), module=Two)
    told = SearchCallback(target=HALF, attribute="model")
    fit(model, told, module=Two)
    assert told.search.model is model
    model.vit.layers[0].mlp.fc1 = type("LoraLinear", (nn.Linear,), {})(32, 128)
    with pytest.raises(upop.UpopError, match=r"expected a plain torch\.nn\.Linear, got .*LoraLinear"):
        fit(model, SearchCallback(target=HALF))


def test_a_module_around_a_model_of_timms_blocks_is_not_the_model():
    from upop.lightning import _find_model

    module = Module(make_stand_in())
    assert _find_model(module, None) is module.model
