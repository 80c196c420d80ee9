"""What a run will take, before it is started: parameters, memory and time (`--dry-run`)."""

import time

from babyllama.data import TrainData
from babyllama.device import Scaler, memory_gb, pick_precision
from babyllama.optim import make_optimizer
from babyllama.parallel import World
from babyllama.trainer import RunConfig, forward_backward, next_token_loss, total_steps
from model import SLICE, ModelConfig, Transformer

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    config: ModelConfig, n_parameters: int, sequences: int, precision: str
) -> dict[str, float]:
    """Gigabytes that training takes, computed: `sequences` of full length at a time.

    Activations: what autograd keeps of a layer, counted in widths D and feed-forward widths F a
    token (two normed inputs, q, k, v twice, the attention's output, four F-wide tensors).
    """
    tokens = sequences * config.max_seq_len
    width = 12 * config.dim + 4 * config.hidden_dim
    parts = {
        "weights": 4 * n_parameters,
        "gradients": 4 * n_parameters,
        "optimizer": 8 * n_parameters,
        "activations": tokens * config.n_layers * width * _BYTES[precision],
        "loss slice": SLICE * config.vocab_size * 8 + 4 * config.vocab_size * config.dim,
    }
    return {name: size / 1e9 for name, size in parts.items()}


def dry_run(model: Transformer, data: TrainData, cfg: RunConfig, world: World) -> int:
    """Print parameters, memory and time on the chosen device. Nothing is kept."""
    precision = pick_precision(world.device, cfg.device.precision)
    for name, count in parameters_by_part(model).items():
        print(f"{name:<12} {count:>14,} parameters")
    print(f"{'together':<12} {model.n_parameters():>14,} parameters")
    parts = memory_by_part(
        model.config, model.n_parameters(), cfg.train.micro_batch_size, precision
    )
    for name, size in parts.items():
        print(f"{name:<12} {size:>14.3f} GB, computed")
    seconds, tokens = _probe(model, data, cfg, world, precision)
    steps = total_steps(cfg.train, data)
    hours = steps * seconds / 3600
    print(f"{'together':<12} {sum(parts.values()):>14.3f} GB, computed")
    print(f"{'in use':<12} {memory_gb(world.device):>14.3f} GB, measured with the program itself")
    print(
        f"{steps} steps of {tokens} tokens on {world.device} in {precision}: "
        f"{tokens / seconds:,.0f} tokens/s over 2 probing steps, about {hours:.2f} hours"
    )
    return 0


def _probe(
    model: Transformer, data: TrainData, cfg: RunConfig, world: World, precision: str
) -> tuple[float, int]:
    """Seconds and tokens of a step, the mean of two after one that warms up."""
    optimizer, scaler = make_optimizer(model, cfg.optim), Scaler(world.device, precision)
    parameters = list(model.parameters())
    tokens, started = 0, 0.0
    for step in range(3):
        if step == 1:
            tokens, started = 0, time.perf_counter()
        batches = data.batches(step, cfg.train.micro_batch_size, world.rank, world.size)
        sums = forward_backward(model, batches, world, scaler, next_token_loss)
        scaler.step(optimizer, parameters, cfg.optim.max_grad_norm)
        tokens += int(sums[3])
    return (time.perf_counter() - started) / 2, tokens // 2
