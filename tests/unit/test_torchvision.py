"""torchvision's VisionTransformer, by a stand-in: its attentions are split exactly, then any unit may go."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import upop
from upop.errors import ModelError
from upop.families import find_structures
from upop.families.torchvision import split_attentions_
from upop.profiling import count_macs
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


class Called(nn.Module):
    """An attention, and how it is called."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x, *masks, **named):
        return self.attention(x, x, x, *masks, **named)[0]


@pytest.mark.parametrize("shape", [(2, 5, 8), (5, 8)], ids=["batch", "one alone"])
def test_batches_and_single_sequences_come_out_as_before(shape):
    model, x = Called().eval(), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(split_attentions_(model)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "masks",
    [
        ((torch.zeros(2, 5, dtype=torch.bool),), {}),
        ((), {"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool)}),
        ((None, False, torch.zeros(5, 5)), {}),
        ((), {"attn_mask": torch.zeros(5, 5)}),
        ((), {"is_causal": True}),
    ],
)
def test_a_mask_is_refused_wherever_it_is_given_never_left_out(masks):
    model = split_attentions_(Called())
    with pytest.raises(ModelError, match="expected no masks"):
        model(torch.randn(2, 5, 8), *masks[0], **masks[1])


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"kdim": 4}, {"add_bias_kv": True}])
def test_where_one_attention_is_refused_none_is_replaced(options):
    model = nn.Sequential(Called(), Called(**options))
    with pytest.raises(ModelError, match=r"^1\.attention: expected"):
        split_attentions_(model)
    assert all(type(each.attention) is nn.MultiheadAttention for each in model)


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_own_layers_read_their_attentions_and_are_refused(layer):
    model = nn.Sequential(Called(), layer(8, 2, 16, batch_first=True))
    with pytest.raises(ModelError, match=rf"^1\.self_attn: .*{layer.__name__}"):
        split_attentions_(model)
    assert not any("SplitAttention" in type(module).__name__ for module in model.modules())


def test_a_model_that_is_an_attention_itself_is_refused():
    with pytest.raises(ModelError, match=r"^the model: expected"):
        split_attentions_(nn.MultiheadAttention(8, 2, batch_first=True))


def test_what_is_frozen_stays_frozen():
    model = Called()
    model.attention.in_proj_weight.requires_grad_(False)
    model.attention.out_proj.bias.requires_grad_(False)
    frozen = {name for name, p in split_attentions_(model).named_parameters() if not p.requires_grad}
    assert frozen == {
        f"attention.{name}" for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.bias")
    }


def test_an_attention_in_two_places_stays_one():
    model = Called()
    model.again = model.attention
    split_attentions_(model)
    assert model.again is model.attention


def test_targets_in_macs_and_analyze_know_its_images(images):
    model = split_attentions_(make())
    model.image_size = 32  # as torchvision's has
    assert "macs" in upop.analyze(model).costs
    search = upop.Search(model, target=upop.Target(macs=0.4), steps=1)
    model(images(2)).square().sum().backward()
    search.step()
    assert count_macs(search.slim()) == pytest.approx(0.6 * count_macs(model), rel=0.02)


@pytest.mark.parametrize("name", ["vit_b_16", "vit_l_32"])
def test_torchvision_itself_is_described_rightly(name):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    model = getattr(models, name)()
    assert len(find_structures(split_attentions_(model))) == 2 * len(model.encoder.layers)
