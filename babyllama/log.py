"""Output of a run, by its main process only: the figures of its steps, where they go, and a font
that can write Chinese in its plot.

A progress bar or plain lines, metrics.jsonl, samples.jsonl, curves.png, and, where it is asked
for, TensorBoard or SwanLab.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from tqdm import tqdm

from babyllama.config import BAD_NUMBERS, aloud, atomic_write, shown
from babyllama.errors import ConfigError, DataError
from babyllama.language import catalogue, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    ) -> None:
        """done_steps: the run continues there; later lines of metrics.jsonl and samples.jsonl are
        dropped, and all of them where nothing was saved
        track: "none", "tensorboard", "swanlab" or "wandb" """
        self.run, self.is_main, self.total = run, is_main, total_steps
        self._start, self._first = time.perf_counter(), done_steps
        self._bar: Any = None  # a tqdm where there is a terminal
        self._drawn = self._start
        self.records = []
        if not is_main:
            return
        self._track = open_tracker(track, run)
        for name in ("samples.jsonl", "metrics.jsonl"):
            self.records = read_records(run / name, done_steps) if done_steps else []
            if (run / name).exists() or name == "metrics.jsonl":
                with atomic_write(run / name) as path:
                    path.write_text("".join(map(_line, self.records)), encoding="utf-8")
        if sys.stderr.isatty():
            aloud(self._open_bar)

    def _open_bar(self) -> None:
        name, first = self.run.name, self._first
        self._bar = tqdm(total=self.total, initial=first, desc=name, unit="step", ncols=100)

    def say(self, text: str) -> None:
        """One line for the user; where nobody reads it any more, the run goes on in silence."""
        if self.is_main:
            aloud(lambda: tqdm.write(text, file=sys.stderr))

    def warn(self, text: str) -> None:
        """One line that begins with "warning", if there is something to say."""
        if text:
            self.say(f"warning: {text}")

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
            draw_curves(self.records, self.run / "curves.png", self.run.name)

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


def table(lines: Sequence[Sequence[object]]) -> str:
    """Cells in columns as a terminal shows them, where a Chinese character takes two places.

    The first column is aligned to the left, the others to the right.
    """
    cells = [list(map(str, line)) for line in lines]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    rows = []
    for line in cells:
        space = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        rest = [before + cell for before, cell in zip(space[1:], line[1:], strict=True)]
        rows.append("  ".join([line[0] + space[0], *rest]).rstrip())
    return "\n".join(rows)


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


def open_tracker(name: str, run: Path) -> Callable[[str, int, dict], None]:
    """Function that sends each record (kind, step, figures) to a service beside the files.

    raises: ConfigError if its package is not installed
    """
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(run / "tensorboard"))

            def send(values: dict[str, float], step: int) -> None:
                for key, value in values.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

        elif name == "swanlab":
            import swanlab as service

            service.init(project="babyllama", experiment_name=run.name, logdir=str(run / name))
        elif name == "wandb":
            import wandb as service

            service.init(project="babyllama", name=run.name, dir=str(run))
        else:
            return lambda *_: None
    except ImportError as error:
        raise ConfigError(
            f"train.track {name} wants a package that is not there ({error}); install it: "
            f"pip install -r requirements/track.txt"
        ) from None
    if name != "tensorboard":

        def send(values: dict[str, float], step: int) -> None:
            service.log(values, step=step)

    return lambda kind, step, figures: send(_flat(kind, figures), step)


def _flat(kind: str, figures: dict) -> dict[str, float]:
    """Figures by one name each; those of sources as val/loss/<source>."""
    flat = {f"{kind}/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
    sources = figures.get("sources", {})
    return flat | {f"{kind}/loss/{name}": loss for name, loss in sources.items()}


def _draw_sources(axis: "Axes", records: list[dict], font: str | None) -> None:
    """The validation loss of each source, where there are several."""
    validated = [record for record in records if record["kind"] == "val"]
    names = dict.fromkeys(name for record in validated for name in record.get("sources", {}))
    for name in names if len(names) > 1 else ():
        points = [(r["step"], r["sources"][name]) for r in validated if name in r["sources"]]
        words = f"{label(LABELS['val'], font)}: {writable(Path(name).name, font)}"
        axis.plot(*zip(*points, strict=True), label=words, lw=1, ls="--")


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Loss, perplexity and accuracy over the steps, train and validation, in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    font = plot_font(title, *(name for record in records for name in record.get("sources", {})))
    families = [*([font] if font else []), "DejaVu Sans"]
    with pyplot.rc_context({"font.family": families}), atomic_write(path) as temporary:
        try:
            _draw(records, writable(title, font), font).savefig(temporary, dpi=110)
        finally:
            pyplot.close()


def _draw(records: list[dict], title: str, font: str | None) -> "Figure":
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8))
    # A layout that is worked out takes a quarter of the time of a drawing.
    figure.subplots_adjust(left=0.045, right=0.99, bottom=0.13, top=0.84, wspace=0.17)
    for axis, key in zip(axes, ("loss", "ppl", "accuracy"), strict=True):
        for kind, style in (("train", {"lw": 1, "alpha": 0.7}), ("val", {"lw": 2, "marker": "."})):
            points = [(r["step"], r[key]) for r in records if r["kind"] == kind]
            if points:
                axis.plot(*zip(*points, strict=True), label=label(LABELS[kind], font), **style)
        if key == "loss":
            _draw_sources(axis, records, font)
        axis.set(xlabel=label("training step", font), title=label(LABELS[key], font))
        axis.grid(alpha=0.3)
        if key == "ppl":
            axis.set_yscale("log")
    axes[0].legend()
    figure.suptitle(title)
    return figure


# What curves are called; in the user's language where the plot has a font for it.
LABELS = {"train": "of training", "val": "of validation", "loss": "loss a token",
          "ppl": "perplexity a token", "accuracy": "accuracy of the next token"}  # fmt: skip


def label(text: str, font: str | None) -> str:
    """A label of ours, in the user's language where it can be written."""
    return say(text) if font else text


def plot_font(*names: str) -> str | None:
    """The font of a plot that shows these names: None where all is English."""
    return cjk_font() if catalogue() or not all(map(str.isascii, names)) else None


# Families with simplified Chinese, the more legible ones first; a part of the name is enough.
FONTS = ("Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans", "Microsoft YaHei", "PingFang SC",
         "Hiragino Sans GB", "Heiti SC", "STHeiti", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
         "SimHei", "Noto Sans CJK", "Droid Sans Fallback", "Arial Unicode MS")  # fmt: skip
FONT_FILES = ("notosanscjk", "notosanssc", "sourcehansans", "msyh", "pingfang", "wqy", "simhei")


def cjk_font() -> str | None:
    """The name of an installed font that can write Chinese, or None."""
    from matplotlib import font_manager

    names = {font.name for font in font_manager.fontManager.ttflist if Path(font.fname).is_file()}
    for wanted in FONTS:
        if found := sorted(name for name in names if wanted in name):
            return found[0]
    # matplotlib remembers its list of fonts; one that came later is only on the disk.
    for path in sorted(font_manager.findSystemFonts()):
        if any(part in Path(path).name.lower().replace("-", "") for part in FONT_FILES):
            font_manager.fontManager.addfont(path)
            return font_manager.FontProperties(fname=path).get_name()
    return None


def writable(text: str, font: str | None) -> str:
    """A name of the user's; without a Chinese font its other characters are spelled out."""
    return text if font else text.encode("ascii", "backslashreplace").decode()
