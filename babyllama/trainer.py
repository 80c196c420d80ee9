"""The training loop: one loop for pretraining, fine-tuning and all else.

A step either happens whole or not at all. Its supervised tokens are counted first, over all
micro-batches and ranks; each backward then divides its sum of losses by that count, so the update
is the same for any split into micro-batches and processes. Numbers that are not finite change no
weight. Ctrl-C and SIGTERM end the loop after the running step, with everything saved.

The loop knows an Objective, a loss and what it is divided by, and nothing of its kind: next_token
is the language model's own; another, for pairs of answers: tuning/preference.py.
"""

import math
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
from babyllama.log import Log, Window, means
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
        track: also send the figures to TensorBoard, SwanLab or Weights & Biases
            (requirements/track.txt)
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
    track: Literal["none", "tensorboard", "swanlab", "wandb"] = "none"

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


@dataclass
class Seen:
    """How far a run is; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    best: float | None = None  # lowest validation loss of a step
    window: list[float] | None = None  # sums since the last logged step


@dataclass
class Run:
    """A run at its beginning or where it was stopped: what trains, on what, how far it is, and
    where that is kept. Arguments as `train`."""

    model: Transformer
    data: Data
    tokenizer: Tokenizer
    cfg: RunConfig
    world: World
    directory: Path
    kind: str
    objective: Objective

    def __post_init__(self) -> None:
        config, world = self.cfg.train, self.world
        # torch's random state is part of a checkpoint, so it has to begin somewhere of ours.
        torch.manual_seed(config.seed)
        set_deterministic(world.device, self.cfg.device.deterministic)
        self.wrapped = world.wrap(self.model, config.compile, config.recompute, config.blocks)
        self.optimizer = make_optimizer(self.model, self.cfg.optim)
        device = self.cfg.device
        precision = pick_precision(world.device, device.precision, device.force)
        self.scaler = Scaler(world.device, precision)
        self.parent = shown(self.cfg.base) if self.cfg.base else None
        self.seen, self.last = self._resumed(), total_steps(config, self.data.train)
        self.log = Log(self.directory, self.seen.step, self.last, world.is_main, config.track)
        self.window = Window(mfu_per_rate(self.model, world, precision), self.seen.window)
        self.val_loss = 0.0  # of the last validation
        self.bad_steps = 0  # the last ones in a row whose numbers were not finite

    def _resumed(self) -> Seen:
        """Continue from the newest checkpoint, where there is one, else begin as the base ended.

        raises: DataError if the token files are not those the run has read so far, ConfigError if
            a base whose optimizer goes on is not named
        """
        steps, base = list_checkpoints(self.directory), self.cfg.base
        if self.cfg.optim.from_base and base is None:
            raise ConfigError(
                "optim.from_base wants a base whose optimizer goes on, found none; name it with "
                "--base"
            )
        if not steps and not self.cfg.optim.from_base:
            return Seen()
        start = steps[-1] if steps else find_checkpoint(from_repo(base))
        state = load_train_state(start, self.model, self.tokenizer, self.optimizer)
        swap_averages(self.model, self.optimizer)
        if not steps:
            return Seen()
        found, wanted = self.data.train.fingerprint, state.get("data")
        if wanted not in (None, found):
            place = shown(self.directory)
            raise DataError(
                f"{place} was trained on other token files than are there now (fingerprint "
                f"{wanted[:12]}… then, {found[:12]}… now): a set was made again; set it back, or "
                f"begin a new run from these weights: --name another --base {place}"
            )
        self.scaler.load(state["scaler"])
        return Seen(state["step"], state["tokens"], state.get("best"), state.get("window"))

    def step(self, batches: list[Batch]) -> None:
        """One update, or none where its numbers are not finite; logged where it is time."""
        config, optim, seen = self.cfg.train, self.cfg.optim, self.seen
        lr = lr_at(seen.step, optim, self.last)
        set_lr(self.optimizer, lr)
        # Dropout belongs to the step, so a resumed run draws what it would have drawn.
        seed = SeedSequence((config.seed, seen.step, self.world.rank)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        loss, count = self.objective.loss, self.objective.count
        sums = forward_backward(self.wrapped, batches, self.world, self.scaler, loss, count)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        grad_norm = self.scaler.step(self.optimizer, trained, optim.max_grad_norm, float(sums[0]))
        seen.step += 1
        seen.tokens += int(sums[3])
        if math.isfinite(grad_norm):
            self.bad_steps = 0
            move_averages(self.optimizer)
            self.window.add(sums.tolist())
        else:
            self.bad_steps += 1
            self.log.say(
                f"step {seen.step}: loss {means(sums.tolist())['loss']}, gradient norm "
                f"{grad_norm}; the step changed nothing; its rows: "
                f"{self.data.train.names(seen.step - 1)}"
            )
        self.log.step(seen.step)
        is_time = seen.step % config.log_every == 0 or seen.step == self.last
        if is_time and not self.bad_steps and self.window.sums[1] > 0:
            more = {"tokens": seen.tokens, "mem_gb": memory_gb(self.world.device)}
            figures = {**self.window.figures(), **more, "lr": lr, "grad_norm": grad_norm}
            self.log.record("train", seen.step, figures)

    def validate(self) -> None:
        """Measure, show samples, and keep the weights in best/ where none were better."""
        config, seen = self.cfg.train, self.seen
        of_bytes = self.tokenizer if self.objective.is_of_tokens else None
        with averaged(self.model, self.optimizer):
            figures = evaluate(
                self.wrapped, self.data.val, config.micro_batch_size, self.scaler, self.world,
                of_bytes, self.objective.measure,
            )  # fmt: skip
            self.val_loss = figures["loss"]
            self.log.record("val", seen.step, figures)
            pairs = samples(self.model, self.tokenizer, config.samples, self.kind)
            self.log.samples(seen.step, pairs)
            if config.keep_best and seen.step and figures["loss"] < (seen.best or math.inf):
                seen.best = figures["loss"]
                save_best(
                    self.directory, seen.step, self.model, self.tokenizer, seen.best, self.kind,
                    self.parent, self.world,
                )  # fmt: skip
        self.window.restart()

    def save(self) -> None:
        """Write a checkpoint from which the run can go on as if it had not stopped."""
        seen = self.seen
        seen.window = self.window.sums
        data = self.data.train.fingerprint
        extra = {**asdict(seen), "scaler": self.scaler.state(), "data": data}
        with averaged(self.model, self.optimizer):  # whose state holds the weights that train
            save_checkpoint(
                self.directory, seen.step, self.model, self.tokenizer, self.optimizer, extra,
                self.kind, self.parent, self.cfg.train.keep, self.world,
            )  # fmt: skip
        self.window.restart()

    def end(self, code: int, text: str) -> int:
        """Say how the run ended, draw its curves, and leave with this exit code."""
        self.log.close(text)
        return code


def train(
    model: Transformer,
    data: Data,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    world: World,
    directory: Path,
    kind: str,
    objective: Objective | LossFunction = next_token_loss,
) -> int:
    """Train, or go on training, until the last step; returns the exit code.

    model: on its device; continues from the newest checkpoint in `directory` where there is one
    kind: "pretrain" or "sft", kept in the checkpoints
    objective: a loss function alone is divided by the number of targets
    """
    objective = objective if isinstance(objective, Objective) else Objective(objective)
    run = Run(model, data, tokenizer, cfg, world, directory, kind, objective)
    config, seen, last = cfg.train, run.seen, run.last
    if seen.step >= last:
        return _finished(run)
    world.on_main(lambda: require_space(directory, model, run.optimizer))
    run.log.say(_opening(run))
    run.log.warn(precision_warning(world.device, cfg.device.precision, cfg.device.force))

    def batches_of(step: int) -> list[Batch]:
        return data.train.batches(step, config.micro_batch_size, world.rank, world.size)

    with stop_requests() as asked:
        model.train()
        if seen.step == 0:
            run.validate()
        for batches in ahead(batches_of, range(seen.step, last), world.device):
            run.step(batches)
            if run.bad_steps >= config.max_bad_steps:
                return run.end(BAD_NUMBERS, _bad_numbers(run))
            if seen.step % config.eval_every == 0 or seen.step == last:
                run.validate()
            stop = world.any(bool(asked))
            if seen.step % config.save_every == 0 or seen.step == last or stop:
                run.save()
            if stop and seen.step < last:
                said = f"stopped at step {seen.step} of {last}, saved; the same command continues"
                return run.end(STOPPED, said)
    if run.bad_steps > 1:  # one alone is how float16 finds its scale
        return run.end(BAD_NUMBERS, _bad_numbers(run))
    newest = list_checkpoints(directory)[-1].name
    if not math.isfinite(run.val_loss):
        return run.end(
            BAD_NUMBERS,
            f"stopped: the validation loss of {shown(directory)} ({newest}) is no number; try a "
            f"lower --optim.lr",
        )
    made = f"{shown(directory)} (checkpoint {newest}, curves.png)"
    doubt = _doubt(run.log.records, cfg.optim, last) if world.is_main else ""
    return run.end(0, f"warning: finished, but {doubt}: {made}" if doubt else f"done: {made}")


def _doubt(records: list[dict], optim: OptimConfig, last: int) -> str:
    """Why a finished run may have learnt little, and what to change; empty if it has learnt."""
    if optim.warmup_steps >= last:
        return (
            f"its learning rate was rising to the end ({last} steps, {optim.warmup_steps} of "
            f"warm-up); give --optim.warmup_steps {last // 10}, and more --train.epochs"
        )
    for kind in ("train", "val"):
        losses = [record["loss"] for record in records if record["kind"] == kind]
        if len(losses) > 1 and losses[-1] < 0.99 * losses[0]:
            return ""
    return (
        "its loss did not fall; give more --train.epochs, or another --optim.lr (ten times less "
        "where the loss rose, more where it stood still)"
    )


def _bad_numbers(run: Run) -> str:
    return (
        f"stopped: {run.bad_steps} steps in a row with numbers that are not finite; try a lower "
        f"--optim.lr; the last checkpoint is intact"
    )


def _finished(run: Run) -> int:
    """Nothing is left to do but what a kill after the last checkpoint has left."""
    run.world.on_main(lambda: tidy(run.directory))
    run.log.draw()
    run.log.say(
        f"{shown(run.directory)} is finished: {run.seen.step} of {run.last} steps; nothing to do"
    )
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


def _opening(run: Run) -> str:
    data, step = run.data.train, run.seen.step
    how = f"continues at step {step}" if step else "starts"
    how += f" from {run.parent}" if run.parent else ""
    sources = ", ".join(f"{s.name} {len(s)}" for s in data.mixture.sources)
    drops = [f"{s.name} {reason} {n}" for s in data.mixture.sources
             for reason, n in s.dropped.items() if n]  # fmt: skip
    lines = [
        f"{shown(run.directory)} {how}: {run.model.n_parameters():,} parameters, {run.world.size} "
        f"process(es) on {run.world.device}, {run.scaler.precision}"
        f"{getattr(run.model, 'kernels', '')}",
        f"rows: {sources}; {data.batch_size} a step, {run.last} steps = "
        f"{run.last / data.steps_per_epoch:.2f} epochs",
    ]
    if drops:
        lines.append("left out or cut: " + ", ".join(drops))
    return "\n".join(lines)
