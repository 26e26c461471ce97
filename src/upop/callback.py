"""A search inside the Hugging Face Trainer: one callback, no subclass of the Trainer.

Translates the Trainer's events for `Drive`, and keeps the search in the Trainer's checkpoints. Must not decide what
is pruned.
"""

import inspect
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from upop.drive import Drive, check_options, rate_of
from upop.errors import ModelError, UpopError, said
from upop.reading import check_file, read_json
from upop.search import Search
from upop.targets import Target

log = logging.getLogger(__name__)

TENSORS, PLAIN = "upop_search.safetensors", "upop_search.json"
# Accelerate's names of set-ups in which every process holds the whole model.
WHOLE_MODEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")


class SearchCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the model of a `transformers.Trainer` while it trains::

        callback = SearchCallback(target=upop.Target(params=0.5))
        Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
        callback.slim().save_pretrained("half")

    The search lasts all of `train()`. The Trainer's own model keeps its size, its weights and the masks: what is to be
    saved is `slim()`, not `trainer.save_model()`. Every checkpoint of the Trainer also holds the search, and
    `train(resume_from_checkpoint=...)` goes on with it. The logged loss is the task's alone, without the penalty;
    `upop_ratio` (gone, of what belongs to prunable units) and `upop_params` (parameters left) are logged with it, to
    all of the Trainer's `report_to`.

    With `max_drop` or `tolerance`, accuracies come from the Trainer's evaluation, which is asked for where one is due:
    `TrainingArguments(eval_on_start=True)`, an `eval_dataset` and `compute_metrics` are needed, and the last `checks`
    steps only settle the ratio.

    Args:
        target: what to remove; None for an open-ended search.
        lr_mask: peak learning rate of masks that are trained (methods `mask` and `unified`); default 2 / steps.
        metric: of the Trainer's evaluation, in [0, 1]; asked for by `max_drop` and `tolerance` only.
        resume_from: the checkpoint given to `train()`, where it is not in the Trainer's `output_dir`.
        options: any other option of `upop.Search`.
    """

    def __init__(
        self,
        *,
        target: Target | None,
        lr_mask: float | None = None,
        metric: str = "eval_accuracy",
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        self._target, self._lr_mask, self._metric, self._options = target, lr_mask, metric, options
        self._resume_from = resume_from
        self._open_ended = options.get("max_drop") is not None or options.get("tolerance") is not None
        self._drive: Drive | None = None
        self._scale = 1.0
        self._seen: list[str] = []

    @property
    def search(self) -> Search:
        """The search of the last `train()`; raises UpopError before the first."""
        return self._driven().search

    def slim(self) -> nn.Module:
        """The smaller model, after `train()`, with the outputs of the masked one; see `upop.Search.slim`."""
        return self._driven().slim()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the search on the Trainer's model; take up that of the checkpoint, where one is resumed."""
        _refuse(args, state)
        _go_first(self)
        model = kwargs["model"]
        if self._drive is not None:
            self._drive.search.detach()
        search = Search(model, target=self._target, steps=self._steps(args, state), **self._options)
        self._drive, self._scale, self._seen = Drive(search, self._lr_mask), 1.0, []
        if state.global_step:
            try:
                folder = self._checkpoint(args, state)
                restore_weights_(model, folder)
                self._drive.load_state_dict(load_state(folder))
            except Exception:
                search.detach()
                raise

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the scale of the gradients: the scaler may change it within the optimizer's step."""
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        self._scale = 1.0 if scaler is None else float(scaler.get_scale())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the search one step further; gradients of all micro-batches are there, none is cleared yet."""
        drive, optimizer = self._driven(), kwargs["optimizer"]
        if drive.search.needs_accuracy and drive.search.steps_done < drive.search.steps:
            raise UpopError(
                f"SearchCallback: expected {self._metric!r} among the metrics of the evaluation, got "
                f"{', '.join(self._seen) or 'none'}; give the Trainer compute_metrics, or SearchCallback its metric="
            )
        skipped = bool(getattr(optimizer, "step_was_skipped", False))
        drive.step(rate=rate_of(optimizer), scale=self._scale, skipped=skipped)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for an evaluation where the search needs an accuracy. Raises UpopError where it has missed a step."""
        self._driven().check(state.global_step)
        if self._driven().search.needs_accuracy:
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand on the accuracy where the search needs one."""
        metrics = kwargs["metrics"]
        self._seen = sorted(metrics)
        if self._drive is not None and self._drive.search.needs_accuracy and self._metric in metrics:
            self._drive.search.observe(float(metrics[self._metric]))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the ratio in force, of what is prunable, and the parameters left to what is logged and kept."""
        if self._drive is not None:
            search = self._drive.search
            entry = {"upop_ratio": round(search.ratio, 6), "upop_params": search.params_left}
            kwargs["logs"].update(entry)
            if state.log_history:
                state.log_history[-1].update(entry)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the search beside the checkpoint that the Trainer has just written."""
        if args.should_save:
            save_state(self._driven().state_dict(), _checkpoint_folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise UpopError where the search was not called at every step."""
        self._driven().end(state.global_step)

    def _driven(self) -> Drive:
        if self._drive is None:
            raise UpopError("SearchCallback: there is no search before Trainer.train(); call it first")
        return self._drive

    def _steps(self, args: TrainingArguments, state: TrainerState) -> int:
        """How long the search lasts: an open-ended one may go back a check per step once its own steps are over."""
        if not self._open_ended:
            return int(state.max_steps)
        checks = int(self._options.get("checks", inspect.signature(Search).parameters["checks"].default))
        if not args.eval_on_start:
            raise UpopError(
                "SearchCallback: max_drop and tolerance need the dense model's accuracy; set "
                "TrainingArguments(eval_on_start=True)"
            )
        if state.max_steps <= checks:
            raise UpopError(
                f"SearchCallback: expected more training steps than checks, got {state.max_steps} and {checks}; train "
                "longer or set fewer checks"
            )
        return int(state.max_steps) - checks

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        """The checkpoint that the Trainer has resumed from; it does not tell its callbacks."""
        guesses = [self._resume_from, args.resume_from_checkpoint, _checkpoint_folder(args, state)]
        folders = [Path(guess) for guess in guesses if isinstance(guess, str | Path) and str(guess)]
        for folder in folders:
            if (folder / PLAIN).is_file() and (folder / TENSORS).is_file():
                return folder
        raise UpopError(
            f"{folders[0]}: expected {PLAIN} and {TENSORS} in the checkpoint of step {state.global_step}, found none; "
            "pass SearchCallback(resume_from=<that checkpoint>), or train() without resuming"
        )


def _refuse(args: TrainingArguments, state: TrainerState) -> None:
    """Raise UpopError for trainings in which masks would not get their gradients, or checkpoints not fit."""
    if args.n_gpu > 1:
        raise UpopError(
            f"SearchCallback: nn.DataParallel (one process, {args.n_gpu} GPUs) copies the model without its masks; "
            "launch one process per GPU with torchrun, or show the process one GPU"
        )
    kind = str(getattr(args.distributed_state, "distributed_type", "NO")).rpartition(".")[2]
    if kind not in WHOLE_MODEL or args.deepspeed or args.fsdp:
        raise UpopError(f"SearchCallback: expected the whole model in every process (DDP), got {kind}; use torchrun")
    if args.load_best_model_at_end:
        raise UpopError(
            "SearchCallback: load_best_model_at_end would bring back weights from the middle of the search; set it to "
            "False"
        )
    if state.is_hyper_param_search:
        raise UpopError("SearchCallback: cannot be used in hyperparameter_search(); call train() for each setting")


def _go_first(callback: TrainerCallback) -> None:
    """Give `callback` its turn before the Trainer's reporters, which send what is in the logs when theirs comes.

    The Trainer puts its own callbacks first and does not tell them of each other: whoever is calling is found on the
    stack. Another Trainer than transformers' keeps its order, and the ratio stays in its log history alone.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            # A new list: the handler is going through the old one.
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return
        frame = frame.f_back


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write nested tensors, numbers and text as one safetensors and one json file; nothing is pickled."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous()
            return {"tensor": path}
        if isinstance(value, dict):
            return {key: plain(item, f"{path}/{key}") for key, item in value.items()}
        return value

    text = json.dumps(plain(state, ""), indent=1)
    save_file(tensors, folder / TENSORS)
    # Last: a checkpoint that has it is complete.
    (folder / PLAIN).write_text(text + "\n", encoding="utf-8")


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` wrote; raises UpopError for files that do not belong together."""
    try:
        check_file(folder / TENSORS)
        tensors = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise UpopError(f"{folder / TENSORS}: damaged ({said(error)}); resume from another checkpoint") from error

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["tensor"]] if set(value) == {"tensor"} else {k: whole(v) for k, v in value.items()}
        return value

    try:
        state: dict[str, Any] = whole(read_json(folder / PLAIN, finite=False))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UpopError(f"{folder / PLAIN}: damaged ({said(error)}); resume from another checkpoint") from error
    return state


def restore_weights_(model: nn.Module, folder: Path) -> None:
    """Give `model` all the weights of the checkpoint that the Trainer has resumed from.

    The Trainer copies what has the same name in the file, and since transformers 5.9 the blocks of a ViT are saved
    under other names: they silently keep their old weights (huggingface/transformers#43701).
    Raises ModelError where `folder` is not that checkpoint, or lacks weights.
    """
    held = model.state_dict()
    saved: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        check_file(file)
        saved |= load_file(file)
    if not saved or _different(held, {name: value for name, value in saved.items() if name in held}):
        raise ModelError(
            f"{folder}: is not the checkpoint that the Trainer has resumed from, for its weights differ; pass "
            "SearchCallback(resume_from=<that checkpoint>)"
        )
    if held.keys() <= saved.keys():
        return  # saved under the model's own names: a library's other than transformers, or a Trainer that is mended
    kind: Any = type(model)
    read, info = kind.from_pretrained(folder, output_loading_info=True)
    if missing := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ModelError(f"{folder}: {len(missing)} weights do not fit {kind.__name__}, such as {missing[0]}")
    weights = read.state_dict()
    if lost := _different(held, weights):
        model.load_state_dict(weights)
        log.warning(
            "%s: the Trainer restored %d of %d weights; the others, such as %s, are restored now",
            folder,
            len(weights) - len(lost),
            len(weights),
            lost[0],
        )


def _different(held: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name, value in wanted.items() if not torch.equal(held[name].cpu(), value.to(held[name].dtype))]
