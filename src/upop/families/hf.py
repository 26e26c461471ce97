"""Hugging Face vision transformers, described by the names of their modules; must not import transformers.

One Layout a family. All of them share transformers' attention, which reads `head_dim` and a softmax scale from the
module and infers the number of heads.
"""

from dataclasses import dataclass

from torch import nn

from upop.errors import ModelError
from upop.families.parts import MissingPartError, attention, blocks, gated_mlp, installed, mlp, part, split_attention
from upop.structures import Structure


@dataclass(frozen=True)
class Layout:
    """Where the blocks of a family of models are, and what they call their parts.

    Attributes:
        classes: names of the model classes; subclasses (such as slimmed models) belong to the family too.
        blocks: paths that the list of blocks may have.
        since: the release of transformers that introduced these names.
        attention, out, scale: the block's attention, its output projection, its softmax scale.
        allows: the finer kinds that the attention can be taken apart into, see `upop.kinds`. Values of another width
            than queries need a forward of our own, see `upop.modeling_upop`.
    """

    classes: tuple[str, ...]
    blocks: tuple[str, ...]
    since: str
    attention: str = "attention"
    out: str = "o_proj"
    scale: str = "scaling"
    allows: tuple[str, ...] = ("dims", "head", "qk", "v")

    def matches(self, model: nn.Module) -> bool:
        """True for transformers' own classes of these names, and for subclasses."""
        return any(
            c.__module__.startswith("transformers.models.") and c.__name__ in self.classes for c in type(model).__mro__
        )

    def find(self, model: nn.Module) -> tuple[Structure, ...]:
        """`attn.<layer>`: head dims, shared by q, k, v and all heads; `mlp.<layer>`: hidden neurons.

        Raises ModelError for another layout, or an activation f with f(0) != 0.
        """
        try:
            return tuple(s for n, path in enumerate(blocks(model, *self.blocks)) for s in self._block(model, n, path))
        except MissingPartError as error:
            raise ModelError(
                f"{error}; expected the layout of transformers {self.since} and later, "
                f"got that of {installed('transformers')}"
            ) from None

    def _block(self, model: nn.Module, layer: int, path: str) -> tuple[Structure, ...]:
        gated = hasattr(part(model, f"{path}.mlp"), "gate_proj")
        hidden = (gated_mlp if gated else mlp)(model, layer, f"{path}.mlp", block=path)
        where = f"{path}.{self.attention}"
        if is_split(part(model, where)):
            return *split_attention(model, layer, where, out=self.out, block=path, allows=self.allows), hidden
        return (
            attention(model, layer, where, out=self.out, scale=self.scale, block=path, allows=self.allows),
            hidden,
        )


def is_split(attention: nn.Module) -> bool:
    """Whether the values of an attention are not as wide as its queries, after a search over `qk` and `v`."""
    q, v = getattr(attention, "q_proj", None), getattr(attention, "v_proj", None)
    return isinstance(q, nn.Linear) and isinstance(v, nn.Linear) and q.out_features != v.out_features


VIT = Layout(
    classes=(
        "ViTForImageClassification",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "ViTModel",
        "DeiTModel",
    ),
    blocks=("vit.layers", "deit.layers", "layers"),
    since="5.9",
)
DINOV2 = Layout(
    classes=(
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    blocks=("dinov2.encoder.layer", "dinov2_with_registers.encoder.layer", "encoder.layer"),
    since="5.18",
)
# The text tower is not described, so models that hold one are not either. SigLIP's pooling head stays whole.
CLIP = Layout(
    classes=(
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPForImageClassification",
        "SiglipVisionModel",
        "SiglipForImageClassification",
    ),
    blocks=("vision_model.encoder.layers", "encoder.layers"),
    since="5.9",
    attention="self_attn",
    out="out_proj",
    scale="scale",
)
BEIT = Layout(
    classes=("BeitModel", "BeitForImageClassification"),
    blocks=("beit.layers", "layers"),
    since="5.9",
    # Each head has position biases of its own, so that heads stay.
    allows=("dims", "qk", "v"),
)
