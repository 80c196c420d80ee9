"""Everything that a card can show in eight minutes, or in four.

    python -m benchmarks.card                              eight minutes, from the repository
    python -m benchmarks.card --short true                 four
    python -m benchmarks.card --parts train,decode         some parts alone
    python -m benchmarks.card --device cpu --tiny true     a rehearsal with tiny shapes, no card

Parts run one after the other in a worker process, each within a time limit of its own: one that
hangs or dies costs its worker and nothing else. The figures are written after every part, so the
script may be stopped at any moment. Last come a table and one JSON line, which is also in
out/card.json; docs/cards.md tells what the figures mean and where they are collected.
"""

import contextlib
import gc
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from babyllama.analysis.estimate import available_gb, largest_batch, memory_by_part
from babyllama.analysis.watch import mfu_per_rate, synchronize
from babyllama.checkpoint import load_model, load_weights, model_weights
from babyllama.config import REPO, atomic_write, from_repo, parse, run, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.cpu.fused import fuse
from babyllama.data import collate, open_data, pack
from babyllama.decoder import plain_decoder
from babyllama.device import (
    DeviceConfig,
    Scaler,
    memory_gb,
    open_scaler,
    pick_device,
    set_deterministic,
)
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.generate import generate
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.sampling import SamplingConfig
from babyllama.sources import DataConfig, SourceConfig
from babyllama.token_file import TokenFileWriter
from babyllama.trainer import RunConfig, TrainConfig, forward_backward, train
from bench.report import commit
from benchmarks.peers import SHAPE_43M, hf_model, usual_step
from model import IGNORED, ModelConfig, Transformer
from tokenizer import Tokenizer

TINY = ModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=32, max_seq_len=64, vocab_size=97)
START_S = 60  # of a worker: imports, and the card's context


@dataclass(frozen=True)
class CardConfig:
    """Settings of the measurements.

    Args:
        device: auto takes cuda, else mps, else cpu
        short: four minutes in place of eight
        tiny: shapes and times of a rehearsal
        parts: only these, by name, with commas; empty: all
        out: file of the figures
    """

    device: str = "auto"
    short: bool = False
    tiny: bool = False
    parts: str = ""
    out: Path = Path("out/card.json")

    def __post_init__(self) -> None:
        unknown = [name for name in self.chosen if name not in PARTS]
        if unknown:
            raise ConfigError(f"parts {unknown}: wanted some of {', '.join(PARTS)}")

    @property
    def chosen(self) -> list[str]:
        return [name.strip() for name in self.parts.split(",")] if self.parts else list(PARTS)


class Lab:
    """What all parts share: the device, the shape, the formats, and how long to measure.

    tell: gets what is known of the running part, in case that it takes too long
    """

    def __init__(self, cfg: CardConfig, tell: Callable[[dict], object] = dict) -> None:
        self.tell, self.device, self.tiny = tell, pick_device(cfg.device), cfg.tiny
        self.world = World(0, 1, self.device)
        self.is_card = self.device.type == "cuda"
        self.shape = TINY if cfg.tiny else SHAPE_43M
        self.seconds = 0.2 if cfg.tiny else 3.0 if cfg.short else 6.0
        self.best = open_scaler(self.device, DeviceConfig()).precision
        narrow = {"bfloat16": ["bfloat16", "float16"], "float16": ["float16"]}
        self.formats = [*narrow.get(self.best, []), "float32"] if self.is_card else [self.best]
        self.rows = 2 if cfg.tiny else max(1, min(32, self.largest("float32") // 2))

    def largest(self, precision: str) -> int:
        """Number of sequences that fit at a time, by the estimate."""
        one, two = (self.computed(n, precision) for n in (1, 2))
        return largest_batch(one, two, available_gb(self.device))

    def computed(self, rows: int, precision: str) -> dict[str, float]:
        n = self.shape.n_parameters
        return memory_by_part(self.shape, n, rows, precision, is_card=self.is_card)

    def windows(self, rows: int, length: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """A batch of random windows."""
        shape = (rows, (length or self.shape.max_seq_len) + 1)
        draw = np.random.default_rng(seed).integers(3, self.shape.vocab_size, shape)
        return collate([[(ids[:-1], ids[1:])] for ids in draw], 0)

    def dialogues(self, rows: int, length: int = 0, seed: int = 0) -> dict[str, Tensor]:
        """A batch of random packed dialogues, two thirds of whose tokens are targets."""
        rng, made = np.random.default_rng(seed), []
        longest = length or self.shape.max_seq_len
        for _ in range(rows * 4):
            ids = rng.integers(3, self.shape.vocab_size, int(rng.integers(longest // 8, longest)))
            targets = np.where(np.arange(len(ids)) < len(ids) // 3, IGNORED, np.roll(ids, -1))
            made.append((ids, targets))
        return collate(pack(made, longest)[:rows], 0)

    def model(self, device: torch.device | None = None, **changes: Any) -> Transformer:
        torch.manual_seed(0)
        return Transformer(replace(self.shape, **changes)).to(device or self.device)

    def settled(self) -> None:
        """Forget what the part before left on the card."""
        gc.collect()
        if self.is_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def rate(self, work: Callable[[], object], amount: float, seconds: float = 0.0) -> float:
        """Rate of an amount a second, over calls for some seconds after two that warm up."""
        for _ in range(2):
            work()
        synchronize(self.device)
        n, started = 0, time.perf_counter()
        while time.perf_counter() - started < (seconds or self.seconds):
            work()
            synchronize(self.device)
            n += 1
        return n * amount / (time.perf_counter() - started)


def wrap(world: World, model: nn.Module, blocks: bool = True, **how: bool) -> nn.Module:
    """The model as scripts prepare it and the trainer wraps it."""
    fuse(getattr(model, "language", model), blocks)
    return world.wrap(model, **how)


def stepper(
    lab: Lab,
    precision: str,
    model: nn.Module | None = None,
    **how: bool,
) -> Callable[[list[dict[str, Tensor]]], tuple[Tensor, float]]:
    """A function that makes one step of training, as the trainer does, and returns its sums and
    the gradient's norm."""
    model = lab.model() if model is None else model
    wrapped = wrap(lab.world, model, **how)
    optimizer, scaler = make_optimizer(model, OptimConfig()), Scaler(lab.device, precision)
    parameters = [w for w in model.parameters() if w.requires_grad]

    def step(batches: list[dict[str, Tensor]]) -> tuple[Tensor, float]:
        sums = forward_backward(wrapped, batches, lab.world, scaler)
        return sums, scaler.step(optimizer, parameters, 1.0, float(sums[0]))

    return step


# The parts. Each returns its figures as a dict of numbers and short texts.


def machine(lab: Lab) -> dict:
    """What is measured on, and what torch can do here."""
    found = {
        "device": str(lab.device), "format": lab.best, "torch": torch.__version__,
        "python": platform.python_version(), "system": f"{platform.system()} {platform.release()}",
        "compiler": any(map(shutil.which, ("gcc", "cc", "clang"))),
        "memory_gb": available_gb(lab.device),
    }  # fmt: skip
    if lab.is_card:
        found |= {
            "card": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "kernels": " ".join(torch.cuda.get_arch_list()),
            "total_gb": torch.cuda.mem_get_info()[1] / 1e9,
        }  # fmt: skip
    return found


def correct(lab: Lab) -> dict:
    """Losses and gradients against the processor's in float32: relative differences."""
    rows, length = 2, min(256, lab.shape.max_seq_len)
    plain, packed = lab.windows(rows, length), lab.dialogues(rows, length)
    cases: dict[str, Any] = {
        "windows": (plain, {}),
        "mask": (packed, {"blocks": False}), "blocks": (packed, {"blocks": True}),
        "grouped": (packed, {"blocks": False, "n_kv_heads": lab.shape.n_heads // 2}),
        "adapter": (plain, {"lora": True}),
    }  # fmt: skip
    found: dict[str, Any] = {}
    for name, (batch, how) in cases.items():
        wanted = gradients(lab, torch.device("cpu"), "float32", batch, **how)
        for precision in lab.formats:
            loss, grads = gradients(lab, lab.device, precision, batch, **how)
            gap = sum(float((a - b).square().sum()) for a, b in zip(grads, wanted[1], strict=True))
            size = sum(float(b.square().sum()) for b in wanted[1])
            found[f"{name} {precision}"] = {
                "loss": abs(loss / wanted[0] - 1), "gradients": math.sqrt(gap / size),
            }  # fmt: skip
    bounds = {"float32": 1e-4}
    found["passed"] = all(
        figures["loss"] <= bounds.get(name.split()[1], 1e-2)
        and figures["gradients"] <= 50 * bounds.get(name.split()[1], 1e-3)
        for name, figures in found.items()
    )
    return found


def gradients(
    lab: Lab, device: torch.device, precision: str, batch: dict[str, Tensor],
    blocks: bool = True, n_kv_heads: int | None = None, lora: bool = False,
) -> tuple[float, list[Tensor]]:  # fmt: skip
    """The loss and the gradients of one batch, on the processor."""
    model = lab.model(torch.device("cpu"), n_kv_heads=n_kv_heads)
    if lora:
        apply_lora(model, LoraConfig(rank=4), base="")
    model.to(device)
    world, scaler = World(0, 1, device), Scaler(device, precision)
    sums = forward_backward(wrap(world, model, blocks), [batch], world, scaler)
    parameters = [w for w in model.parameters() if w.requires_grad]
    unscale = scaler.state().get("scale", 1.0)
    return float(sums[0]), [w.grad.cpu().float() / unscale for w in parameters]


def training(lab: Lab) -> dict:
    """Tokens a second, MFU and memory of the 43M shape in each format and way."""
    ways: dict[str, Any] = {name: (name, {}) for name in lab.formats}
    ways[f"{lab.best} recompute"] = (lab.best, {"recompute": True})
    if not lab.tiny:  # a compiler takes its minute whatever the shape
        ways[f"{lab.best} compile"] = (lab.best, {"compiled": True})
    found: dict[str, Any] = {"rows": lab.rows}
    batches = [lab.windows(lab.rows, seed=n) for n in range(2)]
    tokens = sum(batch["tokens"].numel() for batch in batches)
    for name, (precision, how) in ways.items():
        lab.settled()
        try:
            model = lab.model()
            step = stepper(lab, precision, model, **how)
            rate = lab.rate(partial(step, batches), tokens)
        except ConfigError as error:
            found[name] = str(error)
            continue
        computed = lab.computed(lab.rows, precision)
        found[name] = {
            "tokens_per_s": rate, "mfu": rate * mfu_per_rate(model, lab.world, precision),
            "peak_gb": memory_gb(lab.device), "computed_gb": sum(computed.values()),
        }  # fmt: skip
        lab.tell(found)
        del model, step
    return found


def peer(lab: Lab) -> dict:
    """The usual loop round transformers' model of the same shape, plain and compiled."""
    if lab.best == "float16":
        return {"note": "no bfloat16 here to compare in"}
    rows = max(1, lab.rows // 4)  # its logits exist whole: 2 to 3 GB at 8 x 512
    ids = lab.windows(rows)["tokens"].to(lab.device)
    found: dict[str, Any] = {"rows": rows}
    for name in ("plain",) if lab.tiny else ("plain", "compiled"):
        lab.settled()
        step = usual_step(
            hf_model(lab.shape).to(lab.device), ids, lab.best, compiled=name == "compiled"
        )
        rate = lab.rate(step, ids.numel())
        found[name] = {"tokens_per_s": rate, "peak_gb": memory_gb(lab.device)}
        lab.tell(found)
    return found


def profile(lab: Lab) -> dict:
    """Where a step's time goes: the head, waiting for the processor, and how often it waits."""
    batches = [lab.windows(lab.rows, seed=n) for n in range(4)]
    step = stepper(lab, lab.best)
    tokens = sum(batch["tokens"].numel() for batch in batches)
    found: dict[str, Any] = {"step_ms": 1e3 * tokens / lab.rate(lambda: step(batches), tokens)}
    model = fuse(lab.model())
    hidden = torch.randn(lab.rows, lab.shape.max_seq_len, lab.shape.dim, device=lab.device)
    targets = batches[0]["targets"].to(lab.device)
    scaler = Scaler(lab.device, lab.best)
    model.hidden = lambda tokens, **_: hidden.requires_grad_(True)

    def head() -> None:
        with scaler.autocast():
            loss = model(targets, targets)
        loss.loss_sum.backward()

    found["head_ms"] = 1e3 * len(batches) / lab.rate(head, 1)
    if not lab.is_card:
        return found
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as record:
        step(batches)
        synchronize(lab.device)
    events = record.key_averages()
    busy = sum(e.self_device_time_total for e in events if e.device_type.name == "CUDA") / 1e3
    waits = {e.key: e.count for e in events if "Synchronize" in e.key}
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    return found | {"busy_ms": busy, "waits": waits, "launches": launches}


def packed(lab: Lab) -> dict:
    """Packed dialogues by blocks and by a mask: the losses, the speed, and the compiled graphs."""
    from torch._dynamo.utils import counters

    longest, half = lab.shape.max_seq_len, max(1, lab.rows // 2)
    lengths = (longest, longest * 3 // 4, longest // 2)
    kinds = [(rows, length) for rows in (lab.rows, half, 1) for length in lengths]
    batches = [lab.dialogues(rows, length, n) for n, (rows, length) in enumerate(kinds)]
    found: dict[str, Any] = {}
    losses = {}
    for name, blocks in (("mask", False), ("blocks", True)):
        lab.settled()
        counters.clear()
        model = lab.model()
        step = stepper(lab, lab.best, model, blocks=blocks)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            sums = [step([batch])[0] for batch in batches]
            losses[name] = sum(float(s[0]) for s in sums) / sum(float(s[1]) for s in sums)
            rate = lab.rate(partial(step, batches[:1]), batches[0]["tokens"].numel())
        found[name] = {"tokens_per_s": rate, "peak_gb": memory_gb(lab.device),
                       "graphs": counters["stats"]["unique_graphs"]}  # fmt: skip
        lab.tell(found)
    found["loss_gap"] = abs(losses["blocks"] / losses["mask"] - 1)
    found["passed"] = found["loss_gap"] < 1e-2
    return found


def overflow(lab: Lab) -> dict:
    """float16 whose scale is too large skips steps until it fits; NaN changes no weight."""
    model = lab.model()
    wrapped = wrap(lab.world, model)
    scaler, optimizer = Scaler(lab.device, "float16"), make_optimizer(model, OptimConfig())
    scaler.load({"scale": 2.0**30, "good_steps": 0})
    batch, parameters, losses, skipped = lab.windows(2), list(model.parameters()), [], 0
    for _ in range(25):
        sums = forward_backward(wrapped, [batch], lab.world, scaler)
        losses.append(float(sums[0] / sums[1]))
        skipped += not math.isfinite(scaler.step(optimizer, parameters, 1.0, losses[-1]))
    before = [w.detach().clone() for w in parameters]
    forward_backward(wrapped, [batch], lab.world, scaler)
    parameters[0].grad.fill_(math.nan)
    scaler.step(optimizer, parameters, 1.0, math.nan)
    is_same = all(map(torch.equal, before, parameters))
    found = {"skipped": skipped, "scale": scaler.state()["scale"], "first": losses[0],
             "last": losses[-1], "nan_changes_nothing": is_same}  # fmt: skip
    return found | {"passed": losses[-1] < losses[0] and is_same}


def resumed(lab: Lab) -> dict:
    """A run of six steps beside one that stopped after three and went on: the weights' largest
    difference, with and without device.deterministic."""
    found: dict[str, Any] = {}
    for name in ("default", "deterministic") if lab.is_card else ("default",):
        device = DeviceConfig(deterministic=name == "deterministic")
        with tempfile.TemporaryDirectory() as place:
            found[name] = _resumed(lab, Path(place), device)
    set_deterministic(lab.device, False)
    return found | {"passed": found.get("deterministic", found["default"]) == 0}


def _resumed(lab: Lab, place: Path, device: DeviceConfig) -> float:
    tokenizer = Tokenizer(REPO / "release/tokenizer.model")
    rng = np.random.default_rng(0)
    for split, n in (("train", 60), ("val", 2)):
        with TokenFileWriter(place / f"text/{split}-00000", "text", tokenizer) as file:
            for _ in range(n):
                file.add_text(rng.integers(3, tokenizer.vocab_size, 4 * lab.shape.max_seq_len))
    loop = TrainConfig(max_steps=6, batch_size=8, micro_batch_size=4, eval_every=6, save_every=3,
                       keep=9, keep_best=False)  # fmt: skip
    cfg = RunConfig(train=loop, device=device, optim=OptimConfig(warmup_steps=2))
    sources = DataConfig(sources=(SourceConfig(str(place / "text")),))
    data = open_data(sources, tokenizer, lab.shape.max_seq_len, loop)
    weights = []
    for name in ("whole", "again"):
        (place / name).mkdir()
        if weights:
            shutil.copytree(place / "whole/step-000003", place / "again/step-000003")
        model = fuse(lab.model(vocab_size=tokenizer.vocab_size))
        train(model, data, tokenizer, cfg, lab.world, place / name, "pretrain")
        weights.append([w.detach().cpu() for w in model.parameters()])
    return max(float((a - b).abs().max()) for a, b in zip(*weights, strict=True))


def decoding(lab: Lab) -> dict:
    """Greedy replies of the release beside the processor's; tokens a second of the 43M shape."""
    cpu, greedy = load_model(REPO / "release"), SamplingConfig(temperature=0, max_new_tokens=32)
    asked = ["你好", "今天天气怎么样？", "你是谁？", "给我讲个故事。", "北京在哪里？", "谢谢你。"]
    prompts = [cpu.tokenizer.render_prompt([{"role": "user", "content": text}]) for text in asked]
    wanted = generate(plain_decoder(cpu.model), prompts, greedy, cpu.tokenizer.eos_id)
    model = load_model(REPO / "release", lab.device).model
    found: dict[str, Any] = {"prompts": len(prompts)}
    for weights in ("float32", "auto"):
        replies = generate(make_decoder(model, weights), prompts, greedy, cpu.tokenizer.eos_id)
        found[f"same as the processor's, {weights}"] = sum(map(list.__eq__, replies, wanted))
    found["passed"] = found["same as the processor's, float32"] == len(prompts)
    model, n_new = lab.model().eval(), min(128, lab.shape.max_seq_len // 2)
    drawn = SamplingConfig(max_new_tokens=n_new, seed=0)
    decoders = {"plain": plain_decoder(model)}
    decoders |= {weights: make_decoder(model, weights) for weights in ("float32", "auto")}
    for name, decoder in decoders.items():
        for n in (1, 16):
            ids = lab.windows(n, n_new // 2)["tokens"].tolist()
            rate = lab.rate(partial(generate, decoder, ids, drawn, eos_id=-1), n * n_new)
            found[f"{name} x {n}"] = {"tokens_per_s": rate, "kind": decoder.kind}
        lab.tell(found)
    return found


def largest(lab: Lab) -> dict:
    """The largest batch by the estimate fits, and one of twice the size does not."""
    if not lab.is_card:
        return {"note": "asked of cards alone: a processor's memory is everybody's"}
    n = lab.largest(lab.best)
    found: dict[str, Any] = {"sequences": n, "available_gb": available_gb(lab.device)}
    for name, rows in (("largest", n), ("twice", 2 * n)):
        lab.settled()
        try:
            stepper(lab, lab.best)([lab.windows(rows)])
            found[name] = {"fits": True, "peak_gb": memory_gb(lab.device)}
        except torch.OutOfMemoryError as error:
            found[name] = {"fits": False, "said": str(error).split(". ")[0]}
    return found | {"passed": found["largest"]["fits"] and not found["twice"]["fits"]}


def optimizers(lab: Lab) -> dict:
    """Ten steps with AdamW and Muon: how long an update takes, and the loss on the processor."""
    found: dict[str, Any] = {}
    batch = lab.windows(2, min(128, lab.shape.max_seq_len))
    for name in ("adamw", "muon"):
        optim, losses = OptimConfig(name=name), {}
        for where in dict.fromkeys((lab.device, torch.device("cpu"))):
            world, scaler = World(0, 1, where), Scaler(where, "float32")
            model = lab.model(where)
            optimizer, parameters = make_optimizer(model, optim), list(model.parameters())
            for _ in range(3 if where.type == "cpu" else 10):
                sums = forward_backward(model, [batch], world, scaler)
                losses.setdefault(where.type, []).append(float(sums[0] / sums[1]))
                synchronize(where)
                started = time.perf_counter()
                scaler.step(optimizer, parameters, 1.0, losses[where.type][-1])
                synchronize(where)
                if where == lab.device:
                    found[f"{name}_ms"] = 1e3 * (time.perf_counter() - started)
        pairs = zip(losses[lab.device.type], losses["cpu"], strict=False)
        found[f"{name}_loss_gap"] = max(abs(a / b - 1) for a, b in pairs)
    return found | {"passed": max(found["adamw_loss_gap"], found["muon_loss_gap"]) < 1e-2}


def engines(lab: Lab) -> dict:
    """DDP and FSDP2 by themselves in a group of one: three steps each, from weights that were put
    together as for a checkpoint, and the losses of none."""
    import torch.distributed as dist

    batch, losses = lab.windows(2), {}
    for name in ("none", "ddp", "fsdp2"):
        model = lab.model()
        with tempfile.TemporaryDirectory() as place:
            if name != "none":
                backend = "nccl" if lab.is_card else "gloo"
                at = torch.device("cuda", 0) if lab.is_card else None
                dist.init_process_group(backend, f"file://{place}/store", rank=0, world_size=1,
                                        device_id=at)  # fmt: skip
            try:
                world = World(0, 1, lab.device, name)
                wrapped = model if name == "none" else world.distribute(model)
                optimizer = make_optimizer(model, OptimConfig())
                scaler = Scaler(lab.device, "float32")
                for _ in range(3):
                    load_weights(model, model_weights(model), Path(name))
                    sums = forward_backward(wrapped, [batch], world, scaler)
                    scaler.step(optimizer, list(model.parameters()), 1.0, float(sums[0]))
                losses[name] = float(sums[0] / sums[1])
            finally:
                del wrapped
                gc.collect()
                if name != "none":
                    dist.destroy_process_group()
    gap = max(abs(losses[name] / losses["none"] - 1) for name in ("ddp", "fsdp2"))
    return {"loss_gap": gap, "passed": gap < 1e-4}


def images(lab: Lab) -> dict:
    """The encoder's features beside the processor's, and steps a second of a model that sees."""
    from vqa.encoders import EncoderConfig, make_encoder
    from vqa.model import FusionConfig, VqaModel, with_image

    config = EncoderConfig(size=64 if lab.tiny else 224, grid=2)
    model = VqaModel(lab.model(torch.device("cpu")), make_encoder(config), FusionConfig())
    model.freeze(("encoder",))
    rows = 2 if lab.tiny else 16
    draw = np.random.default_rng(0)
    pixels = torch.from_numpy(
        draw.integers(0, 256, (rows, 1, 3, config.size, config.size), dtype=np.uint8)
    )
    with torch.no_grad():
        wanted = model.see(pixels)
        found = model.to(lab.device).see(pixels.to(lab.device)).cpu()
    gap = float((found - wanted).norm() / wanted.norm())
    sequences = []
    for _ in range(rows):
        text = draw.integers(3, lab.shape.vocab_size, 20).tolist()
        ids = np.array(with_image(text, len(sequences), model.n_positions))
        is_text = np.arange(1, len(ids) + 1) > model.n_positions
        targets = np.where(is_text, np.roll(ids, -1), IGNORED)
        sequences.append([(ids[:-1], targets[:-1])])
    batch = collate(sequences, 0) | {"image_of": torch.arange(rows), "pixels": pixels}
    step = stepper(lab, lab.best, model)
    return {"features_gap": gap, "images_per_s": lab.rate(lambda: step([batch]), rows),
            "passed": gap < 1e-2}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part and its time limits in seconds, of the long and of the short script."""

    act: Callable[[Lab], dict]
    full: int
    short: int


PARTS = {
    "machine": Part(machine, 15, 15), "correct": Part(correct, 60, 45),
    "train": Part(training, 110, 55), "decode": Part(decoding, 50, 30),
    "packed": Part(packed, 60, 40), "profile": Part(profile, 25, 15),
    "resume": Part(resumed, 40, 20), "float16": Part(overflow, 20, 10),
    "largest": Part(largest, 20, 10), "optimizers": Part(optimizers, 20, 10),
    "images": Part(images, 20, 10), "engines": Part(engines, 20, 10),
    "peer": Part(peer, 90, 45),
}  # fmt: skip


# The worker, and who watches it.


def work(cfg: CardConfig, parts: list[str], told: Connection) -> None:
    """Run the parts in this process, and tell (figures, whether the part has ended)."""
    if os.name == "posix":
        os.setsid()  # what it starts can be ended with it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a run's own log
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS is not deterministic
    try:
        lab = Lab(cfg, lambda figures: told.send((figures, False)))
        for name in parts:
            lab.settled()
            started = time.perf_counter()
            figures = PARTS[name].act(lab)
            told.send((figures | {"seconds": time.perf_counter() - started}, True))
    except Exception as error:  # for whoever watches: this process ends with it
        told.send(({"fault": f"{type(error).__name__}: {str(error)[:300]}"}, True))
        raise


class Worker:
    """A process that runs some parts, and tells what it finds."""

    def __init__(self, cfg: CardConfig, parts: list[str]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._told, tell = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=work, args=(cfg, parts, tell))
        self._process.start()
        tell.close()

    def figures(self, limit_s: float) -> dict:
        """The figures of the next part; with a `fault` where it took too long or died."""
        known, is_done, until = {}, False, time.monotonic() + limit_s
        while not is_done and self._told.poll(max(0.01, until - time.monotonic())):
            try:
                figures, is_done = self._told.recv()
            except EOFError:
                self._process.join()
                return known | {"fault": f"the worker died: exit code {self._process.exitcode}"}
            known = known | figures
        return known if is_done else known | {"fault": f"not finished after {limit_s:.0f} s"}

    def stop(self) -> None:
        if os.name == "posix" and self._process.pid and self._process.is_alive():
            with contextlib.suppress(ProcessLookupError):  # not yet at the head of its group
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._told.close()


def measured(cfg: CardConfig) -> Iterator[tuple[str, dict]]:
    """The figures of one part after the other, within the time of the whole script."""
    left = cfg.chosen
    ends = time.monotonic() + (240 if cfg.short else 480)
    worker, fresh = None, True
    try:
        while left:
            name = left[0]
            if worker is None:
                worker, fresh = Worker(cfg, left), True
            part = PARTS[left.pop(0)]
            limit = (part.short if cfg.short else part.full) + fresh * START_S
            figures = worker.figures(min(limit, ends - time.monotonic()))
            yield name, figures
            fresh = False
            if "fault" in figures:
                worker.stop()
                worker = None
                if time.monotonic() > ends - 5:
                    yield from ((name, {"fault": "not run: the time is over"}) for name in left)
                    return
    finally:
        if worker is not None:
            worker.stop()


def lines_of(name: str, figures: dict) -> list[str]:
    """A part as lines of the table."""
    plain = {key: value for key, value in figures.items() if not isinstance(value, dict)}
    parts = [("", plain)] if plain else []
    parts += [(key, value) for key, value in figures.items() if isinstance(value, dict)]
    return [
        f"{name if not number else '':<11} {key:<28} "
        + "  ".join(f"{what} {_number(value)}" for what, value in cells.items())
        for number, (key, cells) in enumerate(parts)
    ]


def _number(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(cfg: CardConfig) -> int:
    """Measure, print, write; the exit code is 1 where a part failed."""
    found: dict[str, object] = {"commit": commit(), "short": cfg.short, "tiny": cfg.tiny}
    out = from_repo(cfg.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name, figures in measured(cfg):
            found[name] = figures
            print("\n".join(lines_of(name, figures)), flush=True)
            with atomic_write(out) as path:
                path.write_text(json.dumps(found) + "\n", "utf-8")
    except KeyboardInterrupt:
        print(f"stopped; what was measured is in {shown(out)}", file=sys.stderr)
    print(json.dumps(found))
    bad = [name for name, figures in found.items() if isinstance(figures, dict)
           and ("fault" in figures or figures.get("passed") is False)]  # fmt: skip
    print(f"failed: {', '.join(bad)}" if bad else f"all passed; {shown(out)}", file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    run(main, parse(CardConfig, __doc__))
