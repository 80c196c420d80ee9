"""A linear layer with low-rank adapters beside its weight: y = W x + s B A x.

A (rank, in) and B (out, rank); B begins as zeros. Parameters are ordinary ones, so that what wraps,
shares, compiles or stores a model needs to know nothing of this file.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """The two matrices beside one linear layer."""

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        weight = linear.weight
        bound = 1 / math.sqrt(linear.in_features)
        # Drawn on the CPU, so that every device and every process begins with the same.
        a = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """What it adds to the weight, (out, in); differentiable."""
        # An autocast to float16 would round what is added to a float32 weight.
        with torch.autocast(self.a.device.type, enabled=False):
            return (self.b @ self.a) * self.scale

    def exact_delta(self) -> Tensor:
        """As delta, with the same bits on every machine: the order of the sum is fixed, which a
        matrix product leaves to its library. A merged model so has one fingerprint everywhere."""
        delta = torch.outer(self.b[:, 0], self.a[0])
        for i in range(1, len(self.a)):
            delta += torch.outer(self.b[:, i], self.a[i])
        return delta * self.scale


class LoraLinear(nn.Linear):
    """A linear layer with adapters. Its frozen parameter keeps the name "weight".

    weight: read from outside, the sum of parameter and active adapter: model.py's loss reads the
        head so, and fast.py every layer
    active: name of the adapter that is added, or None
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # Linear's own would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training
        self.register_parameter("bias", None)
        self._parameters["weight"] = linear._parameters["weight"]
        self.lora = nn.ModuleDict()
        self.active: str | None = None
        self._original: Tensor | None = None  # of the parameter, while an adapter is merged into it

    @property
    def weight(self) -> Tensor:
        adapter = self._added()
        base = self._parameters["weight"]
        return base if adapter is None else base + adapter.delta()

    def forward(self, x: Tensor) -> Tensor:
        adapter = self._added()
        y = F.linear(x, self._parameters["weight"])
        return y if adapter is None else y + adapter(x)

    @property
    def is_merged(self) -> bool:
        """Whether an adapter is inside the parameter now."""
        return self._original is not None

    def _added(self) -> Adapter | None:
        is_added = self.active is not None and self._original is None
        return self.lora[self.active] if is_added else None

    @torch.no_grad()
    def merge(self) -> None:
        """Put the active adapter into the parameter; the original is kept for unmerge."""
        adapter, base = self._added(), self._parameters["weight"]
        if adapter is not None:
            self._original = base.detach().clone()
            base.add_(adapter.exact_delta())

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put back the original, bit for bit."""
        if self._original is not None:
            self._parameters["weight"].copy_(self._original)
            self._original = None

    def plain(self) -> nn.Linear:
        """A linear layer with the parameter as it is now."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self._parameters["weight"]
        return linear
