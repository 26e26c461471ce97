"""Testing: prove that a family describes a model rightly. For tests of descriptions; raises, and prints nothing.

Must not know model families: what is promised holds for any model that `find_structures` accepts.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from upop.costs import params_cost
from upop.errors import UpopError
from upop.families import find_structures
from upop.kinds import kinds_of
from upop.masks import Masks
from upop.slim import slim
from upop.structures import Structure, kept_widths, linear, removed_cost, widths

# Dtype -> largest difference, relative to the largest output (or to 1), between what is equal in exact arithmetic.
# float64 is as coarse as it is because some libraries compute the softmax in float32 whatever the model's dtype.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Fractions of units that stay; 0 = only the floors.
SHARES = (0.6, 0.25, 0.9, 0.0)

Forward = Callable[[nn.Module, Tensor], object]


def check_family(
    model: nn.Module,
    *,
    kinds: Sequence[str] | None = None,
    images: Tensor | None = None,
    forward: Forward | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> None:
    """Prove that `model`'s structures are described rightly; raise UpopError with the first broken promise.

    The promises: structures are found, and say the same of the slimmed model; masks of ones change nothing, bit for
    bit, and taken off leave no trace; masked and slimmed outputs are equal at several random keeps; what slimming
    removes is what the costs add up to; gradients reach every mask and every Linear of the slimmed model; the model
    that is slimmed stays as it is.

    The model is copied, and the copy's parameters are made random, at a size that matters: freshly made models start
    biases at 0, attention near uniform and layer scales at 1e-5, where a wrong description cannot be seen. Make the
    model small: two layers, a few heads (each at least 2 wide); a dozen forward passes are run, on its own device.

    Args:
        model: any model that upop.families.find_structures accepts, in its own dtype.
        kinds: of units, see upop.kinds, such as `("dims", "mlp", "block")`; None = what the family describes.
        images: float [B, C, H, W], what `model` takes; random ones, B = 2, of the size that the model's config
            (Hugging Face) or patch embedding (timm) states where None.
        forward: `forward(model, images)`; `model(images)` where None. All float tensors in what it returns, nested
            in tuples, lists and mappings, are compared.
        tolerance: largest difference between masked and slimmed outputs, relative to the largest output or to 1,
            whichever is larger; by dtype (float32: 1e-5, bfloat16: 5e-2) where None.
        seed: of images, parameters and keeps.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    probe = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    _randomise_(probe, generator)
    structures = find_structures(probe, kinds)
    if not structures:
        raise UpopError(f"{type(model).__name__}: expected structures to prune, found none; check the family's blocks")
    if images is None:
        images = torch.randn(2, *_image_shape(model), generator=generator)
    check = _Check(
        probe,
        structures,
        images.to(next(probe.parameters()).device, dtype),
        forward or (lambda m, x: m(x)),
        TOLERANCES[dtype] if tolerance is None else tolerance,
    )
    before = _snapshot(probe)
    check.identity_and_gradients()
    for share in SHARES:
        check.keep(_random_keep(structures, share, generator))
    check.untouched(before)


@dataclass(frozen=True)
class _Check:
    """One model under test: `model` is a randomised copy in eval mode."""

    model: nn.Module
    structures: tuple[Structure, ...]
    images: Tensor
    forward: Forward
    tolerance: float

    def identity_and_gradients(self) -> None:
        """Masks of ones are the identity, collect gradients, and leave no trace."""
        expected = self._outputs(self.model)
        masks = Masks(self.model, self.structures)
        try:
            if not _equal(self._outputs(self.model), expected):
                raise UpopError(f"{self._name}: with masks of ones: expected the very same outputs, got others")
            self._backward(self.model)
            for name, mask in masks.values.items():
                if mask.grad is None or not mask.grad.isfinite().all() or not mask.grad.any():
                    raise UpopError(
                        f"{name}: expected a finite gradient at its mask, got "
                        f"{'none' if mask.grad is None else 'zeros or non-finite values'}; do the outputs depend on "
                        "its producers, and are these called (not read) in the forward?"
                    )
        finally:
            masks.detach()
            self.model.zero_grad(set_to_none=True)
        if not _equal(self._outputs(self.model), expected):
            raise UpopError(f"{self._name}: after masks are detached: expected the very same outputs, got others")

    def keep(self, keep: dict[str, Tensor]) -> None:
        """Slimmed by `keep`: as many parameters less as costs say, the masked outputs, and trainable."""
        small = slim(self.model, keep)
        cost = params_cost(self.model, self.structures)
        # What a structure says of its own units holds where they share no weights with others'.
        expected = removed_cost(self.structures, keep) if cost.additive else cost.removed(keep)
        removed = _size(self.model) - _size(small)
        if removed != expected:
            raise UpopError(
                f"{self._name}: expected slimming to remove {expected:.0f} parameters by cost, got {removed}"
            )
        found, kept = find_structures(small, kinds_of(keep)), kept_widths(self.structures, keep)
        left = {kind: [width for width in each if width] for kind, each in kept.items()}
        if widths(found) != left:
            raise UpopError(
                f"{self._name}: expected the slimmed model's structures to have widths {left}, got {widths(found)}"
            )
        if self._difference(keep, small) > self.tolerance:
            self._blame(keep, small)
        self._backward(small)
        for port in (port for s in found for port in (*s.producers, *s.consumers)):
            weight = linear(small, port.path).weight
            if weight.requires_grad and (weight.grad is None or not weight.grad.isfinite().all()):
                raise UpopError(f"{port.path}: slimmed: expected a finite gradient, got {weight.grad}")

    def untouched(self, before: dict[str, object]) -> None:
        """The model that was masked and slimmed is as it was."""
        after = _snapshot(self.model)
        for name in sorted(set(before) | set(after)):
            was, now = before.get(name), after.get(name)
            same = torch.equal(was, now) if isinstance(was, Tensor) and isinstance(now, Tensor) else was == now
            if not same:
                raise UpopError(f"{name}: expected slimming and masking to leave the model as it is, this changed")

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _difference(self, keep: dict[str, Tensor], small: nn.Module) -> float:
        """Largest difference between masked and slimmed outputs; NaN counts as infinite."""
        masks = Masks(self.model, self.structures)
        masks.set_({name: stays.float() for name, stays in keep.items()})
        try:
            masked = self._outputs(self.model)
        finally:
            masks.detach()
        slimmed = self._outputs(small)
        if [m.shape for m in masked] != [s.shape for s in slimmed]:
            return float("inf")
        worst = 0.0
        for m, s in zip(masked, slimmed, strict=True):
            difference = float((m.double() - s.double()).abs().max() / m.double().abs().max().clamp(min=1))
            worst = max(worst, difference if difference == difference else float("inf"))
        return worst

    def _blame(self, keep: dict[str, Tensor], small: nn.Module) -> None:
        """Raise, naming the structure that alone makes the difference, where one does."""
        difference, where = self._difference(keep, small), "all structures together"
        for s in self.structures:
            alone = {t.name: torch.ones(t.units, dtype=torch.bool) for t in self.structures} | {s.name: keep[s.name]}
            found = self._difference(alone, slim(self.model, alone))
            if found > self.tolerance:
                difference, where = found, s.name
                break
        raise UpopError(
            f"{where}: expected masked and slimmed outputs to agree to {self.tolerance:g}, got a difference of "
            f"{difference:.2g}; are its rows laid out so, is the softmax scale still the original's?"
        )

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> list[Tensor]:
        return list(_tensors(self.forward(model, self.images)))

    def _backward(self, model: nn.Module) -> None:
        with torch.enable_grad():
            outputs = [t for t in _tensors(self.forward(model, self.images)) if t.requires_grad]
            if not outputs:
                raise UpopError(f"{self._name}: expected outputs that gradients can flow from, got none")
            # Plain sums would not do: that over a final layer norm is constant.
            loss = torch.stack([t.float().square().mean() + t.float().sin().mean() for t in outputs]).sum()
            loss.backward()  # type: ignore[no-untyped-call]


def _tensors(output: object) -> Iterator[Tensor]:
    """The float tensors in a model's output, however nested."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, Sequence) and not isinstance(output, str):
        for value in output:
            yield from _tensors(value)


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _random_keep(structures: Sequence[Structure], share: float, generator: torch.Generator) -> dict[str, Tensor]:
    """About `share` of each structure's units, one count a structure; never fewer than the floor."""
    keep: dict[str, Tensor] = {}
    mixed = {"attn", "dims"} & {s.kind for s in structures}
    for layer, s in enumerate(structures):
        # Uneven over layers, so that sizes that are mixed up do not fit.
        stays = min(s.width, max(s.floor, round(share * s.width) - layer % 3))
        queries = keep.get(f"qk.{s.layer}") if s.kind == "v" and mixed else None
        if queries is not None and int(queries.sum()) == s.lanes * stays:
            # As wide as its queries, the layer would be whole again, of another kind than its units.
            stays += 1 if stays < s.width else -1
        lanes = [torch.randperm(s.width, generator=generator) < stays for _ in range(s.lanes)]
        # The first block stays.
        keep[s.name] = torch.tensor([s.layer == 0 or share > 0.5]) if s.drops else torch.cat(lanes)
    return keep


def _snapshot(model: nn.Module) -> dict[str, object]:
    """Parameters and buffers, copied, and what else the modules hold that is plain data or could be a patch."""
    found: dict[str, object] = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for path, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        found |= {f"{path}.{name}": value for name, value in plain.items()}
        found[f"{path} (its attributes)"] = sorted(vars(module))
    return found


@torch.no_grad()
def _randomise_(model: nn.Module, generator: torch.Generator) -> None:
    """Random float parameters: matrices that keep their input's size, norms near 1, all else of size 1/2."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim > 1 and name.endswith("weight"):
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(0.5 * noise)


def _image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that the model states, in its Hugging Face config or its timm patch embedding."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    channels = getattr(config, "num_channels", None)
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise UpopError(f"{type(model).__name__}: images: expected a tensor, got None, and the model states no size")
    return (channels if isinstance(channels, int) else 3, int(size[0]), int(size[1]))
