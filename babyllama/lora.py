"""Low-rank adapters: small trained matrices beside frozen weights, put on from outside.

y = W x + s B A x with A (rank, in) and B (out, rank); B begins as zeros, so an adapted model begins
as its base. Layers are chosen by name. What is stored keeps the names of the base's parameters:
"layers.0.attention.wq.weight" stays, beside it come "….wq.lora.<adapter>.a" and ".b". One base can
hold several adapters, of which one is active. Files: checkpoint.py. Parameters
are ordinary ones: what wraps, shares, compiles or stores a model need not know of them.

Sources: LoRA (Hu et al. 2021, arXiv:2106.09685), rank-stabilised scale (Kalajdzievski 2023,
arXiv:2312.03732).
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from babyllama.errors import CheckpointError, ConfigError, require
from model import Transformer

ADAPTER_FILES = ("adapter.safetensors", "adapter.yaml")


@dataclass(frozen=True)
class LoraConfig:
    """Train small matrices beside the weights instead of the weights.

    Args:
        rank: width of the two matrices
        alpha: what they add is multiplied by alpha / rank
        dropout: share of their inputs that is dropped in training
        targets: linear layers by name: wq wk wv wo w1 w2 w3 output, or some of these alone, as in
            layers.0.attention.wq
        rslora: multiply by alpha / root of rank instead, for high ranks
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("wq", "wv")
    rslora: bool = False

    def __post_init__(self) -> None:
        wanted = {
            "rank": ("1 or more", self.rank >= 1),
            "alpha": ("a number above 0", 0 < self.alpha < math.inf),
            "dropout": ("0 to below 1", 0 <= self.dropout < 1),
            "targets": ("at least one name", len(self.targets) > 0),
        }
        require("lora", self, wanted)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nn.Module):
    """The two matrices beside one linear layer."""

    def __init__(self, linear: nn.Linear, cfg: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.dropout = cfg.scale, cfg.dropout
        weight = linear.weight
        bound = 1 / math.sqrt(linear.in_features)
        # Drawn on the CPU, so that every device and every process begins with the same.
        a = torch.empty(cfg.rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a.to(weight.device, weight.dtype))
        self.b = nn.Parameter(weight.new_zeros(linear.out_features, cfg.rank))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """Product that is added to the weight, (out, in); differentiable."""
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
        head so, and cpu/decoder.py every layer
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

    @property
    def weight(self) -> Tensor:
        adapter = self._added()
        base = self._parameters["weight"]
        return base if adapter is None else base + adapter.delta()

    def forward(self, x: Tensor) -> Tensor:
        adapter = self._added()
        y = F.linear(x, self._parameters["weight"])
        return y if adapter is None else y + adapter(x)

    def _added(self) -> Adapter | None:
        return None if self.active is None else self.lora[self.active]

    @torch.no_grad()
    def plain(self) -> nn.Linear:
        """A linear layer that has the active adapter in its weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        adapter, base = self._added(), self._parameters["weight"]
        linear.weight = base if adapter is None else nn.Parameter(base + adapter.exact_delta())
        return linear


@dataclass
class Adapters:
    """Adapters of a model: its attribute `lora`.

    fingerprint: of the base's weights
    base: where they are from, for load_model
    active: name of the adapter that works and trains
    """

    fingerprint: str
    base: str | None
    configs: dict[str, LoraConfig] = field(default_factory=dict)
    active: str | None = None


def fingerprint(model: Transformer) -> str:
    """SHA-256 of the base's weights as float32, with names and shapes, adapters aside."""
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(model).items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def apply_lora(
    model: Transformer,
    cfg: LoraConfig,
    name: str = "default",
    base: str | None = None,
    seed: int = 0,
) -> Transformer:
    """The model with one more adapter, which is active and alone trains.

    To be called before the model is wrapped or compiled, and before the optimizer is made.

    base: where the weights are from, kept in checkpoints
    raises: ConfigError if a target names no linear layer or the name cannot be used
    """
    chosen = _matching(model, cfg)
    state = getattr(model, "lora", None) or Adapters(fingerprint(model), base)
    if not re.fullmatch(r"\w+", name) or hasattr(nn.ModuleDict, name) or name in state.configs:
        raise ConfigError(
            f"adapter {name!r}: wanted a new name of letters, digits and _, that is no method of "
            f"a dict; there are {sorted(state.configs)}; choose another"
        )
    generator = torch.Generator().manual_seed(seed)
    for path, linear in chosen:
        if not isinstance(linear, LoraLinear):
            linear = LoraLinear(linear)
            _put(model, path, linear)
        linear.lora[name] = Adapter(linear, cfg, generator).train(linear.training)
    state.configs[name] = cfg
    model.lora = state
    return switch(model, name)


def _matching(model: Transformer, cfg: LoraConfig) -> list[tuple[str, nn.Linear]]:
    """The linear layers whose name, or its end, is a target."""
    linears = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear)]
    unmatched = [t for t in cfg.targets if not any(_ends(path, t) for path, _ in linears)]
    if unmatched:
        names = dict.fromkeys(path.rpartition(".")[2] for path, _ in linears)
        raise ConfigError(
            f"lora.targets {unmatched} match no linear layer of the model; it has "
            f"{', '.join(names)}, or longer names such as {linears[0][0]}"
        )
    chosen = [(path, m) for path, m in linears if any(_ends(path, t) for t in cfg.targets)]
    if any(path == "output" for path, _ in chosen):
        if model.config.tied:
            raise ConfigError(
                "lora.targets: output shares its weights with the embedding in this model "
                "(tied), and an adapter would part them; leave it out"
            )
        if cfg.dropout:
            raise ConfigError(
                f"lora.dropout {cfg.dropout} does not reach output, of which the loss reads the "
                f"weights alone; set it to 0 or leave output out of lora.targets"
            )
    return chosen


def shapes(model: Transformer, cfg: LoraConfig) -> dict[str, tuple[int, int]]:
    """Shapes of an adapter on this model, by stored name; errors as apply_lora."""
    return {
        f"{path}.{part}": shape
        for path, linear in _matching(model, cfg)
        for part, shape in (
            ("a", (cfg.rank, linear.in_features)),
            ("b", (linear.out_features, cfg.rank)),
        )
    }


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def _put(model: Transformer, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def layers(model: Transformer) -> Iterator[tuple[str, LoraLinear]]:
    """The layers that hold adapters, by path."""
    return ((p, m) for p, m in list(model.named_modules()) if isinstance(m, LoraLinear))


def is_adapted(model: nn.Module) -> bool:
    """True if an adapter is active, whose checkpoints hold it alone."""
    return getattr(model, "lora", None) is not None and model.lora.active is not None


def switch(model: Transformer, name: str | None) -> Transformer:
    """Make an adapter the active one, or with None the base alone; the rest is frozen.

    raises: ConfigError if there is none of this name
    """
    if name is not None and name not in model.lora.configs:
        raise ConfigError(f"no adapter {name!r} on this model; it has {sorted(model.lora.configs)}")
    model.requires_grad_(False)
    model.lora.active = name
    for _, layer in layers(model):
        layer.active = name if name in layer.lora else None
        if layer.active is not None:
            layer.lora[name].requires_grad_(True)
    return model


def bake(model: Transformer) -> Transformer:
    """A plain model for good: the active adapter goes into the weights, all adapters go."""
    for path, layer in layers(model):
        _put(model, path, layer.plain())
    del model.lora
    return model.requires_grad_(True)


def base_weights(model: Transformer) -> dict[str, nn.Parameter]:
    return {name: w for name, w in model.named_parameters() if ".lora." not in name}


def stored(model: Transformer) -> dict[str, nn.Parameter]:
    """The parameters that a checkpoint holds: of an adapted model the active adapter, whose own
    name is left out ("layers.0.attention.wq.a"), else all; a tied head once."""
    if not is_adapted(model):
        return base_weights(model)
    inside = f".lora.{model.lora.active}."
    parameters = dict(model.named_parameters())
    return {name.replace(inside, "."): w for name, w in parameters.items() if inside in name}


def settings(model: Transformer) -> dict:
    """Contents of adapter.yaml for the active adapter."""
    state = model.lora
    cfg = asdict(state.configs[state.active])
    return {**cfg, "targets": list(cfg["targets"]), "base": state.base,
            "fingerprint": state.fingerprint}  # fmt: skip


def write(model: Transformer, tensors: dict[str, Tensor], place: Path) -> None:
    """The two files of the active adapter, without checksums, into a directory.

    tensors: what `stored` names, each of them whole
    """
    save_file(tensors, place / ADAPTER_FILES[0])
    text = yaml.safe_dump(settings(model), sort_keys=False, allow_unicode=True)
    (place / ADAPTER_FILES[1]).write_text(text, "utf-8")


def require_base(model: Transformer, found: dict, where: str) -> None:
    """Compare the base that an adapter was trained on with the one it is put on.

    found: the adapter's settings
    raises: CheckpointError if they differ
    """
    here = model.lora.fingerprint if hasattr(model, "lora") else fingerprint(model)
    if found["fingerprint"] != here:
        raise CheckpointError(
            f"{where}: its adapter belongs to the base {found['base'] or '(unnamed)'} with weights "
            f"{found['fingerprint'][:12]}…, found a base with weights {here[:12]}…; name the base "
            f"that it was trained on"
        )
