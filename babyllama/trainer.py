"""The training loop: one loop for pretraining, fine-tuning and all else.

A step either happens whole or not at all. Its supervised tokens are counted first, over all
micro-batches and ranks; each backward then divides its sum of losses by that count, so the update
is the same for any split into micro-batches and processes. Numbers that are not finite change no
weight. Ctrl-C and SIGTERM end the loop after the running step, with everything saved.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from babyllama.checkpoint import load_train_state, require_space, save_best, save_checkpoint
from babyllama.checkpoint_files import list_checkpoints
from babyllama.cli import BAD_NUMBERS, STOPPED, shown, stop_requests
from babyllama.data import Data, TrainData
from babyllama.device import DeviceConfig, Scaler, pick_precision, precision_warning
from babyllama.errors import ConfigError, DataError
from babyllama.log import Log
from babyllama.objectives import Batch, LossFunction, Objective, n_targets, next_token_loss
from babyllama.optim import (
    OptimConfig,
    averaged,
    lr_at,
    make_optimizer,
    move_averages,
    set_lr,
    swap_averages,
)
from babyllama.parallel import World, no_sync
from babyllama.speed import mfu_per_rate
from babyllama.validation import Window, evaluate, means, on_cpu, over_ranks, samples
from model import Transformer
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
        keep_best: also keep the weights of the lowest validation loss, in best/
        seed: of initial weights, order and wordings
        max_bad_steps: stop after so many steps in a row with numbers that are not finite
        compile: run each layer as torch.compile makes it; the first steps take minutes
        recompute: keep less for the way back and compute it again: less memory, a third slower
        blocks: on CUDA cards that can, attend to packed dialogues block by block; else by a mask
        samples: prompts continued or answered at each evaluation, kept in samples.jsonl
        track: also send the figures to TensorBoard or SwanLab (requirements/track.txt)
    """

    max_steps: int = 0
    epochs: float = 1.0
    batch_size: int = 32
    micro_batch_size: int = 8
    log_every: int = 10
    eval_every: int = 200
    save_every: int = 500
    keep: int = 2
    keep_best: bool = True
    seed: int = 0
    max_bad_steps: int = 20
    compile: bool = False
    recompute: bool = False
    blocks: bool = True
    samples: tuple[str, ...] = ()
    track: Literal["none", "tensorboard", "swanlab"] = "none"

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


def total_steps(config: TrainConfig, data: TrainData) -> int:
    """How many updates a run makes."""
    return config.max_steps or max(1, round(config.epochs * data.steps_per_epoch))


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
    objective: Objective | LossFunction = next_token_loss,
) -> int:
    """Train, or go on training, until the last step; returns the exit code.

    model: on its device; continues from the newest checkpoint of `run` where there is one
    kind: "pretrain" or "sft", kept in the checkpoints
    objective: a loss function alone is divided by the number of targets
    """
    objective = objective if isinstance(objective, Objective) else Objective(objective)
    config, optim = cfg.train, cfg.optim
    # torch's random state is part of a checkpoint, so it has to begin somewhere of ours.
    torch.manual_seed(config.seed)
    wrapped = world.wrap(model, config.compile, config.recompute, config.blocks)
    optimizer = make_optimizer(model, optim)
    precision = pick_precision(world.device, cfg.device.precision, cfg.device.force)
    scaler = Scaler(world.device, precision)
    seen = _resume(run, model, tokenizer, optimizer, scaler, data.train.fingerprint)
    step, last = seen.step, total_steps(config, data.train)
    log = Log(run, step, last, world.is_main, config.track)
    if step >= last:
        log.say(f"{shown(run)} is finished: {step} of {last} steps; nothing to do")
        return 0
    world.on_main(lambda: require_space(run, model, optimizer))
    log.say(_opening(model, data.train, world, scaler, run, step, last))
    log.warn(precision_warning(world.device, cfg.device.precision, cfg.device.force))
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    window = Window(world.device, mfu_per_rate(model, world, precision), seen.window)
    parent = shown(cfg.base) if cfg.base else None
    bad_steps = 0

    def save() -> None:
        seen.window = window.sums.tolist()
        extra = {**asdict(seen), "scaler": scaler.state(), "data": data.train.fingerprint}
        with averaged(model, optimizer):  # whose state then holds the weights as they train
            save_checkpoint(
                run, step, model, tokenizer, optimizer, extra, kind, parent, config.keep, world
            )

    def validate() -> None:
        with averaged(model, optimizer):
            _validate()
        window.restart()

    def _validate() -> None:
        of_bytes = tokenizer if objective.is_of_tokens else None
        figures = evaluate(
            wrapped, data.val, config.micro_batch_size, scaler, world, of_bytes, objective.measure
        )
        log.record("val", step, figures)
        log.samples(step, samples(model, tokenizer, config.samples, kind))
        if config.keep_best and step and figures["loss"] < (seen.best or math.inf):
            seen.best = figures["loss"]
            save_best(run, step, model, tokenizer, seen.best, kind, parent, world)

    with stop_requests() as asked:
        model.train()
        if step == 0:
            validate()
        while step < last:
            lr = lr_at(step, optim, last)
            set_lr(optimizer, lr)
            batches = data.train.batches(step, config.micro_batch_size, world.rank, world.size)
            # Dropout belongs to the step, so a resumed run draws what it would have drawn.
            torch.manual_seed(
                int(SeedSequence((config.seed, step, world.rank)).generate_state(1)[0])
            )
            sums = forward_backward(
                wrapped, batches, world, scaler, objective.loss, objective.count
            )
            grad_norm = scaler.step(optimizer, parameters, optim.max_grad_norm, float(sums[0]))
            seen.step = step = step + 1
            seen.tokens += int(sums[3])
            bad_steps = 0 if math.isfinite(grad_norm) else bad_steps + 1
            if bad_steps:
                log.say(
                    f"step {step}: loss {means(sums.tolist())['loss']}, gradient norm "
                    f"{grad_norm}; the step changed nothing; its rows: {data.train.names(step - 1)}"
                )
            else:
                move_averages(optimizer)
                window.add(sums)
            log.step(step)
            is_logged = step % config.log_every == 0 or step == last
            if is_logged and not bad_steps and window.sums[1] > 0:
                figures = window.figures(seen.tokens)
                log.record("train", step, {**figures, "lr": lr, "grad_norm": grad_norm})
            if bad_steps >= config.max_bad_steps:
                log.close(
                    f"stopped: {bad_steps} steps in a row with numbers that are not finite; "
                    f"try a lower --optim.lr; the last checkpoint is intact"
                )
                return BAD_NUMBERS
            if step % config.eval_every == 0 or step == last:
                validate()
            stop = world.any(bool(asked))
            if step % config.save_every == 0 or step == last or stop:
                save()
                window.restart()
            if stop and step < last:
                log.close(f"stopped at step {step} of {last}, saved; the same command continues")
                return STOPPED
    log.close(f"done: {shown(run)} (checkpoint {list_checkpoints(run)[-1].name}, curves.png)")
    return 0


def forward_backward(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    world: World,
    scaler: Scaler,
    loss_function: LossFunction,
    count: Callable[[Batch], Tensor] = n_targets,
) -> Tensor:
    """Gradients of one step; returns (loss_sum, n_targets, n_correct, n_tokens), summed over
    ranks, float64."""
    n_counted = torch.tensor([float(sum(count(batch) for batch in batches))])
    n_counted = world.sum(n_counted.to(world.device)).clamp(min=1)
    sums = torch.zeros(4, dtype=torch.float64)
    for number, batch in enumerate(batches):
        batch = {key: value.to(world.device, non_blocking=True) for key, value in batch.items()}
        with no_sync(model, is_last=number == len(batches) - 1):
            with scaler.autocast():
                loss = loss_function(model, batch)
            # DDP averages gradients over ranks; the sum is wanted.
            scaler.backward(loss.loss_sum * (world.size / n_counted[0]))
        sums[:3] += on_cpu(loss)
        sums[3] += batch["tokens"].numel()
    return over_ranks(sums, world)


@dataclass
class Seen:
    """How far a run is; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    best: float | None = None  # lowest validation loss of a step
    window: list[float] | None = None  # sums since the last logged step


def _resume(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
    fingerprint: str,
) -> Seen:
    """Continue from the newest checkpoint, where there is one.

    raises: DataError if the token files are not those the run has read so far
    """
    steps = list_checkpoints(run)
    if not steps:
        return Seen()
    state = load_train_state(steps[-1], model, tokenizer, optimizer)
    swap_averages(model, optimizer)
    if state.get("data", fingerprint) != fingerprint:
        raise DataError(
            f"{shown(run)} was trained on other token files than are there now (fingerprint "
            f"{state['data'][:12]}… then, {fingerprint[:12]}… now): a set was made again; set it "
            f"back, or begin a new run from these weights: --name another --base {shown(run)}"
        )
    scaler.load(state["scaler"])
    return Seen(state["step"], state["tokens"], state.get("best"), state.get("window"))


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
