"""Output of a run, by its main process only: the figures of its steps, and where they go.

A progress bar or plain lines, metrics.jsonl and samples.jsonl; more where the script hands in a
Watch: curves.png, TensorBoard and the like.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from babyllama.config import BAD_NUMBERS, aloud, atomic_write, shown
from babyllama.errors import DataError


@dataclass(frozen=True)
class Watch:
    """Ways to look at a run from outside; those of analysis/watch.py, or none.

    draw: draws the records of a run into a file, under a title
    track: function that sends each record (kind, step, figures) of a run to a named service
    mfu: share of the devices' rate that one token a second uses, of a model, a World, a format
    """

    draw: Callable[[list[dict], Path, str], object] = lambda *_: None
    track: Callable[[str, Path], Callable[[str, int, dict], object]] = lambda *_: lambda *_: None
    mfu: Callable[..., float] = lambda *_: 0.0


UNWATCHED = Watch()

# Order of the figures in a line; all others stay in metrics.jsonl.
_SHOWN = ("loss", "ppl", "accuracy", "bpb", "grad_norm", "lr", "tokens_per_s", "mfu", "mem_gb")

# Seconds between two drawings of curves.png while a run goes on.
_REDRAW_S = 60


def perplexity(loss_sum: float, n_targets: float) -> float:
    """exp of the mean loss in nats; comparable only within one tokenizer."""
    if n_targets <= 0:
        raise DataError(f"a mean needs at least one target, found {n_targets}; is the set empty?")
    mean = loss_sum / n_targets
    return math.exp(mean) if mean < 700 else math.inf


def means(sums: Sequence[float]) -> dict:
    """Loss, perplexity and accuracy from (loss_sum, n_targets, n_correct, ...)."""
    loss_sum, n_correct = sums[0], sums[2]
    n_targets = max(1.0, sums[1])
    return {
        "loss": loss_sum / n_targets,
        "ppl": perplexity(loss_sum, n_targets),
        "accuracy": n_correct / n_targets,
        "n_targets": int(sums[1]),
    }


class Window:
    """Sums (of loss, targets, hits, tokens) and time since the last logged step."""

    def __init__(self, mfu_per_rate: float = 0.0, sums: list[float] | None = None) -> None:
        """mfu_per_rate: the share of the device's rate that one token a second uses
        sums: those of steps before the run was stopped"""
        self._mfu_per_rate = mfu_per_rate
        self.sums = sums or [0.0] * 4
        self.seconds, self._tokens = 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leave out the time that has passed since the last step (evaluation, saving)."""
        self._clock = time.perf_counter()

    def add(self, sums: Sequence[float]) -> None:
        """One step has ended."""
        self.sums = [old + new for old, new in zip(self.sums, sums, strict=True)]
        self._tokens += sums[3]
        now = time.perf_counter()
        self.seconds += now - self._clock
        self._clock = now

    def figures(self) -> dict:
        """Means since the last call; starts anew."""
        rate = self._tokens / max(self.seconds, 1e-9)
        found = {**means(self.sums), "tokens_per_s": rate, "mfu": rate * self._mfu_per_rate}
        self.sums = [0.0] * 4
        self.seconds, self._tokens = 0.0, 0.0
        return found


class Log:
    """Speaks for a run. With a terminal there is a bar, else a line for each logged step."""

    def __init__(
        self,
        run: Path,
        done_steps: int,
        total_steps: int,
        is_main: bool = True,
        track: str = "none",
        watch: Watch = UNWATCHED,
    ) -> None:
        """done_steps: the run continues there; later lines of metrics.jsonl and samples.jsonl are
        dropped, and all of them where nothing was saved
        track: "none", "tensorboard", "swanlab" or "wandb" """
        self.run, self.is_main, self.total, self._watch = run, is_main, total_steps, watch
        self._start, self._first = time.perf_counter(), done_steps
        self._bar: Any = None  # a tqdm where there is a terminal
        self._drawn = self._start
        self.records = []
        if not is_main:
            return
        self._track = watch.track(track, run)
        for name in ("samples.jsonl", "metrics.jsonl"):
            self.records = read_records(run / name, done_steps) if done_steps else []
            if (run / name).exists() or name == "metrics.jsonl":
                with atomic_write(run / name) as path:
                    path.write_text("".join(map(_line, self.records)), encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = aloud(lambda: tqdm(
                total=total_steps, initial=done_steps, desc=run.name, unit="step", ncols=100
            ))  # fmt: skip

    def say(self, text: str) -> None:
        """One line for the user; where nobody reads it any more, the run goes on in silence."""
        if self.is_main:
            aloud(lambda: tqdm.write(text, file=sys.stderr))

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            aloud(lambda: self._bar.update(step - self._bar.n))

    def record(self, kind: str, step: int, figures: dict) -> None:
        """Keep a record of kind "train" or "val" and show its main figures."""
        if not self.is_main:
            return
        record = {"kind": kind, "step": step, **figures}
        self.records.append(record)
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_line(record))
        self._track(kind, step, figures)
        if kind == "val" and time.perf_counter() - self._drawn > _REDRAW_S:
            self.draw()
            gc.collect()  # a drawing leaves 5 MB in cycles, which Python may keep for long
        shown = {key: figures[key] for key in _SHOWN if key in figures}
        text = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
        if kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            left = f"  left {self._left(step)}" if kind == "train" else ""
            self.say(f"{kind:>5} step {step}/{self.total}  {text}{left}")

    def _left(self, step: int) -> str:
        seconds = (time.perf_counter() - self._start) / max(1, step - self._first)
        return tqdm.format_interval(seconds * (self.total - step))

    def samples(self, step: int, pairs: Sequence[tuple[str, str]]) -> None:
        """Keep what the model made of fixed prompts."""
        if self.is_main and pairs:
            with open(self.run / "samples.jsonl", "a", encoding="utf-8") as file:
                for prompt, reply in pairs:
                    file.write(_line({"step": step, "prompt": prompt, "reply": reply}))
            prompt, reply = pairs[0]
            self.say(f"      {prompt} → {' '.join(reply.split())[:60]}")

    def draw(self) -> None:
        """Redraw curves.png from all records."""
        self._drawn = time.perf_counter()
        if self.is_main and self.records:
            self._watch.draw(self.records, self.run / "curves.png", self.run.name)

    def close(self, code: int, text: str) -> int:
        """Draw the curves, end the bar and say how the run ended; returns the code."""
        self.draw()
        if self._bar is not None:
            aloud(self._bar.close)
        self.say(text)
        return code

    def bad_numbers(self, n: int) -> int:
        """End a run of whose last steps so many had numbers that are not finite."""
        return self.close(
            BAD_NUMBERS,
            f"stopped: {n} steps in a row with numbers that are not finite; try a lower "
            f"--optim.lr; the last checkpoint is intact",
        )

    def finish(self, kind: str, bad_steps: int, val_loss: float, warmup_steps: int) -> int:
        """End a run that has made its last step; returns the exit code.

        kind: pretrain, sft or vqa; val_loss: of the last validation
        bad_steps: the last ones in a row whose numbers were not finite
        """
        if bad_steps > 1:  # one alone is how float16 finds its scale
            return self.bad_numbers(bad_steps)
        place, newest = shown(self.run), f"step-{self.total:06d}"
        if not math.isfinite(val_loss):
            return self.close(
                BAD_NUMBERS,
                f"stopped: the validation loss of {place} ({newest}) is no number; try a lower "
                f"--optim.lr",
            )
        made = f"{place} (checkpoint {newest}, curves.png)"
        why = doubt(self.records, warmup_steps, self.total)
        self.close(0, f"warning: finished, but {why}: {made}" if why else f"done: {made}")
        if kind == "pretrain":
            self.say(f"let it write on: python chat.py {place}")
        if kind == "sft":
            self.say(f"talk to it: python chat.py {place}")
        return 0


def doubt(records: list[dict], warmup_steps: int, last: int) -> str:
    """Doubt whether a finished run has learnt much, and what to change; empty if it has learnt."""
    if warmup_steps >= last:
        return (
            f"its learning rate was rising to the end ({last} steps, {warmup_steps} of warm-up); "
            f"give --optim.warmup_steps {last // 10}, and more --train.epochs"
        )
    for kind in ("train", "val"):
        losses = [record["loss"] for record in records if record["kind"] == kind]
        if len(losses) > 1 and losses[-1] < 0.99 * losses[0]:
            return ""
    return (
        "its loss did not fall; give more --train.epochs, or another --optim.lr (ten times less "
        "where the loss rose, more where it stood still)"
    )


def _line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def read_metrics(run: Path, last_step: int | None = None) -> list[dict]:
    """The figures of a run up to a step."""
    return read_records(run / "metrics.jsonl", last_step)


def read_records(path: Path, last_step: int | None = None) -> list[dict]:
    """The lines of a file up to a step. A line that a kill or a full disk has cut is left out."""
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        try:
            record = json.loads(line)
            if last_step is None or record["step"] <= last_step:
                records.append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return records
