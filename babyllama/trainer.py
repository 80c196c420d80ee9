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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from numpy.random import SeedSequence
from torch import Tensor, nn

from babyllama import checkpoint, optim
from babyllama.config import STOPPED, from_repo, shown, stop_requests
from babyllama.data import Data, TrainData, ValData
from babyllama.device import (
    DeviceConfig,
    Scaler,
    ahead,
    for_replies,
    memory_gb,
    open_scaler,
    summed,
    to_device,
)
from babyllama.distributed import ParallelConfig, World, inner, is_shared, no_sync
from babyllama.errors import ConfigError, DataError, require
from babyllama.generate import generate
from babyllama.log import UNWATCHED, Log, Watch, Window, means
from babyllama.optim import OptimConfig
from babyllama.run_dir import find_checkpoint, list_checkpoints
from babyllama.sampling import SamplingConfig
from model import IGNORED, Loss, Transformer
from tokenizer import Tokenizer

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Loss]


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """The language model's own loss."""
    return model(**batch)


def n_targets(batch: Batch) -> Tensor:
    """Number of supervised tokens."""
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


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ValData,
    micro_batch_size: int,
    scaler: Scaler,
    world: World,
    tokenizer: Tokenizer | None = None,
    objective: Objective = Objective(),
) -> dict:
    """Loss, perplexity and accuracy over the validation rows, in all and per source.

    tokenizer: gives bits per byte too, which compares models of different vocabularies
    """
    model = inner(model)
    model.eval()
    total, losses = torch.zeros(4, dtype=torch.float64), {}
    for name in data.names:
        found, n_bytes = [], 0
        for batch in data.batches(name, micro_batch_size, world.rank, world.size):
            if tokenizer is not None and objective.is_of_tokens:
                targets = batch["targets"]
                n_bytes += tokenizer.n_bytes(targets[targets != IGNORED].tolist())
            with scaler.autocast():
                found.append(objective.measure(model, to_device(batch, world.device)))
        sums = summed(found, n_bytes, world)
        losses[name] = float(sums[0] / sums[1].clamp(min=1))
        total += sums
    model.train()
    figures = {**means(total.tolist()), "sources": losses}
    if total[3]:
        figures["bpb"] = float(total[0] / math.log(2) / total[3])
    return figures


def samples(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], kind: str, n_tokens: int = 48
) -> list[tuple[str, str]]:
    """(prompt, reply) for each prompt that fits the context; the same draws every time. None where
    each process has a share of the model.

    kind: "sft" asks in a dialogue, "pretrain" continues a text
    """
    asked = {
        prompt: tokenizer.render_prompt([{"role": "user", "content": prompt}])
        if kind == "sft"
        else tokenizer.encode(prompt, bos=True)
        for prompt in prompts
    }
    asked = {text: ids for text, ids in asked.items() if len(ids) < model.config.max_seq_len}
    if not asked or is_shared(model):
        return []
    model.eval()
    choice = SamplingConfig(max_new_tokens=n_tokens, seed=0)
    with for_replies():
        replies = generate(model, list(asked.values()), choice, tokenizer.eos_id)
    model.train()
    return [(text, tokenizer.decode(reply)) for text, reply in zip(asked, replies, strict=True)]


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
        recompute: activation checkpointing: less memory, a third slower
        blocks: on CUDA cards that can, attend to packed dialogues block by block; else by a mask
        samples: prompts continued or answered at each evaluation, kept in samples.jsonl; none are
            with fsdp2
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
        wanted = {name: ("1 or more", getattr(self, name) >= 1) for name in numbers}
        wanted["seed"] = ("0 or more", self.seed >= 0)
        wanted["max_steps"] = ("0 or more", self.max_steps >= 0)
        has_end = self.max_steps > 0 or 0 < self.epochs < math.inf
        wanted["epochs"] = ("a number above 0, or max_steps", has_end)
        require("train", self, wanted)


def total_steps(config: TrainConfig, data: TrainData) -> int:
    """Number of updates of a run."""
    return config.max_steps or max(1, round(config.epochs * data.steps_per_epoch))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What the settings of all scripts that train have in common.

    Args:
        optim: optimizer and schedule
        train: the loop
        device: where and in which format to compute
        parallel: how several processes share the work
    """

    base: Path | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass
class Seen:
    """Progress of a run; part of its checkpoints."""

    step: int = 0
    tokens: int = 0
    best: float | None = None  # lowest validation loss of a step
    window: list[float] | None = None  # sums since the last logged step


class Run(checkpoint.Snapshot):
    """A run at its beginning or where it was stopped: what trains, on what, how far it is, and
    where that is kept. Arguments as `train`."""

    def __init__(
        self, model: Transformer, data: Data, tokenizer: Tokenizer, cfg: RunConfig, world: World,
        directory: Path, kind: str, objective: Objective, watch: Watch,
    ) -> None:  # fmt: skip
        config = cfg.train
        # torch's random state is part of a checkpoint, so it has to begin somewhere of ours.
        torch.manual_seed(config.seed)
        self.scaler = open_scaler(world.device, cfg.device)
        self.wrapped = world.wrap(model, config.compile, config.recompute)
        super().__init__(
            directory, model, tokenizer, kind, shown(cfg.base) if cfg.base else None,
            optim.make_optimizer(model, cfg.optim), keep=config.keep, world=world,
        )  # fmt: skip
        self.data, self.cfg, self.objective = data, cfg, objective
        self.seen, self.last = self._resumed(), total_steps(config, data.train)
        self.log = Log(directory, self.seen.step, self.last, world.is_main, config.track, watch)
        self.window = Window(watch.mfu(model, world, self.scaler.precision), self.seen.window)
        self.val_loss = 0.0  # of the last validation
        self.bad_steps = 0  # the last ones in a row whose numbers were not finite

    def _resumed(self) -> Seen:
        """Continue from the newest checkpoint, where there is one, else begin as the base ended.

        raises: DataError if the token files are not those the run has read so far, ConfigError if
            a base whose optimizer goes on is not named
        """
        steps, base = list_checkpoints(self.directory), self.cfg.base
        if not steps and not self.cfg.optim.from_base:
            return Seen()
        start = steps[-1] if steps else base and find_checkpoint(from_repo(base))
        if start is None:
            raise ConfigError(
                "optim.from_base wants a base whose optimizer goes on, found none; name it with "
                "--base"
            )
        state = checkpoint.load_train_state(start, self)
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

    def batches_of(self, step: int) -> list[Batch]:
        """This process's share of a step."""
        size, world = self.cfg.train.micro_batch_size, self.world
        return self.data.train.batches(step, size, world.rank, world.size)

    def step(self, batches: list[Batch]) -> None:
        """One update, or none where its numbers are not finite; logged where it is time."""
        config, seen = self.cfg.train, self.seen
        lr = optim.lr_at(seen.step, self.cfg.optim, self.last)
        optim.set_lr(self.optimizer, lr)
        # Dropout belongs to the step, so a resumed run draws what it would have drawn.
        seed = SeedSequence((config.seed, seen.step, self.world.rank)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        sums = forward_backward(self.wrapped, batches, self.world, self.scaler, self.objective)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        most = self.cfg.optim.max_grad_norm
        grad_norm = self.scaler.step(self.optimizer, trained, most, float(sums[0]))
        seen.step += 1
        seen.tokens += int(sums[3])
        if math.isfinite(grad_norm):
            self.bad_steps = 0
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
        figures = evaluate(
            self.wrapped, self.data.val, config.micro_batch_size, self.scaler, self.world,
            self.tokenizer, self.objective,
        )  # fmt: skip
        self.val_loss = figures["loss"]
        self.log.record("val", seen.step, figures)
        self.log.samples(seen.step, samples(self.model, self.tokenizer, config.samples, self.kind))
        if config.keep_best and seen.step and self.val_loss < (seen.best or math.inf):
            seen.best = self.val_loss
            checkpoint.save_checkpoint(self, seen.step, seen.best)
        self.window.restart()

    def save(self) -> None:
        """Write a checkpoint from which the run can go on as if it had not stopped."""
        self.seen.window = self.window.sums
        data = self.data.train.fingerprint
        self.extra = {**asdict(self.seen), "scaler": self.scaler.state(), "data": data}
        checkpoint.save_checkpoint(self, self.seen.step)
        self.window.restart()

    def opening(self) -> str:
        """Parameters, rows and steps of the run, for the log."""
        data, sources, world = self.data.train, self.data.train.mixture.sources, self.world
        how = f"continues at step {self.seen.step}" if self.seen.step else "starts"
        how += f" from {self.parent}" if self.parent else ""
        rows = ", ".join(f"{s.name} {len(s)}" for s in sources)
        drops = [f"{s.name} {why} {n}" for s in sources for why, n in s.dropped.items() if n]
        lines = [
            f"{shown(self.directory)} {how}: {self.model.n_parameters():,} parameters, "
            f"{world.size} process(es) on {world.device}, {self.scaler.precision}"
            f"{getattr(self.model, 'kernels', '')}",
            f"rows: {rows}; {data.batch_size} a step, {self.last} steps = "
            f"{self.last / data.steps_per_epoch:.2f} epochs",
        ]
        return "\n".join(lines + [f"left out or cut: {', '.join(drops)}"] * bool(drops))


def train(
    model: Transformer,
    data: Data,
    tokenizer: Tokenizer,
    cfg: RunConfig,
    world: World,
    directory: Path,
    kind: str,
    objective: Objective = Objective(),
    watch: Watch = UNWATCHED,
) -> int:
    """Train, or go on training, until the last step; returns the exit code.

    model: on its device; continues from the newest checkpoint in `directory` where there is one
    kind: "pretrain" or "sft", kept in the checkpoints
    watch: looks on; draws curves.png
    """
    run = Run(model, data, tokenizer, cfg, world, directory, kind, objective, watch)
    config, seen, last = cfg.train, run.seen, run.last
    if seen.step >= last:  # nothing is left to do but what a kill after the last checkpoint left
        world.on_main(lambda: checkpoint.tidy(directory))
        return run.log.close(
            0, f"{shown(directory)} is finished: {seen.step} of {last} steps; nothing to do"
        )
    world.on_main(lambda: checkpoint.require_space(run))
    run.log.say(run.opening())
    if run.scaler.warning:
        run.log.say(f"warning: {run.scaler.warning}")
    with stop_requests() as asked:
        model.train()
        if seen.step == 0:
            run.validate()
        for batches in ahead(run.batches_of, range(seen.step, last), world.device):
            run.step(batches)
            if run.bad_steps >= config.max_bad_steps:
                return run.log.bad_numbers(run.bad_steps)
            if seen.step % config.eval_every == 0 or seen.step == last:
                run.validate()
            stop = world.any(bool(asked))
            if seen.step % config.save_every == 0 or seen.step == last or stop:
                run.save()
            if stop and seen.step < last:
                said = f"stopped at step {seen.step} of {last}, saved; the same command continues"
                return run.log.close(STOPPED, said)
    return run.log.finish(kind, run.bad_steps, run.val_loss, cfg.optim.warmup_steps)


def forward_backward(
    model: nn.Module,
    batches: list[Batch],
    world: World,
    scaler: Scaler,
    objective: Objective = Objective(),
) -> Tensor:
    """Gradients of one step; returns (loss_sum, n_targets, n_correct, n_tokens), summed over
    ranks, float64."""
    n_counted = float(sum(objective.count(batch) for batch in batches))
    n_counted = world.sum(torch.full((1,), n_counted, device=world.device)).clamp(min=1)
    losses = []
    for number, batch in enumerate(batches):
        with no_sync(model, is_last=number == len(batches) - 1):
            with scaler.autocast():
                loss = objective.loss(model, to_device(batch, world.device))
            # DDP averages gradients over ranks; the sum is wanted.
            scaler.backward(loss.loss_sum * (world.size / n_counted[0]))
        losses.append(Loss(*(part.detach() for part in loss)))
    return summed(losses, sum(batch["tokens"].numel() for batch in batches), world)
