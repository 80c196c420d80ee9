"""What a run tells: a progress bar or plain lines, metrics.jsonl, curves.png. Main process only."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

# Order of the figures in a line; all others stay in metrics.jsonl.
_SHOWN = ("loss", "ppl", "accuracy", "lr", "tokens_per_s", "mem_gb")


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path; what is written there takes the place of `path` if the block succeeds."""
    temporary = path.with_name("tmp-" + path.name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Log:
    """Speaks for a run. With a terminal there is a bar, else a line for each logged step."""

    def __init__(self, run: Path, done_steps: int, total_steps: int, is_main: bool = True) -> None:
        """done_steps: the run continues there; later lines of metrics.jsonl are dropped, and
        all of them where nothing was saved."""
        self.run, self.is_main, self.total = run, is_main, total_steps
        self._start, self._first = time.perf_counter(), done_steps
        self._bar = None
        if not is_main:
            return
        self.records = read_metrics(run, done_steps) if done_steps else []
        with written_whole(run / "metrics.jsonl") as path:
            path.write_text("".join(map(_line, self.records)), encoding="utf-8")
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps, initial=done_steps, desc=run.name, unit="step", ncols=100
            )

    def say(self, text: str) -> None:
        """One line for the user."""
        if self.is_main:
            tqdm.write(text, file=sys.stderr)

    def step(self, step: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def record(self, kind: str, step: int, figures: dict) -> None:
        """Keep a record of kind "train" or "val" and show its main figures."""
        if not self.is_main:
            return
        record = {"kind": kind, "step": step, **figures}
        self.records.append(record)
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(_line(record))
        shown = {key: figures[key] for key in _SHOWN if key in figures}
        text = "  ".join(f"{key} {_short(value)}" for key, value in shown.items())
        if kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
        else:
            left = f"  left {self._left(step)}" if kind == "train" else ""
            self.say(f"{kind:>5} step {step}/{self.total}  {text}{left}")

    def _left(self, step: int) -> str:
        seconds = (time.perf_counter() - self._start) / max(1, step - self._first)
        minutes, seconds = divmod(int(seconds * (self.total - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    def draw(self) -> None:
        """Redraw curves.png from all records."""
        if self.is_main and self.records:
            draw_curves(self.records, self.run / "curves.png", self.run.name)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _line(record: dict) -> str:
    return json.dumps(record) + "\n"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def read_metrics(run: Path, last_step: int | None = None) -> list[dict]:
    """The records of a run up to a step. A line cut by a kill is left out."""
    path = run / "metrics.jsonl"
    records = []
    for line in path.read_text("utf-8").split("\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Loss, perplexity and accuracy over the steps, train and validation, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    for axis, key in zip(axes, ("loss", "ppl", "accuracy"), strict=True):
        for kind, style in (("train", {"lw": 1, "alpha": 0.7}), ("val", {"lw": 2, "marker": "."})):
            points = [(r["step"], r[key]) for r in records if r["kind"] == kind]
            if points:
                axis.plot(*zip(*points, strict=True), label=kind, **style)
        axis.set(xlabel="step", title={"ppl": "perplexity"}.get(key, key))
        axis.grid(alpha=0.3)
        if key == "ppl":
            axis.set_yscale("log")
    axes[0].legend()
    figure.suptitle(title)
    try:
        with written_whole(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot.close(figure)
