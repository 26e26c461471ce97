# SPDX-License-Identifier: Apache-2.0
"""A Vision Transformer that UPop has pruned: transformers' own model, with layers of widths of their own.

Stands alone, on torch and transformers; must not import upop. Saved models carry this file, so that they load where
upop is not installed, with `trust_remote_code=True`. `PrunedViTForImageClassification` is `ViTForImageClassification`
with its Linears cut to the widths in config.json, and `PrunedViTConfig` is the `ViTConfig` that has them; likewise for
all classes in MODELS. One number for each layer that is left; a list that is missing or null leaves that as it was:

    attn_widths    head dims of queries and keys, and of values where value_widths does not say otherwise
    value_widths   head dims of values
    head_counts    heads
    mlp_widths     hidden neurons

The scale of the softmax stays that of the dense head dim. Shape suffixes: B batch, N tokens, D width, H heads, K and V
head dims.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from torch import Tensor, nn

# Config class -> auto class -> model classes; which of several it is, `architectures` in config.json says.
CLASSIFIER, TOWER = "AutoModelForImageClassification", "AutoModel"
MODELS: dict[str, dict[str, tuple[str, ...]]] = {
    "ViTConfig": {CLASSIFIER: ("ViTForImageClassification",), TOWER: ("ViTModel",)},
    "DeiTConfig": {
        CLASSIFIER: ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        TOWER: ("DeiTModel",),
    },
    "Dinov2Config": {CLASSIFIER: ("Dinov2ForImageClassification",), TOWER: ("Dinov2Model",)},
    "Dinov2WithRegistersConfig": {
        CLASSIFIER: ("Dinov2WithRegistersForImageClassification",),
        TOWER: ("Dinov2WithRegistersModel",),
    },
    "CLIPConfig": {CLASSIFIER: ("CLIPForImageClassification",)},
    "CLIPVisionConfig": {TOWER: ("CLIPVisionModel", "CLIPVisionModelWithProjection")},
    "SiglipConfig": {CLASSIFIER: ("SiglipForImageClassification",)},
    "SiglipVisionConfig": {TOWER: ("SiglipVisionModel",)},
    "BeitConfig": {CLASSIFIER: ("BeitForImageClassification",), TOWER: ("BeitModel",)},
}
AUTO_CLASSES = {name: auto for kinds in MODELS.values() for auto, names in kinds.items() for name in names}
# Where a block has its q, k, v and output projection; then its MLP's first Linear or Linears, and the last. The lower
# rows are what older releases of transformers call them.
ATTENTIONS = (
    ("attention", "q_proj", "k_proj", "v_proj", "attention.o_proj"),
    ("self_attn", "q_proj", "k_proj", "v_proj", "self_attn.out_proj"),
    ("attention.attention", "query", "key", "value", "attention.output.dense"),
)
MLPS = (
    (("mlp.fc1",), "mlp.fc2"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    (("mlp.weights_in",), "mlp.weights_out"),
    (("intermediate.dense",), "output.dense"),
)


def __getattr__(name: str) -> Any:
    """The pruned twin of one of transformers' classes: where `auto_map` in config.json leads."""
    stock = name.removeprefix("Pruned")
    if name.startswith("Pruned") and stock in MODELS:
        return pruned_config(getattr(transformers, stock))
    if name.startswith("Pruned") and stock in AUTO_CLASSES:
        return pruned_model(getattr(transformers, stock))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def pruned_config(stock: Any) -> Any:
    """The class of configs that say widths, for models whose dense config is a `stock`."""

    def make(self: Any, **values: Any) -> None:
        stock.__init__(self, **values)
        if __name__.startswith("upop."):  # Elsewhere it is transformers that registers, by auto_map.
            _register_models(stock)

    members = {"__init__": make, "model_type": f"upop_{stock.model_type}", "_auto_class": "AutoConfig"}
    return _subclass(stock, members)


@cache
def _register_models(stock: Any) -> None:
    """Tell the auto classes which models go with such configs: late, since transformers' model code imports slowly."""
    for auto, names in MODELS[stock.__name__].items():
        models = tuple(pruned_model(getattr(transformers, name)) for name in names)
        # Some releases' pipelines stumble over a tuple.
        found = models if len(models) > 1 else models[0]
        getattr(transformers, auto).register(pruned_config(stock), found, exist_ok=True)


@cache
def pruned_model(stock: Any) -> Any:
    """The class of models that are `stock`, with layers as wide as their config says."""

    def make(self: Any, config: Any, *inputs: Any, **keywords: Any) -> None:
        held = next(iter(config.architectures or []), "")
        if AUTO_CLASSES[stock.__name__] == TOWER and AUTO_CLASSES.get(held.removeprefix("Pruned")) == CLASSIFIER:
            # Its tensors have other names, so that all of the tower would be random.
            raise ValueError(
                f"config.json: architectures: expected a bare tower's, got {held}: load that, with {CLASSIFIER}, and "
                "take its base_model"
            )
        stock.__init__(self, config, *inputs, **keywords)
        narrow_(self, config)

    # With an auto class, save_pretrained puts this file beside the weights.
    auto = {"config_class": pruned_config(stock.config_class), "_auto_class": AUTO_CLASSES[stock.__name__]}
    return _subclass(stock, {"__init__": make, **auto})


def _subclass(stock: Any, members: dict[str, Any]) -> Any:
    name = f"Pruned{stock.__name__}"
    doc = f"{stock.__name__} with widths of its own in every layer."
    return type(name, (stock,), members | {"__module__": __name__, "__qualname__": name, "__doc__": doc})


@dataclass(frozen=True)
class Layer:
    """The attention and the MLP of one block. `holder` is the module that has the numbers of heads and head dims."""

    holder: Any
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    out: nn.Linear
    into_hidden: tuple[nn.Linear, ...]
    out_of_hidden: nn.Linear

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return int(getattr(self.holder, "head_dim", 0) or self.holder.attention_head_size)

    @property
    def heads(self) -> int:
        return self.q.out_features // self.head_dim


def find_layers(model: nn.Module) -> list[Layer]:
    """The transformer's layers, in order; none of a pooling head's."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and (found := [_layer(block) for block in module])[0]:
            return [layer for layer in found if layer is not None]
    return []


def _layer(block: nn.Module) -> Layer | None:
    linears = {path: module for path, module in block.named_modules() if isinstance(module, nn.Linear)}
    for path, *names, out in ATTENTIONS:
        inputs = [f"{path}.{name}" for name in names]
        for into, last in MLPS:
            if all(name in linears for name in (*inputs, out, *into, last)):
                q, k, v = (linears[name] for name in inputs)
                hidden = tuple(linears[name] for name in into)
                return Layer(block.get_submodule(path), q, k, v, linears[out], hidden, linears[last])
    return None


def narrow_(model: nn.Module, config: Any) -> None:
    """Cut a freshly built `model`'s layers to the widths in `config`; in place, on the meta device too.

    Raises ValueError for widths that do not fit, and for releases of transformers that cannot compute with them.
    """
    layers = find_layers(model)
    dims = _widths(config, "attn_widths", [layer.head_dim for layer in layers])
    values = dims if getattr(config, "value_widths", None) is None else None
    values = values or _widths(config, "value_widths", [layer.head_dim for layer in layers])
    heads = _widths(config, "head_counts", [layer.heads for layer in layers])
    hidden = _widths(config, "mlp_widths", [layer.out_of_hidden.in_features for layer in layers])
    for layer, dim, value, count, width in zip(layers, dims, values, heads, hidden, strict=True):
        _require_new_enough(model, layer, cut=(dim, count) != (layer.head_dim, layer.heads), apart=dim != value)
        for projection, kept in ((layer.q, dim), (layer.k, dim), (layer.v, value)):
            _cut_(projection, rows=count * kept)
        _cut_(layer.out, columns=count * value)
        parts = [linear.out_features // layer.out_of_hidden.in_features for linear in layer.into_hidden]
        for linear, part in zip(layer.into_hidden, parts, strict=True):
            _cut_(linear, rows=part * width)  # two parts where gate and up are one Linear
        _cut_(layer.out_of_hidden, columns=width)
        if hasattr(layer.holder, "head_dim"):
            layer.holder.head_dim = dim
        else:
            layer.holder.attention_head_size, layer.holder.num_attention_heads = dim, count
            layer.holder.all_head_size = count * dim
        tell_apart_(layer)


def _widths(config: Any, name: str, dense: Sequence[int]) -> Sequence[int]:
    """The widths `name` of `config`, checked against what is there."""
    found = getattr(config, name, None)
    if found is None:
        return dense
    if (
        not isinstance(found, list | tuple)
        or len(found) != len(dense)
        or not all(type(width) is int and 1 <= width <= most for width, most in zip(found, dense, strict=True))
    ):
        most = max(dense, default=1)
        raise ValueError(f"config.json: {name}: expected {len(dense)} numbers in [1, {most}], got {found}")
    return found


def _require_new_enough(model: nn.Module, layer: Layer, *, cut: bool, apart: bool) -> None:
    old_names = not hasattr(layer.holder, "head_dim")
    old = tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 9)
    tower = AUTO_CLASSES.get(type(model).__name__.removeprefix("Pruned")) == TOWER
    # Bare towers are stored under today's names, classifiers under the old ones, which all releases know. Of the old
    # attentions, only those that keep their scale as a number of its own compute rightly with fewer head dims.
    if (old_names and (tower or apart)) or (
        old and (apart or (cut and not (old_names and hasattr(layer.holder, "scaling"))))
    ):
        raise ValueError(
            f"{type(model).__name__}: expected transformers 5.18 or newer for these widths, got "
            f"{transformers.__version__}; pip install --upgrade transformers"
        )


def _cut_(linear: nn.Linear, rows: int | None = None, columns: int | None = None) -> None:
    linear.weight = nn.Parameter(linear.weight[:rows, :columns].clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[:rows].clone(), linear.bias.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


def tell_apart_(layer: Layer) -> None:
    """Where values are not as wide as queries, give the attention the forward that can do it. In place."""
    if layer.v.out_features != layer.q.out_features and not isinstance(layer.holder, ApartMixin):
        kind: Any = type(layer.holder)
        layer.holder.__class__ = _apart(kind)


@cache
def _apart(attention: Any) -> Any:
    return type(f"Apart{attention.__name__}", (ApartMixin, attention), {"__module__": __name__})


def _new_apart(attention: Any) -> Any:
    kind = _apart(attention)
    return kind.__new__(kind)


class ApartMixin:
    """An attention whose values have another head dim than its queries; transformers' own views all three alike."""

    def __reduce__(self: Any) -> tuple[Any, ...]:
        """No name leads pickle to a class that `_apart` makes; what it is made of has one."""
        return _new_apart, (type(self).__mro__[2],), vars(self)

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the attention it is mixed into, [B, N, D] -> [B, N, D], with the number of heads taken from q."""
        heads = self.q_proj.out_features // self.head_dim
        q_BHNK, k_BHNK, v_BHNV = (
            projection(hidden_states).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        modules = (vars(sys.modules[c.__module__]) for c in type(self).__mro__[2:])
        eager = next(names["eager_attention_forward"] for names in modules if "eager_attention_forward" in names)
        attend = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager
        )
        dropout = self.attention_dropout if hasattr(self, "attention_dropout") else self.dropout
        scaling = self.scaling if hasattr(self, "scaling") else self.scale
        mixed, weights = attend(
            self,
            q_BHNK,
            k_BHNK,
            v_BHNV,
            attention_mask,
            dropout=dropout if self.training else 0.0,
            scaling=scaling,
            **kwargs,
        )
        out = self.o_proj if hasattr(self, "o_proj") else self.out_proj
        return out(mixed.reshape(*hidden_states.shape[:-1], -1)), weights
