"""Tiny models of every family, for the tests of descriptions: transformers' own, and stand-ins for timm's layout."""

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
MLP = {"intermediate_size": 256}
# Name -> (model class, config class, config, where the blocks are).
HF = {
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | MLP, "vit.layers"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES | MLP, "deit.layers"),
    "vit-tower": ("ViTModel", "ViTConfig", SIZES | MLP, "layers"),
    "deit-tower": ("DeiTModel", "DeiTConfig", SIZES | MLP, "layers"),
    "dinov2": ("Dinov2Model", "Dinov2Config", SIZES, "encoder.layer"),
    "dinov2-classifier": ("Dinov2ForImageClassification", "Dinov2Config", SIZES, "dinov2.encoder.layer"),
    "dinov2-swiglu": ("Dinov2Model", "Dinov2Config", SIZES | {"use_swiglu_ffn": True}, "encoder.layer"),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES, "encoder.layer"),
    "dinov2-registers-classifier": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        SIZES,
        "dinov2_with_registers.encoder.layer",
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SIZES | MLP, "encoder.layers"),
    "clip-projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        SIZES | MLP,
        "vision_model.encoder.layers",
    ),
    "clip-classifier": (
        "CLIPForImageClassification",
        "CLIPConfig",
        {"vision_config": SIZES | MLP},
        "vision_model.encoder.layers",
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SIZES | MLP, "encoder.layers"),
    "siglip-classifier": (
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": SIZES | MLP},
        "vision_model.encoder.layers",
    ),
    "beit": ("BeitModel", "BeitConfig", SIZES | MLP | {"use_relative_position_bias": True}, "layers"),
    "beit-classifier": (
        "BeitForImageClassification",
        "BeitConfig",
        SIZES | MLP | {"use_relative_position_bias": True},
        "beit.layers",
    ),
}


def make_hf(name: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    """A tiny model as transformers makes it, in eval mode."""
    import transformers

    model_class, config_class, values, _ = HF[name]
    torch.manual_seed(0)
    built = getattr(transformers, config_class)(**values | config, attn_implementation=attention)
    return getattr(transformers, model_class)(built).to(dtype).eval()


def _of_timm(kind: type[nn.Module]) -> type[nn.Module]:
    """Classes are recognised by their module: these stand in for timm's where it is not installed."""
    kind.__module__ = "timm.models.vision_transformer"
    return kind


@_of_timm
class Attention(nn.Module):
    """timm.layers.Attention (1.0.23 to 1.0.31): attributes and computation."""

    def __init__(self, dim, num_heads, *, qkv_bias=True, fused=True, qk_norm=False, scale_norm=False, gated=False):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, dim // num_heads, dim
        self.scale = self.head_dim**-0.5
        self.fused_attn = fused
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = nn.LayerNorm(dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim) if gated else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x):
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        x = self.norm(x.transpose(1, 2).reshape(B, N, self.attn_dim))
        return self.proj_drop(self.proj(x))


@_of_timm
class Mlp(nn.Module):
    def __init__(self, dim, hidden, *, act=nn.GELU, norm=False):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), act(), nn.Dropout(0.0)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.fc2, self.drop2 = nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1(x))))


@_of_timm
class GluMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.norm = nn.Linear(dim, hidden), nn.SiLU(), nn.Identity()
        self.fc2 = nn.Linear(hidden // 2, dim)

    def forward(self, x):
        x1, x2 = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.norm(self.act(x1) * x2))


@_of_timm
class SwiGLU(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1_g, self.fc1_x, self.act = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.SiLU()
        self.norm, self.fc2 = nn.Identity(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1_g(x)) * self.fc1_x(x)))


@_of_timm
class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma


@_of_timm
class Block(nn.Module):
    def __init__(self, attn, mlp, dim, layer_scale):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), attn
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(dim), mlp
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


@_of_timm
class ParallelThingsBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attns, self.ffns = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.attns.append(nn.Sequential())
            self.attns[-1].add_module("norm", nn.LayerNorm(dim))
            self.attns[-1].add_module("attn", Attention(dim, heads))
            self.ffns.append(nn.Sequential())
            self.ffns[-1].add_module("norm", nn.LayerNorm(dim))
            self.ffns[-1].add_module("mlp", Mlp(dim, 4 * dim))

    def forward(self, x):
        x = x + torch.stack([attn(x) for attn in self.attns]).sum(dim=0)
        return x + torch.stack([ffn(x) for ffn in self.ffns]).sum(dim=0)


class StandIn(nn.Module):
    """A tiny VisionTransformer of timm's layout around `blocks`; outputs logits."""

    def __init__(self, blocks, dim=64):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, 8, stride=8)
        self.patch_embed.img_size = (32, 32)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks, self.norm, self.head = nn.Sequential(*blocks), nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        return self.head(self.norm(x)[:, 0])


def make_stand_in(
    *, mlp="Mlp", parallel=False, layer_scale=False, dtype=torch.float32, act=nn.GELU, mlp_norm=False, **attention
) -> StandIn:
    """A seeded stand-in for a timm model: 2 blocks, 64 wide, 2 heads, in eval mode."""
    torch.manual_seed(0)
    mlps = {
        "Mlp": lambda: Mlp(64, 256, act=act, norm=mlp_norm),
        "GluMlp": lambda: GluMlp(64, 256),
        "SwiGLU": lambda: SwiGLU(64, 128),
    }
    blocks = [
        ParallelThingsBlock(64, 2) if parallel else Block(Attention(64, 2, **attention), mlps[mlp](), 64, layer_scale)
        for _ in range(2)
    ]
    return StandIn(blocks).to(dtype).eval()
