"""Save and load: slimmed models as ordinary folders (safetensors + config.json, nothing pickled).

What slimmed Hugging Face models are, and what their config says, is in `upop.modeling_upop`, which goes with them.
"""

import copy
import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from upop import modeling_upop, timmfolder
from upop.errors import ModelError, said
from upop.families import OTHERWISE, timm
from upop.hub import fetch
from upop.modeling_upop import AUTO_CLASSES, CLASSIFIER, MODELS, Layer, find_layers, pruned_model, tell_apart_
from upop.reading import read_json
from upop.vetting import MOST_CONFIG, check_finite, check_shapes, vet

CODE = "modeling_upop.py"
CLASSIFIERS = transformers.AutoModelForImageClassification
# What a backbone brings or lacks that is of no matter to a classifier with a head of its own.
NOT_OF_THE_BACKBONE = (
    *("classifier", "pooler", "mask_token", "decoder."),
    *("text_model", "text_projection", "visual_projection", "logit_"),
    "lm_head.",
)
NORM_OF_THE_HEAD = "layernorm."  # of BEiT's that fills in what is masked; a backbone's own has a longer name


# `AutoConfig`, and through it the Auto model classes and pipelines, know slimmed models from here on.
for _name in MODELS:
    _config = getattr(modeling_upop, f"Pruned{_name}")
    transformers.AutoConfig.register(_config.model_type, _config, exist_ok=True)


def save_pretrained(
    model: nn.Module, folder: str | Path, *, code: bool = True, timm_args: Mapping[str, Any] | None = None
) -> None:
    """Write `model`, of Hugging Face or of `timm.create_model`, to `folder` as config.json + model.safetensors.

    With a slimmed model goes a small file of code (`code=False` leaves it out): where upop is not installed,
    transformers runs it to load the folder, if told `trust_remote_code=True`. upop itself never does. `timm_args` are
    arguments of `timm.create_model` that the model does not show; that some are missing is said.

    Raises ModelError for a model that cannot save itself so or would come back as another, or where `folder` cannot be
    written.
    """
    if callable(getattr(model, "save_pretrained", None)):
        save = _loadable(model).save_pretrained
    else:
        if not timm.matches(model):
            raise ModelError(
                f"{type(model).__name__}: expected a Hugging Face model (with save_pretrained) or one of timm, to "
                f"write to {folder}"
            )
        save = partial(timmfolder.save, model, arguments=timm_args)
    if Path(folder).is_file():
        raise ModelError(f"{folder}: expected a folder to write the model to, found a file")
    try:
        save(Path(folder))
        if not code:
            _leave_out_code(Path(folder))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be written ({error}); free space or choose another folder") from error
    except RuntimeError as error:  # of weights, say, that two modules share
        raise ModelError(f"{folder}: cannot be written ({said(error)})") from error


def _leave_out_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CODE).unlink(missing_ok=True)


def _loadable(model: nn.Module) -> Any:
    """`model`, or a slimmed model's backbone as a slimmed model of its own: what comes back from a folder as it is.

    Raises ModelError where another model would come back, or none at all.
    """
    stock: Any = model
    base = next((c for c in type(model).__mro__ if c.__name__ in AUTO_CLASSES), None)
    adapted = getattr(model, "hf_quantizer", None) or getattr(model, "_hf_peft_config_loaded", False)
    if adapted or (base is None and not any(_is_pruned(module) for module in model.modules())):
        return model
    kind = type(model)
    if base and not _is_pruned(model) and (_is_pruned(stock.config) or _difference(model, kind)):
        # Only the model around it was told of its widths.
        stock = copy.copy(model)
        stock.config = copy.deepcopy(stock.config)
        adopt_(stock)
    if base and _is_pruned(stock):
        kind = pruned_model(base)
        above = type(stock).__mro__[: type(stock).__mro__.index(base)]
        if own := next((c.__name__ for c in above if "forward" in vars(c)), None):
            raise ModelError(
                f"{own}: expected the forward of {base.__name__}, which a folder brings back, got one of its own; "
                f"{OTHERWISE}"
            )
    if difference := _difference(stock, kind):
        raise ModelError(
            f"{type(model).__name__}: a folder would bring back another model: {difference}; say so in its config "
            f"(num_labels), save its slimmed part alone, or {OTHERWISE}"
        )
    return stock


def _is_pruned(part: object) -> bool:
    return type(part).__module__ == modeling_upop.__name__


def _difference(model: Any, kind: Any) -> str:
    """What a `kind` made of the model's config would not share with it; empty where nothing."""
    try:
        made, _ = _without_memory(kind, copy.deepcopy(model.config), model.state_dict().keys())
    except Exception as error:
        # Classes of a user's own may want more than a config.
        return _first_line(error) if kind.__module__ == modeling_upop.__name__ else ""
    return timmfolder.other_tensor(made, model, "its config")


def adopt_(model: nn.Module) -> None:
    """Turn a slimmed stock model into its pruned class, with a config that says its widths. In place.

    Changing the class changes no computation: pruned classes differ in their constructor only.
    """
    layers = find_layers(model)
    for layer in layers:
        tell_apart_(layer)
    stock: Any = model
    config = stock.config
    vision = getattr(config, "vision_config", config)
    if vision.num_hidden_layers != len(layers):
        vision.num_hidden_layers = len(layers)
        _forget_stages_(vision)
    for name, widths in _widths(layers, vision.num_attention_heads).items():
        setattr(config, name, widths)
    pruned = _pruned_class(type(model))
    config.__class__ = pruned.config_class
    config.architectures = [pruned.__name__]
    stock.__class__ = pruned
    # What a class can return besides (hidden states, attentions) transformers notes when a model of it is made.
    transformers.PreTrainedModel.__init__(pruned.__new__(pruned), copy.deepcopy(config))
    # By now the model code is imported.
    modeling_upop._register_models(pruned.config_class.__base__)


def _widths(layers: list[Layer], dense_heads: int) -> dict[str, list[int] | None]:
    """What the config of a slimmed model says about its layers."""
    heads = [layer.heads for layer in layers]
    queries = [layer.head_dim for layer in layers]
    values = [layer.v.out_features // layer.heads for layer in layers]
    return {
        "attn_widths": queries,
        "value_widths": values if values != queries else None,
        "head_counts": heads if set(heads) != {dense_heads} else None,
        "mlp_widths": [layer.out_of_hidden.in_features for layer in layers],
    }


def _forget_stages_(config: Any) -> None:
    """Configs of models that may serve as backbones name a stage for each layer; back to the last one's features."""
    if hasattr(config, "stage_names"):
        config.stage_names = ["stem", *(f"stage{number}" for number in range(1, config.num_hidden_layers + 1))]
        config.set_output_features_output_indices(out_features=None, out_indices=None)


def _pruned_class(kind: Any) -> Any:
    """The class that a slimmed model of class `kind` saves itself as; `kind`'s own methods stay in force."""
    if kind.__module__ == modeling_upop.__name__:
        return kind
    base = next(c for c in kind.__mro__ if c.__name__ in AUTO_CLASSES)
    pruned = pruned_model(base)
    # A subclass of a user's keeps its forward in memory; the folder is one of the stock class.
    return pruned if base is kind else type(pruned.__name__, (pruned, kind), {"__module__": pruned.__module__})


def from_pretrained(folder: str | Path) -> nn.Module:
    """The model in `folder` (or of that Hub name), slimmed or dense, in eval mode, on the CPU.

    Image classifiers and bare vision towers of the families that upop slims, and slimmed models of timm. Strict:
    every weight must be there and fit. Code in the folder is never run. Raises ModelError otherwise.
    """
    return load(str(folder), towers=True)


def load(source: str, *, new_head: bool = False, towers: bool = False) -> nn.Module:
    """See `from_pretrained`; a classifier unless `towers` will do too. With `new_head` it may lack its head."""
    folder = fetch(source)
    promise = vet(folder)
    values = read_json(folder / "config.json", most=MOST_CONFIG)
    if timmfolder.KEY in values:
        if not towers:
            raise ModelError(
                f"{source}: a model of timm; expected one of Hugging Face, open it with upop.from_pretrained "
                "in a program of your own"
            )
        model = timmfolder.load(folder, values, promise)
        check_finite(model, source)
        return model
    if "architecture" in values and "model_type" not in values:
        raise ModelError(
            f"{source}: a model folder of timm's own; upop prunes the model in a program of yours: "
            f"timm.create_model('local-dir:{source}'), then upop.Search"
        )
    if "auto_map" in values and values.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"{source}: model type {values.get('model_type')!r} is known to code in the folder alone, which upop "
            "does not run; expected one that transformers or upop knows"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = _class_of(config) if towers else CLASSIFIERS
        made, arguments = _without_memory(getattr(kind, "from_config", kind), config, promise.names)
        check_shapes(made, promise)
        model, info = kind.from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
            **arguments,
        )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot load the model folder ({_first_line(error)})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(problem, ()))
        if found := [name for name in names if not (new_head and _is_of_a_head(name))]:
            raise ModelError(
                f"{source}: {len(found)} {problem.replace('_', ' ')}, such as {found[0]}; the weights do not belong "
                "to config.json, or the folder is no image classifier"
            )
    module: nn.Module = model
    check_finite(module, source)
    return module.eval()


def _is_of_a_head(name: str) -> bool:
    return any(part in name for part in NOT_OF_THE_BACKBONE) or name.startswith(NORM_OF_THE_HEAD)


def _class_of(config: Any) -> Any:
    """The class, or Auto class, that builds what a folder with this config holds."""
    name = next(iter(config.architectures or []), "")
    if AUTO_CLASSES.get(name.removeprefix("Pruned"), CLASSIFIER) == CLASSIFIER:
        return CLASSIFIERS
    return getattr(modeling_upop if name.startswith("Pruned") else transformers, name)


def _without_memory(kind: Any, config: Any, names: Collection[str]) -> tuple[nn.Module, dict[str, bool]]:
    """The model that `kind` builds of `config`, on `meta`; and arguments that no config says, but `names` of tensors.

    Those are a tower's, which its users choose: without a pooler, with a token for what is masked.
    """
    with torch.device("meta"):
        made: nn.Module = kind(config)
        own = made.state_dict().keys()
        arguments = {}
        if any(name.startswith("pooler.") for name in own) and not any("pooler." in name for name in names):
            arguments["add_pooling_layer"] = False
        if "embeddings.cls_token" in own and "embeddings.mask_token" in names - own:
            arguments["use_mask_token"] = True
        return kind(config, **arguments) if arguments else made, arguments


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
