"""Tiny random models and slow references for all tests. Nothing is downloaded."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

CLASS_NAMES = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassification",
    "teacher": "DeiTForImageClassificationWithTeacher",
}


def pytest_configure() -> None:
    # Before any test module imports transformers: a test that reaches for the network fails at once.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _libraries_are_no_garbage() -> None:
    """Every stage of a run has its garbage collected: a third of a second each, for a million objects of libraries."""
    import upop.run  # noqa: F401  which brings nearly all of them

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_precision_is_left_behind() -> None:
    """Accelerate's state is the process's: whoever makes the first one decides precision and device for all others."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_family_is_left_behind() -> Iterator[None]:
    """A family that a test registers is the process's too."""
    from upop.families import FAMILIES

    before = list(FAMILIES)
    yield
    FAMILIES[:] = before


@pytest.fixture(scope="module")
def only_results() -> Iterator[None]:
    """Runs without what most tests of them never look at: pictures are empty files, latency is that of one image."""
    from upop import measure, stages

    with pytest.MonkeyPatch.context() as patch:
        for name in stages.PICTURES:
            patch.setitem(stages.PICTURES, name, lambda result, path: path.touch())
        patch.setattr(measure, "LATENCY_BATCHES", (1,))
        yield


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """Factory of seeded models of the three Hugging Face classes, in eval mode: `vit`, `deit`, `teacher`.

    Every parameter is random at a size that matters: Hugging Face starts biases at 0 and attention near
    uniform, which would hide a lost bias or a wrong softmax scale.
    """
    import transformers

    def make(
        name: str = "vit",
        *,
        width: int = 64,
        heads: int = 2,
        layers: int = 2,
        labels: int = 10,
        image: int = 32,
        patch: int = 8,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        **config: Any,
    ) -> nn.Module:
        config = {"intermediate_size": 4 * width, "num_labels": labels, **config}
        config_class = transformers.ViTConfig if name == "vit" else transformers.DeiTConfig
        model: nn.Module = getattr(transformers, CLASS_NAMES[name])(
            config_class(
                hidden_size=width,
                num_attention_heads=heads,
                num_hidden_layers=layers,
                image_size=image,
                patch_size=patch,
                attn_implementation=attention,
                **config,
            )
        )
        if not any(p.is_meta for p in model.parameters()):
            _randomise_(model, seed)
        return model.to(dtype).eval()

    return make


@torch.no_grad()
def _randomise_(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, nn.LayerNorm):
                parameter.copy_(0.2 * noise + (name == "weight"))
            elif name == "weight":
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.5 * noise)


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Factory of seeded images [B, 3, size, size], standard normal."""

    def make(count: int = 4, *, seed: int = 0, dtype: torch.dtype = torch.float32, size: int = 32) -> Tensor:
        return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[nn.Module, Tensor], Tensor]:
    """`logits_of(model, images)`: logits without gradients."""

    @torch.no_grad()
    def logits(model: nn.Module, images: Tensor) -> Tensor:
        result: Tensor = model(images).logits
        return result

    return logits


@pytest.fixture(scope="session")
def random_keep() -> Callable[..., dict[str, Tensor]]:
    """Factory of seeded keeps for structures: about 60 % stay, an odd number in every `attn` structure."""

    def make(structures: Sequence[Any], *, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for s in structures:
            stays = int(s.units * 0.6)
            stays += (stays % 2 == 0) if s.kind == "attn" else 0
            keep[s.name] = torch.randperm(s.units, generator=generator) < stays
        return keep

    return make


@pytest.fixture(scope="session")
def random_lanes() -> Callable[..., dict[str, Tensor]]:
    """Factory of seeded keeps for structures of any kind: widths differ from layer to layer, one block goes."""

    def make(structures: Sequence[Any], *, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        keep = {}
        for n, s in enumerate(structures):
            stays = max(1, s.width * (5 + n % 3) // 9)
            lanes = [torch.randperm(s.width, generator=generator) < stays for _ in range(s.lanes)]
            keep[s.name] = torch.tensor([s.layer != 1]) if s.drops else torch.cat(lanes)
        return keep

    return make


@pytest.fixture(scope="session")
def slow_select() -> Callable[..., dict[str, list[bool]]]:
    """Algorithm 1's choice as an obvious loop over units: the reference for `ranking.select`."""

    def select(structures: Sequence[Any], scores: Any, budget: float) -> dict[str, list[bool]]:
        units = []
        for position, s in enumerate(structures):
            values = [float(x) for x in scores[s.name]]
            # Who falls last: the lowest score, and of equal ones the later.
            falls_last = sorted(range(s.units), key=lambda u: (values[u], -u))
            protected = set(falls_last[: s.floor])
            units += [(-values[u], position, u, s) for u in range(s.units) if u not in protected]
        keep = {s.name: [True] * s.units for s in structures}
        removed = 0
        for _, _, unit, s in sorted(units, key=lambda entry: entry[:3]):
            if removed >= budget:
                break
            keep[s.name][unit] = False
            removed += s.cost
        return keep

    return select
