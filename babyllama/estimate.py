"""What a run will take, before it is started: parameters, memory and time (`--dry-run`)."""

import time

import psutil
import torch

from babyllama.data import TrainData
from babyllama.device import Scaler, memory_gb, pick_precision, precision_warning
from babyllama.optim import make_optimizer
from babyllama.parallel import World
from babyllama.speed import mfu_per_rate, synchronize
from babyllama.trainer import RunConfig, forward_backward, next_token_loss, total_steps
from model import SLICE, ModelConfig, Transformer

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PROBES = 10
# Of the memory that there is; the rest is for the allocator's gaps and everybody else.
_USABLE = 0.9


def parameters_by_part(model: Transformer) -> dict[str, int]:
    """Number of parameters of each part; a tied head has none of its own."""
    layers = sum(weight.numel() for weight in model.layers.parameters())
    table = model.tok_embeddings.weight.numel()
    return {
        "embedding": table,
        "layers": layers,
        "head": 0 if model.config.tied else table,
        "norm": model.norm.weight.numel(),
    }


def memory_by_part(
    config: ModelConfig,
    n_parameters: int,
    sequences: int,
    precision: str,
    recompute: bool = False,
    shares: int = 1,
) -> dict[str, float]:
    """Gigabytes that training takes, computed: `sequences` of full length at a time.

    Activations: what autograd keeps of a layer, counted in widths D and feed-forward widths F a
    token (two normed inputs, q, k, v twice, the attention's output, four F-wide tensors), or with
    recompute the inputs of all layers and the whole of one.

    shares: processes that each keep a part of weights, gradients and optimizer state
    """
    tokens = sequences * config.max_seq_len
    width = 12 * config.dim + 4 * config.hidden_dim
    kept = config.n_layers * config.dim + width if recompute else config.n_layers * width
    parts = {
        "weights": 4 * n_parameters / shares,
        "gradients": 4 * n_parameters / shares,
        "optimizer": 8 * n_parameters / shares,
        "activations": tokens * kept * _BYTES[precision],
        "loss slice": SLICE * config.vocab_size * 8 + 4 * config.vocab_size * config.dim,
    }
    return {name: size / 1e9 for name, size in parts.items()}


def largest_batch(one: dict[str, float], two: dict[str, float], available_gb: float) -> int:
    """How many sequences fit at a time, from the memory by part of one and of two of them."""
    first, each = sum(one.values()), sum(two.values()) - sum(one.values())
    return max(0, 1 + int((available_gb * _USABLE - first) / each))


def available_gb(device: torch.device) -> float:
    """Memory that a run could have: the card's, or what the machine has free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / 1e9
    return psutil.virtual_memory().available / 1e9


def dry_run(model: Transformer, data: TrainData, cfg: RunConfig, world: World) -> int:
    """Print parameters, memory and time on the chosen device. Nothing is kept."""
    device, config, train = world.device, model.config, cfg.train
    precision = pick_precision(device, cfg.device.precision, cfg.device.force)
    shares = world.size if world.engine == "fsdp2" else 1
    n_parameters, by_part = model.n_parameters(), parameters_by_part(model)
    sizes = {
        n: memory_by_part(config, n_parameters, n, precision, train.recompute, shares)
        for n in (1, 2, train.micro_batch_size)
    }
    seconds, tokens = _probe(model, data, cfg, world, precision)
    rate = tokens / seconds
    if not world.is_main:
        return 0
    warning = precision_warning(device, cfg.device.precision, cfg.device.force)
    if warning:
        print(f"warning: {warning}")
    for name, count in (*by_part.items(), ("together", n_parameters)):
        print(f"{name:<12} {count:>14,} parameters")
    parts = sizes[train.micro_batch_size]
    for name, size in (*parts.items(), ("together", sum(parts.values()))):
        print(f"{name:<12} {size:>14.3f} GB, computed")
    print(f"{'in use':<12} {memory_gb(device):>14.3f} GB, measured with the program itself")
    there = available_gb(device)
    most = largest_batch(sizes[1], sizes[2], there)
    print(
        f"{'largest':<12} {most:>14,} sequences of {config.max_seq_len} at a time "
        f"(train.micro_batch_size) fit {there:.1f} GB, computed"
    )
    steps = total_steps(train, data)
    print(
        f"{steps} steps of {tokens:.0f} tokens on {world.size} x {device} in {precision}: "
        f"{rate:,.0f} tokens/s over {PROBES} probing steps, "
        f"MFU {rate * mfu_per_rate(model, world, precision):.1%}, "
        f"about {steps * seconds / 3600:.2f} hours"
    )
    return 0


def _probe(
    model: Transformer, data: TrainData, cfg: RunConfig, world: World, precision: str
) -> tuple[float, float]:
    """Seconds and tokens of a step, the mean of ten after one that warms up."""
    wrapped = world.wrap(model, cfg.train.compile, cfg.train.recompute)
    optimizer, scaler = make_optimizer(model, cfg.optim), Scaler(world.device, precision)
    parameters = list(model.parameters())
    tokens, started = 0, 0.0
    for step in range(PROBES + 1):
        if step == 1:
            synchronize(world.device)
            tokens, started = 0, time.perf_counter()
        batches = data.batches(step, cfg.train.micro_batch_size, world.rank, world.size)
        sums = forward_backward(wrapped, batches, world, scaler, next_token_loss)
        scaler.step(optimizer, parameters, cfg.optim.max_grad_norm)
        tokens += int(sums[3])
    synchronize(world.device)
    return (time.perf_counter() - started) / PROBES, tokens / PROBES
