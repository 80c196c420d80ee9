"""The training loop and the evaluation pass: one loop for pretraining, fine-tuning and all else.

A step either happens whole or not at all. Its supervised tokens are counted first, over all
micro-batches and ranks; each backward then divides its sum of losses by that count, so the update
is the same for any split into micro-batches and processes. Numbers that are not finite change no
weight. Ctrl-C and SIGTERM end the loop after the running step, with everything saved.
"""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from babyllama.checkpoint import list_checkpoints, load_train_state, save_checkpoint
from babyllama.cli import BAD_NUMBERS, STOPPED, shown
from babyllama.data import Data, TrainData, ValData
from babyllama.device import DeviceConfig, Scaler, memory_gb, pick_precision
from babyllama.errors import ConfigError
from babyllama.log import Log
from babyllama.metrics import accuracy, perplexity
from babyllama.optim import OptimConfig, lr_at, make_optimizer, set_lr
from babyllama.parallel import World, no_sync
from model import Loss, Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Args:
        max_steps: stop after this many updates; 0: after `epochs`
        epochs: rounds through the mixture, where max_steps is 0
        batch_size: rows of an update: windows of a text, or dialogues
        micro_batch_size: sequences computed at a time; less takes less memory
        log_every: steps between two logged ones
        eval_every: steps between two evaluations
        save_every: steps between two checkpoints
        keep: newest checkpoints that are kept
        seed: of initial weights, order and wordings
        max_bad_steps: stop after so many steps in a row with numbers that are not finite
    """

    max_steps: int = 0
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch_size: int = 8
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 500
    keep: int = 2
    seed: int = 0
    max_bad_steps: int = 20

    def __post_init__(self) -> None:
        numbers = (
            "batch_size", "micro_batch_size", "log_every", "eval_every", "save_every", "keep",
            "max_bad_steps",
        )  # fmt: skip
        bad = [f"{name} {getattr(self, name)}" for name in numbers if getattr(self, name) < 1]
        if self.seed < 0:
            bad.append(f"seed {self.seed}")
        if self.max_steps < 0 or (self.max_steps == 0 and not 0 < self.epochs < math.inf):
            bad.append(f"max_steps {self.max_steps} with epochs {self.epochs}")
        if bad:
            raise ConfigError(
                f"train wants whole numbers from 1, a seed from 0, and max_steps or epochs above "
                f"0; found {', '.join(bad)}"
            )


LossFunction = Callable[[nn.Module, dict[str, Tensor]], Loss]


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """The language model's own loss."""
    return model(**batch)


def total_steps(config: TrainConfig, data: TrainData) -> int:
    """How many updates a run makes."""
    return config.max_steps or max(1, round(config.epochs * data.steps_per_epoch))


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C or SIGTERM has arrived; the second ends at once."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    kinds = [signal.SIGINT, signal.SIGTERM]
    before = [signal.signal(kind, ask) for kind in kinds]
    try:
        yield asked
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


class RunConfig(Protocol):
    """What the loop reads of a script's config."""

    base: Path | None
    train: TrainConfig
    optim: OptimConfig
    device: DeviceConfig


def train(
    model: Transformer,
    data: Data,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    world: World,
    run: Path,
    kind: str,
    loss_function: LossFunction = next_token_loss,
) -> int:
    """Train, or go on training, until the last step; returns the exit code.

    model: on its device; continues from the newest checkpoint of `run` where there is one
    kind: "pretrain" or "sft", kept in the checkpoints
    """
    config, optim = cfg.train, cfg.optim
    # torch's random state is part of a checkpoint, so it has to begin somewhere of ours.
    torch.manual_seed(config.seed)
    optimizer = make_optimizer(model, optim)
    scaler = Scaler(world.device, pick_precision(world.device, cfg.device.precision))
    step, tokens_seen = _resume(run, model, tokenizer, optimizer, scaler)
    last = total_steps(config, data.train)
    log = Log(run, step, last, world.is_main)
    if step >= last:
        log.say(f"{shown(run)} is finished: {step} of {last} steps; nothing to do")
        return 0
    log.say(_opening(model, data.train, world, scaler, run, step, last))
    wrapped = world.wrap(model)
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    window = Window(world.device)
    bad_steps = 0

    def save() -> None:
        extra = {"tokens": tokens_seen, "scaler": scaler.state()}
        parent = shown(cfg.base) if cfg.base else None

        def write() -> None:
            save_checkpoint(
                run, step, model, tokenizer, optimizer, extra, kind, parent, config.keep
            )
            log.draw()

        world.on_main(write)

    def validate() -> None:
        figures = evaluate(wrapped, data.val, config.micro_batch_size, scaler, world)
        log.record("val", step, figures)
        window.restart()

    with stop_requests() as asked:
        model.train()
        if step == 0:
            validate()
        while step < last:
            lr = lr_at(step, optim, last)
            set_lr(optimizer, lr)
            batches = data.train.batches(step, config.micro_batch_size, world.rank, world.size)
            sums = forward_backward(wrapped, batches, world, scaler, loss_function)
            grad_norm = scaler.step(optimizer, parameters, optim.max_grad_norm, float(sums[0]))
            step += 1
            tokens_seen += int(sums[3])
            bad_steps = 0 if math.isfinite(grad_norm) else bad_steps + 1
            if bad_steps:
                log.say(
                    f"step {step}: loss {_means(sums.tolist())['loss']}, gradient norm "
                    f"{grad_norm}; the step changed nothing"
                )
            else:
                window.add(sums)
            log.step(step)
            is_logged = step % config.log_every == 0 or step == last
            if is_logged and not bad_steps and window.sums[1] > 0:
                figures = window.figures(tokens_seen)
                log.record("train", step, {**figures, "lr": lr, "grad_norm": grad_norm})
            if bad_steps >= config.max_bad_steps:
                log.say(
                    f"stopped: {bad_steps} steps in a row with numbers that are not finite; "
                    f"try a lower --optim.lr; the last checkpoint is intact"
                )
                log.close()
                return BAD_NUMBERS
            if step % config.eval_every == 0 or step == last:
                validate()
            stop = world.any(bool(asked))
            if step % config.save_every == 0 or step == last or stop:
                save()
                window.restart()
            if stop and step < last:
                log.close()
                log.say(f"stopped at step {step} of {last}, saved; the same command continues")
                return STOPPED
    log.close()
    log.say(f"done: {shown(run)} (checkpoint {list_checkpoints(run)[-1].name}, curves.png)")
    return 0


def forward_backward(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    world: World,
    scaler: Scaler,
    loss_function: LossFunction,
) -> Tensor:
    """Gradients of one step; returns (loss_sum, n_targets, n_correct, n_tokens), summed over
    ranks, float64."""
    n_targets = torch.tensor([float(sum((b["targets"] >= 0).sum() for b in batches))])
    n_targets = world.sum(n_targets.to(world.device)).clamp(min=1)
    sums = torch.zeros(4, dtype=torch.float64)
    for number, batch in enumerate(batches):
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        with no_sync(model, is_last=number == len(batches) - 1):
            with scaler.autocast():
                loss = loss_function(model, batch)
            # DDP averages gradients over ranks; the sum is wanted.
            scaler.backward(loss.loss_sum * (world.size / n_targets[0]))
        sums[:3] += _on_cpu(loss)
        sums[3] += batch["tokens"].numel()
    return _over_ranks(sums, world)


def _on_cpu(loss: Loss) -> Tensor:
    """Its three sums; (3,) float64, which Apple's GPUs do not have."""
    return torch.stack([part.detach().float() for part in loss]).cpu().double()


def _over_ranks(sums: Tensor, world: World) -> Tensor:
    return world.sum(sums.float().to(world.device)).cpu().double() if world.size > 1 else sums


@torch.no_grad()
def evaluate(
    model: nn.Module, data: ValData, micro_batch_size: int, scaler: Scaler, world: World
) -> dict:
    """Loss, perplexity and accuracy over the validation rows, in all and per source."""
    inner = getattr(model, "module", model)
    inner.eval()
    total = torch.zeros(3, dtype=torch.float64)
    losses = {}
    for name in data.names:
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in data.batches(name, micro_batch_size, world.rank, world.size):
            batch = {key: value.to(world.device) for key, value in batch.items()}
            with scaler.autocast():
                sums += _on_cpu(inner(**batch))
        sums = _over_ranks(sums, world)
        losses[name] = float(sums[0] / sums[1].clamp(min=1))
        total += sums
    inner.train()
    return {**_means(total.tolist()), "sources": losses}


def _means(sums: list[float]) -> dict:
    loss_sum, n_targets, n_correct = sums[:3]
    n_targets = max(1.0, n_targets)
    return {
        "loss": loss_sum / n_targets,
        "ppl": perplexity(loss_sum, n_targets),
        "accuracy": accuracy(n_correct, n_targets),
        "n_targets": int(sums[1]),
    }


class Window:
    """Sums and time since the last logged step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.seconds, self._tokens = 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leave out the time that has passed since the last step (evaluation, saving)."""
        self._clock = time.perf_counter()

    def add(self, sums: Tensor) -> None:
        """One step has ended."""
        self.sums += sums
        self._tokens += float(sums[3])
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def figures(self, tokens_seen: int) -> dict:
        """Means since the last call; starts anew."""
        figures = {
            **_means(self.sums.tolist()),
            "tokens": tokens_seen,
            "tokens_per_s": self._tokens / max(self.seconds, 1e-9),
            "mem_gb": memory_gb(self._device),
        }
        self.sums.zero_()
        self.seconds, self._tokens = 0.0, 0.0
        return figures


def _resume(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
) -> tuple[int, int]:
    """Continue from the newest checkpoint; returns (step, tokens seen)."""
    steps = list_checkpoints(run)
    if not steps:
        return 0, 0
    state = load_train_state(steps[-1], model, tokenizer, optimizer)
    scaler.load(state["scaler"])
    return state["step"], state["tokens"]


def _opening(
    model: Transformer,
    data: TrainData,
    world: World,
    scaler: Scaler,
    run: Path,
    step: int,
    last: int,
) -> str:
    how = f"continues at step {step}" if step else "starts"
    sources = ", ".join(f"{s.name} {len(s)}" for s in data.mixture.sources)
    drops = [f"{s.name} {reason} {n}" for s in data.mixture.sources
             for reason, n in s.dropped.items() if n]  # fmt: skip
    lines = [
        f"{shown(run)} {how}: {model.n_parameters():,} parameters, {world.size} process(es) on "
        f"{world.device}, {scaler.precision}",
        f"rows: {sources}; {data.batch_size} a step, {last} steps = "
        f"{last / data.steps_per_epoch:.2f} epochs",
    ]
    if drops:
        lines.append("too long for the context: " + ", ".join(drops))
    return "\n".join(lines)
