"""The model card of a run: README.md of its model folder, with the metadata that the Hub reads.

Tells what result.json tells, and nothing more. Must not know torch, and writes nothing.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upop.data.sources import HUB_NAMES
from upop.errors import UpopError
from upop.reading import read_json, read_text

CARD = "README.md"
STAGES = {"dense": "dense", "slim": "slimmed, before retraining", "retrain": "pruned and retrained"}
UNITS = {
    "attn": "head dims, shared by all heads",
    "dims": "head dims, each head its own",
    "qk": "head dims of queries and keys",
    "v": "head dims of values",
    "head": "heads",
    "mlp": "hidden neurons",
    "block": "blocks",
}
MOST_BYTES = 2**20  # of the parent's card
CITATION = """```bibtex
@inproceedings{shi2023upop,
  title     = {{UPop}: Unified and Progressive Pruning for Compressing Vision-Language Transformers},
  author    = {Shi, Dachuan and Tao, Chaofan and Jin, Ying and Yang, Zhendong and Yuan, Chun and Wang, Jiaqi},
  booktitle = {Proceedings of the 40th International Conference on Machine Learning},
  year      = {2023}
}
```"""


@dataclass(frozen=True)
class Parent:
    """What a pruned model began as: `name` for people; its Hub name and licence where they are known.

    `own`: from random weights, so that the licence is for whoever trained it to choose. `slimmed`: by a run before.
    """

    name: str
    hub: str | None = None
    licence: str | None = None
    own: bool = False
    slimmed: bool = False


def find_parent(model: str, folder: Path | None) -> Parent:
    """The parent that a run was given as `model`, by the card in its `folder`; None for a built-in shape.

    A folder's own name says nothing elsewhere: its card does, of which model that was made.
    """
    if folder is None:
        return Parent(f"`{model}`, a built-in shape with random weights", own=True)
    data = _metadata(folder / CARD)
    base, licence = data.get("base_model"), data.get("license")
    hub = (base if isinstance(base, str) else None) if Path(model).exists() else model
    path = folder.resolve()
    name = hub or f"a model of one's own (`{path.parent.name if path.name == 'model' else path.name}`)"
    return Parent(name, hub, licence if isinstance(licence, str) else None, slimmed=_is_slimmed(folder))


def _is_slimmed(folder: Path) -> bool:
    with contextlib.suppress(OSError, UpopError):
        return str(read_json(folder / "config.json").get("model_type")).startswith("upop_")
    return False


def _metadata(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    try:
        data: Any = ModelCard(read_text(card, most=MOST_BYTES)).data
        found: dict[str, Any] = data.to_dict()
        return found
    except Exception:  # none, or whatever somebody wrote there: then nothing is known
        return {}


def model_card(result: Mapping[str, Any], parent: Parent, *, name: str) -> str:
    """README.md for the model of a run whose result.json is `result`; `name` is the model's, for its heading."""
    stages = [stage for stage in STAGES if stage in result["accuracy"]]
    final, split = stages[-1], "test" if "test" in result["accuracy"]["dense"] else "validation"
    slimmed = "slim" in stages or parent.slimmed
    # A search may find nothing that can go, and the control is not to remove anything.
    pruned = result["params"]["after"] < result["params"]["before"]
    trained = f"Trained on {_data(result)} by upop; {'pruned before, not again' if parent.slimmed else 'not pruned'}."
    sections = [
        _header(result, parent, name=name, split=split, accuracy=result["accuracy"][final][split]),
        f"# {name}",
        _summary(result, parent) if pruned else f"{_began(parent)} {trained}",
        *[f"> **{warning}**" for warning in result["warnings"]],
        _numbers(result, stages, STAGES if pruned else STAGES | {"retrain": "retrained"}),
        *([_widths(result["widths"])] if pruned else []),
        _loading(name, slimmed=slimmed),
        _making(result),
        _licence(parent),
        *(["## Citation\n\nThe method is UPop:\n\n" + CITATION] if pruned else []),
    ]
    return "\n\n".join(sections) + "\n"


def _header(result: Mapping[str, Any], parent: Parent, *, name: str, split: str, accuracy: float) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = result["data"]["name"]
    hub = HUB_NAMES.get(data, data if data.count("/") == 1 else None)
    score = EvalResult(
        task_type="image-classification",
        dataset_type=hub or "imagefolder",
        dataset_name=data,
        dataset_split=split,
        metric_type="accuracy",
        metric_value=round(accuracy, 4),
    )
    values = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=parent.hub,
        license=parent.licence,
        datasets=[hub] if hub else None,
        metrics=["accuracy"],
        tags=["upop", "pruning", "vision-transformer"],
        eval_results=[score],
    )
    return f"---\n{values.to_yaml()}\n---"


def _began(parent: Parent) -> str:
    link = f"[{parent.hub}](https://huggingface.co/{parent.hub})" if parent.hub else parent.name
    return f"Began as {link}."


def _data(result: Mapping[str, Any]) -> str:
    data = result["data"]
    images = ", ".join(f"{count:,} {split}" for split, count in data["images"].items())
    return f"`{data['name']}` ({len(data['classes'])} classes; images: {images})"


def _summary(result: Mapping[str, Any], parent: Parent) -> str:
    params, config = result["params"], result["config"]
    share = 100 * (1 - params["after"] / params["before"])
    return (
        f"A Vision Transformer without {share:.0f} % of its parameters. {_began(parent)} "
        f"Pruned with upop on {_data(result)}; method `{config.get('method', 'upop')}`, target `{config['target']}`. "
        "What is gone is gone from the weights: it is smaller and faster without any special kernels."
    )


def _numbers(result: Mapping[str, Any], stages: list[str], names: Mapping[str, str]) -> str:
    pruned = len(stages) > 1
    rows: list[tuple[str, ...]] = [("", "dense", "this model", "ratio") if pruned else ("", "this model")]
    size = result.get("images", {}).get("size")
    pixels = f", {size} x {size} pixels" if size else ""
    for label, key in (("parameters", "params"), (f"MACs an image{pixels}", "macs")):
        rows.append(_row(label, result[key]["before"], result[key]["after"], "{:,}", pruned))
    for batch, found in result["latency"].items():
        before, after = found["before"], found["after"]
        label = f"ms, batch {batch}, {after['dtype']}, {after['device']}"
        rows.append(_row(label, before["median_ms"], after["median_ms"], "{:.2f}", pruned))
    hardware = result["hardware"]
    machine = (
        f"{hardware['device']} ({hardware['threads']} threads of {hardware['cores']} cores, {hardware['system']})"
    )
    splits = list(result["accuracy"]["dense"])
    accuracy: list[tuple[str, ...]] = [
        ("accuracy, %", *(f"{split}, {result['data']['images'][split]:,} images" for split in splits))
    ]
    accuracy += [
        (names[stage], *(f"{100 * result['accuracy'][stage][split]:.2f}" for split in splits)) for stage in stages
    ]
    return (
        f"{_table(accuracy)}\n\nDecisions were made on validation; test was read once, at the end. In float32.\n\n"
        f"{_table(rows)}\n\nMilliseconds are medians of a forward pass in PyTorch {result['versions']['torch']}, "
        f"{'dense and pruned in turns, ' if pruned else ''}on {machine}."
    )


def _row(label: str, before: float, after: float, form: str, pruned: bool) -> tuple[str, ...]:
    return (
        (label, form.format(before), form.format(after), f"{after / before:.3f}")
        if pruned
        else (
            label,
            form.format(after),
        )
    )


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def _widths(widths: Mapping[str, Mapping[str, list[int]]]) -> str:
    rows: list[tuple[str, ...]] = [("what stays, layer by layer", "dense", "this model")]
    for kind, after in widths["after"].items():
        before = widths["before"].get(kind, [])
        ends = dict.fromkeys((min(before), max(before))) if before else {}
        rows.append((UNITS.get(kind, kind), " to ".join(map(str, ends)), " ".join(map(str, after))))
    return f"## Widths\n\n{_table(rows)}"


def _loading(name: str, *, slimmed: bool) -> str:
    upop = f'import upop\n\nmodel = upop.from_pretrained("{name}")  # this folder, or owner/name on the Hub'
    plain = f'from transformers import pipeline\n\nclassify = pipeline("image-classification", model="{name}"'
    if not slimmed:
        return f"## Use\n\n```python\n{plain})\n```"
    return (
        "## Use\n\nIts layers may differ in width, which transformers does not know. With upop installed:\n\n"
        f"```python\n{upop}\n```\n\nWithout, by the one file of code in this folder, `modeling_upop.py`, which you "
        f"may read before you trust it:\n\n```python\n{plain}, trust_remote_code=True)\n```"
    )


def _making(result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"## How it was made\n\n```\n{result['command']}\n```\n\n{versions}; seed {result['config']['seed']}."


def _licence(parent: Parent) -> str:
    if parent.licence:
        return f"## Licence\n\nThat of its parent: {parent.licence}. `modeling_upop.py` is Apache-2.0."
    unknown = (
        "Not chosen yet: it was trained from random weights."
        if parent.own
        else "Unknown: nothing says the licence of the model that this one was made from."
    )
    return (
        f"## Licence\n\n{unknown} Whoever publishes this model has to fill in `license:` at the top, with the "
        "licence of the data in mind too."
    )
