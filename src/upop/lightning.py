"""A search inside a Lightning Trainer: one callback. Needs `pip install upop[lightning]`.

Translates Lightning's events for `Drive`, whose state travels in Lightning's checkpoints. Must not decide what is
pruned.
"""

from typing import Any

from torch import nn

from upop.drive import Drive, check_options, rate_of
from upop.errors import ModelError, UpopError
from upop.families import FAMILIES
from upop.search import Search
from upop.targets import Target

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
except ModuleNotFoundError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "upop.lightning: expected Lightning, found none; pip install 'upop[lightning]'", name="lightning"
        ) from error


class SearchCallback(Callback):  # type: ignore[misc]
    """Prunes the model inside a LightningModule while `Trainer.fit` trains it::

        callback = SearchCallback(target=upop.Target(params=0.5))
        Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
        callback.slim().save_pretrained("half")

    The search lasts all of `fit`. The module's own model keeps its size, its weights and the masks: what is to be
    saved is `slim()`. Lightning's checkpoints hold the search, and `fit(ckpt_path=...)` goes on with it. The logged
    loss is the task's alone; `upop_ratio`, in force, and `upop_params`, left, go to Lightning's loggers.

    Args:
        target: what to remove; None with a `threshold`. `max_drop` and `tolerance` are refused: Lightning cannot be
            asked for a validation between two steps.
        attribute: of the LightningModule that holds the model; needed only where several models fit.
        lr_mask: peak learning rate of masks that are trained (methods `mask` and `unified`); default 2 / steps.
        options: any other option of `upop.Search`.
    """

    def __init__(
        self,
        *,
        target: Target | None,
        attribute: str | None = None,
        lr_mask: float | None = None,
        **options: Any,
    ) -> None:
        check_options(options)
        if options.get("max_drop") is not None or options.get("tolerance") is not None:
            raise UpopError(
                "SearchCallback: max_drop and tolerance cannot be had under Lightning, which cannot be asked for a "
                "validation between two steps; use a loop of your own, the Hugging Face Trainer or upop prune"
            )
        self._target, self._attribute, self._lr_mask, self._options = target, attribute, lr_mask, options
        self._drive: Drive | None = None
        self._pending: dict[str, Any] | None = None

    @property
    def search(self) -> Search:
        """The search of the last `fit`; raises UpopError before the first."""
        return self._driven().search

    def slim(self) -> nn.Module:
        """The smaller model, after `fit`, with the outputs of the masked one; see `upop.Search.slim`."""
        return self._driven().slim()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the search; take up that of the checkpoint, where one is resumed."""
        _refuse(trainer)
        if not trainer.global_step:  # left by a fit that ended before it began
            self._pending = None
        if trainer.global_step and self._pending is None:
            raise UpopError(
                f"SearchCallback: expected a training that begins, or a checkpoint that holds a search, got one that "
                f"goes on at step {trainer.global_step} without; make a new Trainer, and leave out ckpt_path"
            )
        if self._drive is not None:
            self._drive.search.detach()
        model = _find_model(pl_module, self._attribute)
        steps = int(trainer.estimated_stepping_batches)
        search = Search(model, target=self._target, steps=steps, **self._options)
        self._drive = Drive(search, self._lr_mask)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                self._drive.load_state_dict(pending)
            except UpopError:
                search.detach()
                raise

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take the search one step further: gradients of all micro-batches are there, and none is clipped yet."""
        drive = self._driven()
        if drive.search.steps_done > trainer.global_step:
            drive.search.clear()  # LBFGS asks for gradients several times a step
            return
        if all(p.grad is None for group in optimizer.param_groups for p in group["params"]) and drive.saw_nothing:
            drive.search.skip()  # training_step() returned None, as Lightning lets it: there was no backward
            return
        # The plugin has taken the scale out of the optimizer's gradients; it does not know those of masks.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        drive.step(
            rate=rate_of(optimizer),
            scale=1.0 if scaler is None else float(scaler.get_scale()),
            skipped=False if scaler is None else None,
        )
        pl_module.log("upop_ratio", drive.search.ratio)
        # Counting waits for the device: as often as the loggers are told.
        if (trainer.global_step + 1) % max(1, trainer.log_every_n_steps) == 0:
            pl_module.log("upop_params", float(drive.search.params_left))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise UpopError where the search was not called at every step."""
        self._driven().end(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The search, for Lightning's checkpoints."""
        return {} if self._drive is None else self._drive.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the model is there: Lightning restores callbacks before `on_train_start`."""
        self._pending = state_dict or None

    def _driven(self) -> Drive:
        if self._drive is None:
            raise UpopError("SearchCallback: there is no search before Trainer.fit(); call it first")
        return self._drive


def _refuse(trainer: Trainer) -> None:
    """Raise UpopError for trainings in which masks would not get their gradients."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise UpopError(
            f"SearchCallback: expected the whole model in every process (one device or DDP), got "
            f"{type(trainer.strategy).__name__}; set strategy='ddp'"
        )
    if len(trainer.optimizers) != 1:
        raise UpopError(f"SearchCallback: expected one optimizer, got {len(trainer.optimizers)}")
    if trainer.estimated_stepping_batches in (float("inf"), -1):
        raise UpopError("SearchCallback: the length of the training is unknown; set max_steps or max_epochs")


def _find_model(module: LightningModule, attribute: str | None) -> nn.Module:
    """The one model in `module` that can be pruned, or the one at `attribute`."""
    if attribute is not None:
        try:
            found: nn.Module = module.get_submodule(attribute)
        except AttributeError as error:
            raise ModelError(f"SearchCallback: attribute={attribute!r}: {error}") from None
        return found
    fitting: dict[str, nn.Module] = {}
    for name, inner in module.named_modules():
        # A classifier holds a backbone that could be pruned alone: the outermost is meant.
        inside = any(name.startswith(f"{other}.") for other in fitting)
        # The module itself is no model, though it may hold all that one consists of.
        if name and not inside and any(family.matches(inner) for family in FAMILIES):
            fitting[name] = inner
    if len(fitting) != 1:
        raise ModelError(
            f"{type(module).__name__}: expected one model that can be pruned, found "
            f"{', '.join(fitting) or 'none'}; pass SearchCallback(attribute=...)"
        )
    [found] = fitting.values()
    return found
