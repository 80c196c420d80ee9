"""Estimate of what a run takes before it is started, `python pretrain.py --dry-run`: parameters,
memory and, by ten probing steps, time."""

import re
import time
from collections import Counter

import psutil
import torch

from babyllama import lora
from babyllama.analysis.watch import mfu_per_rate, synchronize
from babyllama.checkpoint import checkpoint_bytes
from babyllama.data import TrainData
from babyllama.device import Scaler, memory_gb, open_scaler
from babyllama.distributed import World
from babyllama.optim import make_optimizer, n_kept
from babyllama.trainer import Objective, RunConfig, forward_backward, total_steps
from model import SLICE, ModelConfig, Transformer

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

PROBES = 10
_CPU_TOKENS = 20_000  # tokens that a processor reads in ten seconds, at 43 million parameters
# Of the memory that there is; the rest is for the allocator's gaps and everybody else.
_USABLE = 0.9
# What the driver takes of a card for a process, before the first tensor.
CONTEXT_GB = 0.5


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


def adapter_line(model: Transformer) -> str:
    """What trains, beside what and in which layers, for people."""
    state = model.lora
    cfg = state.configs[state.active]
    names = (
        re.sub(r"^layers\.\d+\.", "", path) for path, layer in lora.layers(model) if layer.active
    )
    where = ", ".join(f"{count} x {name}" for name, count in Counter(names).items())
    n_trained = sum(w.numel() for w in lora.stored(model).values())
    n_base = sum(w.numel() for w in lora.base_weights(model).values())
    return (
        f"LoRA {state.active}: rank {cfg.rank}, scale {cfg.scale:g}, dropout {cfg.dropout:g} in "
        f"{where}; {n_trained:,} parameters train beside {n_base:,} frozen ones "
        f"({n_trained / n_base:.2%})"
    )


def memory_by_part(
    config: ModelConfig,
    n_parameters: int,
    sequences: int,
    precision: str,
    recompute: bool = False,
    shares: int = 1,
    n_trained: int | None = None,
    n_state: int | None = None,
    is_card: bool = False,
    is_masked: bool = False,
    accumulates: bool = False,
) -> dict[str, float]:
    """Gigabytes that training takes, computed: `sequences` of full length at a time.

    Activations: what autograd keeps of a layer, counted in widths D and feed-forward widths F a
    token. In float32: the two inputs and what their norms made of them, twice; q, k, v, the
    attention's output, twice; four F-wide tensors; 2 D for what the backward pass takes besides. In
    a narrow format the residual stream, four widths, stays float32. With recompute: the inputs of
    all layers and the whole of one.

    shares: processes that each keep a part of weights, gradients and optimizer state
    n_trained: parameters with gradients; all, where not said
    n_state: numbers that the optimizer keeps; two for each of those, where not said
    is_card: the loss is that of CUDA cards, of larger slices
    is_masked: packed rows are kept apart by a mask
    accumulates: several micro-batches a step, for which gradients stay whole
    """
    n_trained = n_parameters if n_trained is None else n_trained
    n_state = 2 * n_trained if n_state is None else n_state
    table, width = config.vocab_size * config.dim, _BYTES[precision]
    # Autocast keeps a copy of every matrix until the backward pass has ended.
    narrow = 0 if precision == "float32" else width
    tokens = sequences * config.max_seq_len
    one = (12 * config.dim + 4 * config.hidden_dim) * width
    one += 4 * config.dim * (4 - width)
    kept = 4 * config.dim * config.n_layers + one if recompute else config.n_layers * one
    # Of a slice there are logits and probabilities, and on a card their gradient and a product.
    of_slice = SLICE * config.vocab_size * 8 + 4 * table
    if is_card:
        from babyllama.cuda.attention import CARD_SLICE  # takes its time, for cards alone

        of_slice = CARD_SLICE * config.vocab_size * (8 + width) + 4 * table * (2 if narrow else 1)
    parts = {
        "weights": 4 * n_parameters / shares + narrow * (n_parameters - table),
        "gradients": 4 * n_trained / (1 if accumulates else shares),
        "optimizer": 4 * n_state / shares,
        "activations": tokens * kept,
        "loss slice": of_slice,
    }
    if is_masked:
        parts["mask"] = tokens * config.max_seq_len * (1 + width)
    return {name: size / 1e9 for name, size in parts.items()}


def largest_batch(one: dict[str, float], two: dict[str, float], available_gb: float) -> int:
    """Number of sequences that fit at a time, from the memory by part of one and of two of them."""
    first, each = sum(one.values()), sum(two.values()) - sum(one.values())
    return max(0, 1 + int((available_gb * _USABLE - first) / each))


def available_gb(device: torch.device) -> float:
    """Memory that this process could have now, of the card or of the machine."""
    if device.type == "cuda":  # what others use of it, such as a desktop, is not there
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) / 1e9
    return psutil.virtual_memory().available / 1e9


def dry_run(
    model: Transformer,
    data: TrainData,
    cfg: RunConfig,
    world: World,
    objective: Objective,
) -> int:
    """Print parameters, memory, disk and time on the chosen device. Nothing is kept."""
    device, config, train = world.device, model.config, cfg.train
    scaler = open_scaler(device, cfg.device)
    precision = scaler.precision
    shares = world.size if world.engine == "fsdp2" else 1
    n_parameters, by_part = model.n_parameters(), parameters_by_part(model)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = make_optimizer(model, cfg.optim)
    sizes_of = {
        "n_trained": sum(weight.numel() for weight in trained),
        "n_state": n_kept(optimizer),
        "is_card": device.type == "cuda",
        "is_masked": _is_masked(model, data, cfg, world),
        "accumulates": train.batch_size > train.micro_batch_size * world.size,
    }
    disk = (train.keep + 1) * checkpoint_bytes(model, optimizer) / 1e9
    sizes = {
        n: memory_by_part(config, n_parameters, n, precision, train.recompute, shares, **sizes_of)
        for n in (1, 2, train.micro_batch_size)
    }
    program = max(0.0, memory_gb(device) - 4 * n_parameters / 1e9)
    seconds, tokens, n_probes = _probe(model, data, cfg, world, scaler, objective)
    rate = tokens / seconds
    if not world.is_main:
        return 0
    if scaler.warning:
        print(f"warning: {scaler.warning}")
    for name, count in (*by_part.items(), ("together", n_parameters)):
        print(f"{name:<12} {count:>14,} parameters")
    parts = sizes[train.micro_batch_size]
    for name, size in parts.items():
        print(f"{name:<12} {size:>14.3f} GB, computed")
    print(f"{'program':<12} {program:>14.3f} GB, measured: all else that was in use")
    print(f"{'together':<12} {sum(parts.values()) + program:>14.3f} GB at most")
    print(f"{'peak':<12} {memory_gb(device):>14.3f} GB, measured over the probing steps")
    print(f"{'disk':<12} {disk:>14.3f} GB at most, computed: {train.keep + 1} checkpoints")
    there = available_gb(device)
    most = largest_batch(sizes[1], sizes[2], there)
    print(
        f"{'largest':<12} {most:>14,} sequences of {config.max_seq_len} at a time "
        f"(train.micro_batch_size) fit {there:.1f} GB, computed"
    )
    steps = total_steps(train, data)
    print(
        f"{steps} steps of {tokens:.0f} tokens on {world.size} x {device} in {precision}: "
        f"{rate:,.0f} tokens/s over {n_probes} probing steps, "
        f"MFU {rate * mfu_per_rate(model, world, precision):.1%}, "
        f"about {steps * seconds / 3600:.2f} hours"
    )
    return 0


def _is_masked(model: Transformer, data: TrainData, cfg: RunConfig, world: World) -> bool:
    """True if a card keeps packed rows apart by a mask, for want of block attention."""
    (batch, *_) = data.batches(0, cfg.train.micro_batch_size, world.rank, world.size)
    if world.device.type != "cuda" or "segments" not in batch:
        return False
    from babyllama.cuda.attention import suits  # takes its time, for cards alone

    return not (cfg.train.blocks and suits(world.device, model.config.head_dim))


def _probe(
    model: Transformer,
    data: TrainData,
    cfg: RunConfig,
    world: World,
    scaler: Scaler,
    objective: Objective,
) -> tuple[float, float, int]:
    """Seconds and tokens of a step, and of how many that is the mean, after a warm-up.

    On a processor from as many of a step's micro-batches as are read in seconds.
    """
    wrapped = world.wrap(model, cfg.train.compile, cfg.train.recompute)
    optimizer = make_optimizer(model, cfg.optim)
    parameters = list(model.parameters())
    n_probes, n_used, share = PROBES, None, 1.0
    if world.device.type == "cpu":
        n_used = max(1, _CPU_TOKENS // (cfg.train.micro_batch_size * data.max_seq_len))
        n_rows = min(data.batch_size, n_used * cfg.train.micro_batch_size)
        n_probes = max(1, min(PROBES, _CPU_TOKENS // (n_rows * data.max_seq_len)))
    tokens, started = 0, 0.0
    for step in range(n_probes + 1):
        whole = data.batches(step, cfg.train.micro_batch_size, world.rank, world.size)
        batches = whole[:n_used]
        share = len(batches) / len(whole)
        if step == 1:
            synchronize(world.device)
            tokens, started = 0, time.perf_counter()
        sums = forward_backward(wrapped, batches, world, scaler, objective)
        scaler.step(optimizer, parameters, cfg.optim.max_grad_norm, float(sums[0]))
        tokens += int(sums[3])
    synchronize(world.device)
    seconds = time.perf_counter() - started
    return seconds / n_probes / share, tokens / n_probes / share, n_probes
