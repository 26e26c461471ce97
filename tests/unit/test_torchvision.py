"""torchvision's VisionTransformer, by a stand-in: its attentions are split exactly, then any unit may go."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from upop.errors import ModelError
from upop.families import find_structures
from upop.families.torchvision import split_attentions_
from upop.testing import check_family


class EncoderBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = (
            nn.Linear(width, 3 * width),
            nn.GELU(),
            nn.Dropout(0.0),
            nn.Linear(3 * width, width),
            nn.Dropout(0.0),
        )
        self.mlp = nn.Sequential(*hidden)

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + y
        return x + self.mlp(self.ln_2(x))


class VisionTransformer(nn.Module):
    """The names and the order that torchvision 0.24 has, at a size for tests."""

    def __init__(self, width=32, heads=2, layers=2):
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 8, stride=8)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.encoder = nn.Module()
        names = (f"encoder_layer_{i}" for i in range(layers))
        self.encoder.layers = nn.Sequential(OrderedDict((name, EncoderBlock(width, heads)) for name in names))
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, 5)))

    def forward(self, images):
        x_BND = self.conv_proj(images).flatten(2).transpose(1, 2)
        x_BND = self.encoder.layers(torch.cat([self.class_token.expand(len(x_BND), -1, -1), x_BND], 1))
        return self.heads(x_BND[:, 0])


VisionTransformer.__module__ = "torchvision.models.vision_transformer"


def make():
    torch.manual_seed(0)
    model = VisionTransformer()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


def test_split_attentions_compute_what_the_whole_ones_did(images):
    whole = make()
    split = split_attentions_(copy.deepcopy(whole))
    assert not any(isinstance(module, nn.MultiheadAttention) for module in split.modules())
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in whole.parameters())
    with torch.no_grad():
        torch.testing.assert_close(split(images()), whole(images()), rtol=0, atol=1e-5)
    split.train()
    split(images()).sum().backward()
    assert all(p.grad is not None for p in split.parameters())


@pytest.mark.parametrize("kinds", [None, ("dims", "mlp"), ("head", "dims", "mlp")])
def test_the_description_is_right_for_every_kind_it_allows(images, kinds):
    check_family(split_attentions_(make()), images=images(2), **({} if kinds is None else {"kinds": kinds}))


def test_before_the_attentions_are_split_it_says_what_to_call():
    with pytest.raises(ModelError, match=r"encoder_layer_0\.self_attention: .*split_attentions_\(model\) first"):
        find_structures(make())
    assert len(find_structures(split_attentions_(make()))) == 4


def test_an_attention_that_cannot_be_split_exactly_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True))
    with pytest.raises(ModelError, match="0: expected a self-attention with batch_first=True"):
        split_attentions_(model)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_32"])
def test_torchvision_itself_is_described_rightly(name):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = getattr(models, name)()
    assert len(find_structures(split_attentions_(model))) == 2 * len(model.encoder.layers)
