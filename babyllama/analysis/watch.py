"""A run seen from outside: its plot, services that track it, the share of the speed that it uses.

The scripts that train hand WATCH to the loop. MFU (Chowdhery et al. 2022, arXiv:2204.02311,
appendix B) is the share of the device's greatest rate of multiplications that training uses;
recomputed activations do not count as work.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from babyllama.config import atomic_write
from babyllama.distributed import World
from babyllama.language import catalogue, say
from babyllama.log import Watch
from model import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curves(records: list[dict], path: Path, title: str) -> None:
    """Loss, perplexity and accuracy over the steps, train and validation, in one plot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    font = plot_font(title)
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


def plot_font(name: str) -> str | None:
    """The font of a plot of that name: None where all is English."""
    return cjk_font() if catalogue() or not name.isascii() else None


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


def open_tracker(name: str, run: Path) -> Callable[[str, int, dict], None]:
    """Function that sends each record (kind, step, figures) to a service beside the files."""
    if name == "none":
        return lambda *_: None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run / "tensorboard"))
    elif name == "swanlab":
        import swanlab as service

        service.init(project="babyllama", experiment_name=run.name, logdir=str(run / name))
    else:
        import wandb as service

        service.init(project="babyllama", name=run.name, dir=str(run))

    def send(kind: str, step: int, figures: dict) -> None:
        values = _flat(kind, figures)
        if name != "tensorboard":
            service.log(values, step=step)
            return
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return send


def _flat(kind: str, figures: dict) -> dict[str, float]:
    """Figures by one name each; those of sources as val/loss/<source>."""
    flat = {f"{kind}/{k}": v for k, v in figures.items() if isinstance(v, int | float)}
    sources = figures.get("sources", {})
    return flat | {f"{kind}/loss/{name}": loss for name, loss in sources.items()}


# Words behind a name that make another card of it.
_OTHERS = r"(?! (?:Ti|SUPER|D|NVL|PCIe|Laptop|with|Max-Q|Mobile)\b)"


def flops_per_token(model: Transformer) -> int:
    """Operations of a training step for one token: six for each weight of a matrix product, and
    those of causal attention over a full context. The embedding only looks up."""
    config = model.config
    weights = sum(w.numel() for w in model.layers.parameters() if w.dim() == 2)
    weights += model.output.weight.numel()
    return 6 * weights + 6 * config.n_layers * config.dim * config.max_seq_len


def mfu_per_rate(model: Transformer, world: World, precision: str) -> float:
    """The share of all devices' rate that one token a second uses."""
    return flops_per_token(model) / (peak_flops(world.device, precision)[0] * world.size)


def tabulated_peak(card: str, precision: str) -> float:
    """Operations a second of a card as its maker states them; 0 where cards.yaml does not know."""
    known = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text("utf-8"))
    column = ("float32", "float16", "bfloat16").index(precision)
    found = (row for name, row in known.items() if re.search(rf"\b{name}\b{_OTHERS}", card))
    return next((row[column] * 1e12 for row in found), 0.0)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Operations a second that the device can do, and whether that is stated or measured."""
    if device.type == "cuda":
        stated = tabulated_peak(torch.cuda.get_device_name(device), precision)
        if stated:
            return stated, "stated"
    return measured_peak(device, precision), "measured"


def measured_peak(device: torch.device, precision: str) -> float:
    """Operations a second of a square product, the best of three. Random state stays untouched."""
    size = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(size, size, dtype=getattr(torch, precision), device=device)
    best = 0.0
    for _ in range(4):  # the first one warms up
        synchronize(device)
        started = time.perf_counter()
        matrix @ matrix
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # these matrices are not the run's
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


WATCH = Watch(draw_curves, open_tracker, mfu_per_rate)
