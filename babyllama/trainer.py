"""The training loop: one loop for pretraining, fine-tuning and all else.

A step either happens whole or not at all. Its supervised tokens are counted first, over all
micro-batches and ranks; each backward then divides its sum of losses by that count, so the update
is the same for any split into micro-batches and processes. Numbers that are not finite change no
weight. Ctrl-C and SIGTERM end the loop after the running step, with everything saved.

The loop knows an Objective, a loss and what it is divided by, and nothing of its kind: next_token
is the language model's own; another, for pairs of answers: tuning/preference.py.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from babyllama.checkpoint import (
    load_train_state,
    require_space,
    save_best,
    save_checkpoint,
    tidy,
)
from babyllama.config import BAD_NUMBERS, STOPPED, from_repo, shown, stop_requests
from babyllama.data import Data, TrainData, ValData, ahead
from babyllama.device import (
    DeviceConfig,
    Scaler,
    memory_gb,
    mfu_per_rate,
    pick_precision,
    precision_warning,
    set_deterministic,
    to_device,
)
from babyllama.distributed import World, inner, no_sync, whole_model
from babyllama.errors import ConfigError, DataError
from babyllama.generate import SamplingConfig, generate
from babyllama.log import Log
from babyllama.optim import (
    OptimConfig,
    averaged,
    lr_at,
    make_optimizer,
    move_averages,
    set_lr,
    swap_averages,
)
from babyllama.run_dir import find_checkpoint, list_checkpoints
from model import IGNORED, Loss, Transformer
from tokenizer import Tokenizer

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Loss]


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """The language model's own loss."""
    return model(**batch)


def n_targets(batch: Batch) -> Tensor:
    """How many tokens are learnt."""
    return (batch["targets"] >= 0).sum()


@dataclass(frozen=True)
class Objective:
    """A loss and what belongs to it.

    loss: of a micro-batch in training; its `loss_sum` is what gradients are computed of
    count: what the sum over a whole step is divided by
    measure: the loss in validation
    is_of_tokens: whether `measure` counts tokens, so that bits per byte mean something
    """

    loss: LossFunction = next_token_loss
    count: Callable[[Batch], Tensor] = n_targets
    measure: LossFunction = next_token_loss
    is_of_tokens: bool = True


def next_token(label_smoothing: float = 0.0) -> Objective:
    """The language model's own objective; validation is never smoothed."""
    if not label_smoothing:
        return Objective()
    return Objective(lambda model, batch: model(**batch, label_smoothing=label_smoothing))


def perplexity(loss_sum: float, n_targets: int) -> float:
    """exp of the mean loss in nats; comparable only within one tokenizer."""
    mean = _ratio(loss_sum, n_targets, "target")
    return math.exp(mean) if mean < 700 else math.inf


def accuracy(n_correct: int, n_targets: int) -> float:
    """The share of targets that were the most probable token."""
    return _ratio(n_correct, n_targets, "target")


def bits_per_byte(loss_sum: float, n_bytes: int) -> float:
    """Bits per UTF-8 byte of the text predicted; comparable across tokenizers."""
    return _ratio(loss_sum, n_bytes, "byte") / math.log(2)


def _ratio(part: float, whole: int, unit: str) -> float:
    if whole <= 0:
        raise DataError(f"a mean needs at least one {unit}, found {whole}; is the set empty?")
    return part / whole


def sums_of(losses: Sequence[Loss]) -> Tensor:
    """The three sums over some losses; (3,) float64 on the CPU, as Apple's GPUs do not have it.

    Read at once: whoever reads a number from a card waits until it has done all its work.
    """
    if not losses:
        return torch.zeros(3, dtype=torch.float64)
    parts = [torch.stack([part.detach().float() for part in loss]) for loss in losses]
    return sum(torch.stack(parts).cpu().double())


def over_ranks(sums: Tensor, world: World) -> Tensor:
    """Sums of this process added to those of the others."""
    return world.sum(sums.float().to(world.device)).cpu().double() if world.size > 1 else sums


def means(sums: Sequence[float]) -> dict:
    """Loss, perplexity and accuracy from (loss_sum, n_targets, n_correct, ...)."""
    loss_sum, n_correct = sums[0], sums[2]
    n_targets = max(1.0, sums[1])
    return {
        "loss": loss_sum / n_targets,
        "ppl": perplexity(loss_sum, n_targets),
        "accuracy": accuracy(n_correct, n_targets),
        "n_targets": int(sums[1]),
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ValData,
    micro_batch_size: int,
    scaler: Scaler,
    world: World,
    tokenizer: Tokenizer | None = None,
    measure: LossFunction = next_token_loss,
) -> dict:
    """Loss, perplexity and accuracy over the validation rows, in all and per source.

    tokenizer: gives bits per byte too, which compares models of different vocabularies
    measure: the loss; of another kind than the model's own, the figures are what it counts
    """
    model = inner(model)
    model.eval()
    total = torch.zeros(4, dtype=torch.float64)
    losses = {}
    for name in data.names:
        found, n_bytes = [], 0
        for batch in data.batches(name, micro_batch_size, world.rank, world.size):
            if tokenizer is not None:
                targets = batch["targets"]
                n_bytes += tokenizer.n_bytes(targets[targets != IGNORED].tolist())
            with scaler.autocast():
                found.append(measure(model, to_device(batch, world.device)))
        sums = over_ranks(torch.cat((sums_of(found), torch.tensor([float(n_bytes)]))), world)
        losses[name] = float(sums[0] / sums[1].clamp(min=1))
        total += sums
    model.train()
    figures = {**means(total.tolist()), "sources": losses}
    if total[3]:
        figures["bpb"] = float(total[0] / math.log(2) / total[3])
    return figures


def samples(
    model: nn.Module, tokenizer: Tokenizer, prompts: Sequence[str], kind: str, n_tokens: int = 48
) -> list[tuple[str, str]]:
    """(prompt, reply) for each prompt that fits the context; the same draws every time.

    All processes call it; where each has a share of the model, the main one alone gets replies.

    kind: "sft" asks in a dialogue, "pretrain" continues a text
    """
    ids = {
        prompt: tokenizer.render_prompt([{"role": "user", "content": prompt}])
        if kind == "sft"
        else tokenizer.encode(prompt, bos=True)
        for prompt in prompts
    }
    ids = {prompt: tokens for prompt, tokens in ids.items()
           if len(tokens) < model.config.max_seq_len}  # fmt: skip
    if not ids:
        return []
    plain = whole_model(model)
    if plain is None:
        return []
    plain.eval()
    choice = SamplingConfig(max_new_tokens=n_tokens, seed=0)
    with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
        replies = generate(plain, list(ids.values()), choice, tokenizer.eos_id)
    plain.train()
    return [(prompt, tokenizer.decode(reply)) for prompt, reply in zip(ids, replies, strict=True)]


class Window:
    """Sums and time since the last logged step."""

    def __init__(
        self, device: torch.device, mfu_per_rate: float = 0.0, sums: list[float] | None = None
    ) -> None:
        """mfu_per_rate: the share of the device's rate that one token a second uses
        sums: those of steps before the run was stopped"""
        self._device, self._mfu_per_rate = device, mfu_per_rate
        self.sums = torch.tensor(sums or [0.0] * 4, dtype=torch.float64)
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
        rate = self._tokens / max(self.seconds, 1e-9)
        figures = {
            **means(self.sums.tolist()),
            "tokens": tokens_seen,
            "tokens_per_s": rate,
            "mfu": rate * self._mfu_per_rate,
            "mem_gb": memory_gb(self._device),
        }
        self.sums.zero_()
        self.seconds, self._tokens = 0.0, 0.0
        return figures


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
    set_deterministic(world.device, cfg.device.deterministic)
    wrapped = world.wrap(model, config.compile, config.recompute, config.blocks)
    optimizer = make_optimizer(model, optim)
    precision = pick_precision(world.device, cfg.device.precision, cfg.device.force)
    scaler = Scaler(world.device, precision)
    base = _step_of(cfg.base) if optim.from_base else None
    seen = _resume(run, model, tokenizer, optimizer, scaler, data.train.fingerprint, base)
    step, last = seen.step, total_steps(config, data.train)
    log = Log(run, step, last, world.is_main, config.track)
    if step >= last:
        world.on_main(lambda: tidy(run))  # what a kill after the last checkpoint has left
        log.draw()
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

    def make(step: int) -> list[Batch]:
        return data.train.batches(step, config.micro_batch_size, world.rank, world.size)

    coming = ahead(make, range(step, last), world.device)
    with stop_requests() as asked:
        model.train()
        if step == 0:
            validate()
        while step < last:
            lr = lr_at(step, optim, last)
            set_lr(optimizer, lr)
            batches = next(coming)
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
    n_counted = float(sum(count(batch) for batch in batches))
    n_counted = world.sum(torch.full((1,), n_counted, device=world.device)).clamp(min=1)
    losses = []
    for number, batch in enumerate(batches):
        with no_sync(model, is_last=number == len(batches) - 1):
            with scaler.autocast():
                loss = loss_function(model, to_device(batch, world.device))
            # DDP averages gradients over ranks; the sum is wanted.
            scaler.backward(loss.loss_sum * (world.size / n_counted[0]))
        losses.append(Loss(*(part.detach() for part in loss)))
    n_tokens = sum(batch["tokens"].numel() for batch in batches)
    return over_ranks(torch.cat((sums_of(losses), torch.tensor([float(n_tokens)]))), world)


@dataclass
class Seen:
    """How far a run is; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    best: float | None = None  # lowest validation loss of a step
    window: list[float] | None = None  # sums since the last logged step


def _step_of(base: Path | None) -> Path:
    """The checkpoint whose optimizer's state a run begins with.

    raises: ConfigError if no base is named
    """
    if base is None:
        raise ConfigError(
            "optim.from_base wants a base whose optimizer goes on, found none; name it with --base"
        )
    return find_checkpoint(from_repo(base))


def _resume(
    run: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    scaler: Scaler,
    fingerprint: str,
    base: Path | None,
) -> Seen:
    """Continue from the newest checkpoint, where there is one, else begin as `base` ended.

    raises: DataError if the token files are not those the run has read so far
    """
    steps = list_checkpoints(run)
    if not steps and not base:
        return Seen()
    state = load_train_state(steps[-1] if steps else base, model, tokenizer, optimizer)
    swap_averages(model, optimizer)
    if not steps:
        return Seen()
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
        f"{world.device}, {scaler.precision}{getattr(model, 'kernels', '')}",
        f"rows: {sources}; {data.batch_size} a step, {last} steps = "
        f"{last / data.steps_per_epoch:.2f} epochs",
    ]
    if drops:
        lines.append("too long for the context: " + ", ".join(drops))
    return "\n".join(lines)
