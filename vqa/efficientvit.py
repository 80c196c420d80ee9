"""EfficientViT-B0 and -B1: convolutions, and attention that costs as much as the picture is large.

A stage that attends is a chain of two parts: multi-scale linear attention over all places, then an
MBConv. Softmax is replaced by relu(q) relu(k)^T, so the sum over keys is taken once for all queries
(Cai et al. 2023, arXiv:2205.14756, section 3). Parameters have the names and shapes of the
checkpoints that mit-han-lab/efficientvit publishes; those of timm are renamed by `from_timm`.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shape(NamedTuple):
    """Widths and depths of stem and four stages; widths of the classifier."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    head: tuple[int, int]


SHAPES = {
    "efficientvit_b0": Shape((8, 16, 32, 64, 128), (1, 2, 2, 2, 2), (1024, 1280)),
    "efficientvit_b1": Shape((16, 32, 64, 128, 256), (1, 2, 3, 3, 4), (1536, 1600)),
}
HEAD_DIM, EXPANSION, SCALE = 16, 4, 5

# What keeps the attention's division from zero, in the publisher's code and in timm's.
EPS_MIT, EPS_TIMM = 1e-15, 1e-5

_TIMM_NAMES = (
    (r"^stem\.in_conv\.", "backbone.input_stem.op_list.0."),
    (r"^stem\.res(\d+)\.", lambda m: f"backbone.input_stem.op_list.{int(m[1]) + 1}."),
    (r"^stages\.(\d+)\.blocks\.", r"backbone.stages.\1.op_list."),
    (r"^head\.in_conv\.", "head.op_list.0."),
    (r"^head\.classifier\.0\.", "head.op_list.2.linear."),
    (r"^head\.classifier\.1\.", "head.op_list.2.norm."),
    (r"^head\.classifier\.4\.", "head.op_list.3.linear."),
)


def from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names of the same tensors as the publisher's; others stay and fail strict loading."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, new in _TIMM_NAMES:
            name = re.sub(pattern, new, name)
        renamed[name] = tensor
    return renamed


class ConvNorm(nn.Module):
    """A convolution that keeps the size but for its stride; norm and hard swish if wanted."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        is_normed: bool = True,
        is_active: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(n_out) if is_normed else None
        self.is_active = is_active

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return F.hardswish(x) if self.is_active else x


class DepthwiseConv(nn.Module):
    """Each channel by itself, then all channels at each place."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.depth_conv = ConvNorm(n_in, n_in, 3, groups=n_in)
        self.point_conv = ConvNorm(n_in, n_out, is_active=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(x))


class MBConv(nn.Module):
    """More channels, a depthwise convolution, fewer channels again.

    few_norms: biases in place of the first two norms, as in the stages that attend
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1, few_norms: bool = False) -> None:
        super().__init__()
        wide, how = EXPANSION * n_in, {"is_normed": not few_norms, "bias": few_norms}
        self.inverted_conv = ConvNorm(n_in, wide, **how)
        self.depth_conv = ConvNorm(wide, wide, 3, stride, groups=wide, **how)
        self.point_conv = ConvNorm(wide, n_out, is_active=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.point_conv(self.depth_conv(self.inverted_conv(x)))


class LinearAttention(nn.Module):
    """Attention of all places over all places, at two scales: of pixels, and of 5 x 5 averages."""

    def __init__(self, n_channels: int, eps: float) -> None:
        super().__init__()
        heads, width = n_channels // HEAD_DIM, 3 * n_channels
        self.eps = eps
        self.qkv = ConvNorm(n_channels, width, is_normed=False, is_active=False)
        local = nn.Conv2d(width, width, SCALE, padding=SCALE // 2, groups=width, bias=False)
        mix = nn.Conv2d(width, width, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(local, mix)])
        self.proj = ConvNorm(2 * n_channels, n_channels, is_active=False)

    def forward(self, x: Tensor) -> Tensor:
        B, _, height, width = x.shape
        qkv = self.qkv(x)
        scales = torch.cat([qkv, *(part(qkv) for part in self.aggreg)], dim=1)
        with torch.autocast(x.device.type, enabled=False):  # sums over all places overflow float16
            q, k, v = (
                scales.float().view(B, -1, 3, HEAD_DIM, height * width).unbind(2)
            )  # (B, heads of both scales, HEAD_DIM, places)
            q, k = F.relu(q), F.relu(k)
            mixed = (v @ k.transpose(-1, -2)) @ q
            total = k.sum(-1).unsqueeze(-2) @ q
            out = mixed / (total + self.eps)
        return self.proj(out.reshape(B, -1, height, width).to(x.dtype))


class Residual(nn.Module):
    def __init__(self, main: nn.Module, has_shortcut: bool = True) -> None:
        super().__init__()
        self.main, self.has_shortcut = main, has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.main(x) if self.has_shortcut else self.main(x)


class AttentionBlock(nn.Module):
    def __init__(self, n_channels: int, eps: float) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(n_channels, eps))
        self.local_module = Residual(MBConv(n_channels, n_channels, few_norms=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


class Chain(nn.Module):
    """Modules in a row under the publisher's name for them."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.op_list:
            x = part(x)
        return x


class Backbone(nn.Module):
    """Stem and four stages; each halves the size, so they end at 1/4, 1/8, 1/16 and 1/32."""

    def __init__(self, shape: Shape, eps: float) -> None:
        super().__init__()
        first, *widths = shape.widths
        stem = [Residual(DepthwiseConv(first, first)) for _ in range(shape.depths[0])]
        self.input_stem = Chain(ConvNorm(3, first, 3, 2), *stem)
        self.stages = nn.ModuleList()
        for number, (n_out, depth) in enumerate(zip(widths, shape.depths[1:], strict=True)):
            n_in, attends = shape.widths[number], number >= 2
            parts: list[nn.Module] = [Residual(MBConv(n_in, n_out, 2, attends), has_shortcut=False)]
            if attends:
                parts += [AttentionBlock(n_out, eps) for _ in range(depth)]
            else:
                parts += [Residual(MBConv(n_out, n_out)) for _ in range(depth - 1)]
            self.stages.append(Chain(*parts))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.input_stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Dense(nn.Module):
    """A linear layer, in the hidden one of the classifier with norm and hard swish."""

    def __init__(self, n_in: int, n_out: int, is_hidden: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out, bias=not is_hidden)
        self.norm = nn.LayerNorm(n_out) if is_hidden else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x if self.norm is None else F.hardswish(self.norm(x))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class EfficientViT(nn.Module):
    """The network with its classifier.

    widths: channels of the maps that `features` gives
    """

    def __init__(self, name: str, eps: float = EPS_MIT, n_classes: int = 1000) -> None:
        super().__init__()
        shape = SHAPES[name]
        self.widths, self.eps = shape.widths[1:], eps
        self.backbone = Backbone(shape, eps)
        self.head = Chain(
            ConvNorm(shape.widths[-1], shape.head[0]),
            Pool(),
            Dense(shape.head[0], shape.head[1], is_hidden=True),
            Dense(shape.head[1], n_classes, is_hidden=False),
        )

    def set_eps(self, eps: float) -> None:
        """Attend with another eps: that of the code which the weights were made with."""
        self.eps = eps
        for part in self.modules():
            if isinstance(part, LinearAttention):
                part.eps = eps

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised pictures (B, 3, H, W)."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1])
