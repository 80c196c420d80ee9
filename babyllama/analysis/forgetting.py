"""What training on one thing does to all others: every checkpoint on every source.

    python -m babyllama.analysis.forgetting out/csl --sources csl,alpaca
        one run: the checkpoint it began with, and each of its steps
    python -m babyllama.analysis.forgetting out/chat out/csl out/csl_lora --sources csl,alpaca
        the newest step of each run, or the steps that are named
    python -m babyllama.analysis.forgetting out/base out/a out/b --against out/mixture --sources a,b
        sets learnt one after another against all at once: every step of every run, as curves

Prints validation loss, perplexity and token accuracy of every source for every checkpoint, and how
much of each source was forgotten: the last loss above the lowest before it (Chaudhry et al. 2018,
arXiv:1801.10112, there with accuracy). Writes all of it as JSON, and a heat map of the losses
coloured by what changed since the first checkpoint, with curves beside it. Rows and wordings are
those of a run's own validation, always the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from babyllama.checkpoint import Loaded, load_model
from babyllama.config import atomic_write, from_repo, parse, require_writable, run, shown
from babyllama.data import ValData
from babyllama.device import Device, Scaler, pick_device
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.log import cjk_font, writable
from babyllama.run_dir import find_checkpoint, list_checkpoints
from babyllama.sources import DataConfig, SourceConfig, open_source
from babyllama.trainer import evaluate

# figures[checkpoint][source]: loss, ppl, accuracy, bpb, n_targets
Figures = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class ForgettingConfig:
    """Which checkpoints are measured, and on what.

    Args:
        checkpoints: runs or steps in the order of training, the first is what others are compared
            with; one run alone stands for all its steps and the checkpoint it began with
        sources: sets with token files, separated by commas; if absent those of the last run
        against: a run that learnt the same sources another way; it began where the first named
            checkpoint is
        out: where to write, without suffix; if absent forgetting in the last checkpoint's run
        max_val_rows: the first validation rows of each source, at most this many
        prompts: wordings for summary rows
        batch_size: sequences computed at a time
        device: auto, cpu, cuda or mps
    """

    checkpoints: tuple[Path, ...] = ()
    sources: str = ""
    against: Path | None = None
    out: Path | None = None
    max_val_rows: int = 256
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    batch_size: int = 16
    device: Device = "auto"

    def __post_init__(self) -> None:
        for name in ("max_val_rows", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} wants 1 or more, found {getattr(self, name)}")


def chosen_checkpoints(paths: Sequence[Path]) -> list[Path]:
    """The checkpoints to measure, in order.

    raises: ConfigError if there are fewer than two; CheckpointError if one is missing
    """
    places = [from_repo(path).resolve() for path in paths]
    if len(places) == 1 and list_checkpoints(places[0]):
        steps = list_checkpoints(places[0])
        info = yaml.safe_load((steps[0] / "model.yaml").read_text("utf-8"))
        parent = from_repo(info["parent"]) if info.get("parent") else None
        found = [*([find_checkpoint(parent)] if parent and parent.exists() else []), *steps]
    else:
        found = [find_checkpoint(place) for place in places]
    if len(found) < 2:
        raise ConfigError(
            f"wanted two checkpoints or more to compare, found {len(found)}; name a run with "
            f"several steps, or several runs: python -m babyllama.analysis.forgetting out/a out/b"
        )
    return found


def curve_of(start: Path, runs: Sequence[Path]) -> list[tuple[int, Path]]:
    """Every checkpoint of runs that followed each other, each with the steps made so far.

    start: the checkpoint before the first of them
    raises: CheckpointError if a run has none
    """
    found, done = [(0, find_checkpoint(from_repo(start).resolve()))], 0
    for run_path in runs:
        place = from_repo(run_path).resolve()
        find_checkpoint(place)
        steps = list_checkpoints(place) or list_checkpoints(place.parent)
        found += [(done + int(step.name[5:]), step) for step in steps]
        done = found[-1][0]
    return found


def chosen_sources(names: str, last: Path, flag: str = "--sources") -> list[str]:
    """The sets that are named, or those that the last checkpoint's run was trained on.

    raises: ConfigError if there are none
    """
    found = [name.strip() for name in names.split(",") if name.strip()]
    config = last.parent / "config.yaml"
    if not found and config.is_file():
        settings = yaml.safe_load(config.read_text("utf-8"))
        found = [source["name"] for source in settings["data"]["sources"]]
    if not found:
        raise ConfigError(
            f"wanted sources to measure, found none, and no {shown(config)} that tells them; name "
            f"them: {flag} csl,alpaca"
        )
    return list(dict.fromkeys(found))


def measure(loaded: Loaded, sources: dict[str, ValData], batch_size: int) -> dict[str, dict]:
    """Figures of one checkpoint, by source."""
    device = loaded.model.rope.device
    scaler, world = Scaler(device, "float32"), World(0, 1, device)
    found = {
        name: evaluate(loaded.model, data, batch_size, scaler, world, loaded.tokenizer)
        for name, data in sources.items()
    }
    return {name: {key: v for key, v in f.items() if key != "sources"} for name, f in found.items()}


def open_sources(loaded: Loaded, names: Sequence[str], cfg: ForgettingConfig) -> dict[str, ValData]:
    """The validation rows of each source, for the tokenizer and the context of a checkpoint."""
    data = DataConfig(prompts=cfg.prompts, max_val_rows=cfg.max_val_rows)
    length, pad_id = loaded.config.max_seq_len, loaded.tokenizer.pad_id
    return {
        name: ValData(
            [open_source(SourceConfig(name), "val", loaded.tokenizer, data, length)],
            cfg.max_val_rows, length, pad_id,
        )
        for name in names
    }  # fmt: skip


def measured(steps: Sequence[Path], names: Sequence[str], cfg: ForgettingConfig) -> dict:
    """Figures of every checkpoint, and what they were measured with."""
    figures: Figures = {}
    opened: dict[tuple[str, int], dict[str, ValData]] = {}
    for step in steps:
        loaded = load_model(step, pick_device(cfg.device))
        key = (loaded.tokenizer.fingerprint, loaded.config.max_seq_len)
        opened.setdefault(key, open_sources(loaded, names, cfg))
        figures[shown(step)] = measure(loaded, opened[key], cfg.batch_size)
        print(f"measured {shown(step)}")
    # Losses of different pieces cannot be compared, and of cut texts not quite.
    measure_of_change = "loss" if len(opened) == 1 else "bpb"
    return {
        "max_val_rows": cfg.max_val_rows,
        "prompts": str(cfg.prompts),
        "compared_by": measure_of_change,
        "figures": figures,
        "change": changes(figures, measure_of_change),
        "forgotten": forgotten(figures, measure_of_change),
    }


def changes(figures: Figures, key: str) -> dict[str, dict[str, float]]:
    """How much higher each figure is than that of the first checkpoint."""
    first = next(iter(figures.values()))
    return {
        step: {name: found[key] - first[name][key] for name, found in row.items()}
        for step, row in figures.items()
    }


def forgotten(figures: Figures, key: str) -> dict[str, float]:
    """The last figure of each source above the lowest before it; below 0 nothing was lost."""
    *before, last = figures.values()
    return {name: last[name][key] - min(row[name][key] for row in before) for name in last}


def table(found: dict) -> str:
    """One block a source, one line a checkpoint."""
    key, lines = found["compared_by"], []
    for name, lost in found["forgotten"].items():
        rows = {step: row[name] for step, row in found["figures"].items()}
        counts = sorted({row["n_targets"] for row in rows.values()})
        lines += [f"{name} ({' or '.join(f'{n:,}' for n in counts)} targets)",
                  "    loss        ppl  accuracy    bits/byte   change  checkpoint"]  # fmt: skip
        lines += [
            f"  {row['loss']:6.3f} {row['ppl']:10.2f}  {row['accuracy']:7.2%}  "
            f"{row['bpb']:11.4f}  {found['change'][step][name]:+7.3f}  {step}"
            for step, row in rows.items()
        ]
        beside = found.get("forgotten_against", {}).get(name)
        beside = "" if beside is None else f", by --against {beside:+.3f}"
        lines += [f"  forgotten {lost:+.3f} ({key}){beside}", ""]
    return "\n".join(lines)


def compared(cfg: ForgettingConfig, names: Sequence[str]) -> dict:
    """What `measured` says of the ends of all stages, and the curves of every step.

    raises: ConfigError if there is no stage after the first checkpoint
    """
    first, *runs = cfg.checkpoints
    if not runs:
        raise ConfigError(
            "--against wants the checkpoint that both began with and the runs that followed it: "
            "python -m babyllama.analysis.forgetting out/base out/a out/b --against out/mixture"
        )
    curves = {"sequence": curve_of(first, runs), "against": curve_of(first, [cfg.against])}
    steps = dict.fromkeys(step for curve in curves.values() for _, step in curve)
    every = measured(list(steps), names, cfg)
    sequence = [find_checkpoint(from_repo(path).resolve()) for path in cfg.checkpoints]
    ends = {shown(step): every["figures"][shown(step)] for step in sequence}
    last = shown(curves["against"][-1][1])
    key = every["compared_by"]
    return every | {
        "steps": every["figures"],
        "curves": {k: [(n, shown(step)) for n, step in curve] for k, curve in curves.items()},
        "figures": ends | {last: every["figures"][last]},
        "change": changes(ends | {last: every["figures"][last]}, key),
        "forgotten": forgotten(ends, key),
        "forgotten_against": forgotten(
            {shown(step): every["figures"][shown(step)] for _, step in curves["against"]}, key
        ),
    }


def main(cfg: ForgettingConfig) -> None:
    """Measure, print, write."""
    steps = chosen_checkpoints(cfg.checkpoints)
    names = chosen_sources(cfg.sources, steps[-1])
    out = from_repo(cfg.out) if cfg.out else steps[-1].parent / "forgetting"
    require_writable(out.with_name(out.name + ".json"))
    with torch.inference_mode():
        found = compared(cfg, names) if cfg.against else measured(steps, names, cfg)
    print(f"\n{table(found)}")
    files = out.with_name(out.name + ".json"), out.with_name(out.name + ".png")
    with atomic_write(files[0]) as temporary:
        temporary.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", "utf-8")
    draw(found, files[1], cjk_font())
    print("\n".join(map(shown, files)))


KINDS = {"loss": ("损失", "loss"), "bpb": ("每字节比特", "bits per byte")}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")


def draw(found: dict, path: Path, font: str | None) -> None:
    """The heat map, and where runs were compared the curves to its left.

    found: what forgetting.py writes as JSON
    font: for Chinese labels; None: English ones
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    n_steps, n_names = len(found["figures"]), len(found["forgotten"])
    with_curves = "curves" in found
    rc = {"font.family": [*([font] if font else []), "DejaVu Sans"], "axes.unicode_minus": False}
    with rc_context(rc):
        size = (3.6 + 2.0 * n_names + 6.4 * with_curves, max(1.6 + 0.62 * n_steps, 4 * with_curves))
        figure = Figure(figsize=size, layout="constrained")
        if with_curves:
            left, right = figure.subplots(1, 2, width_ratios=(6.4, 3.6 + 2.0 * n_names))
            curves(left, found, font)
        else:
            right = figure.subplots()
        image = matrix(right, found, font)
        figure.colorbar(image, ax=right, label=_label(found, font), fraction=0.05)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=130)


def matrix(axis: object, found: dict, font: str | None) -> object:
    """A row a checkpoint, a column a source; returns the image for its colour bar."""
    steps, names = list(found["figures"]), list(found["forgotten"])
    change = [[found["change"][step][name] for name in names] for step in steps]
    most = max(0.1, *(abs(value) for row in change for value in row))
    kind = KINDS[found["compared_by"]]
    image = axis.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    axis.set_xticks(range(len(names)), [writable(Path(n).name, font) for n in names])
    axis.set_yticks(range(len(steps)), [writable(_short(step), font) for step in steps])
    axis.tick_params(length=0)
    title = (
        f"各检查点在各数据集上的验证{kind[0]}"
        if font
        else f"Validation {kind[1]} of every checkpoint"
    )
    axis.set_title(title, fontsize=11)
    for y, step in enumerate(steps):
        for x, name in enumerate(names):
            row = found["figures"][step][name]
            is_dark = abs(change[y][x]) > 0.6 * most
            text = f"{row[found['compared_by']]:.3f}"
            text += f" ({change[y][x]:+.3f})" if y else ""
            text += f"\nppl {row['ppl']:.4g} · {row['accuracy']:.1%}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8.5,
                      color="white" if is_dark else "#222222")  # fmt: skip
    return image


def curves(axis: object, found: dict, font: str | None) -> None:
    """The figure of each source over the steps: one set after another, and against that."""
    key, names = found["compared_by"], list(found["forgotten"])
    ways = {
        "sequence": ("-", "依次" if font else "one after another"),
        "against": ("--", "混合" if font else "mixture"),
    }
    for way, (style, label) in ways.items():
        places = [n for n, _ in found["curves"][way]]
        for name, colour in zip(names, COLOURS * len(names), strict=False):
            values = [found["steps"][step][name][key] for _, step in found["curves"][way]]
            axis.plot(places, values, style, color=colour, marker="o", markersize=2.5,
                      label=f"{writable(Path(name).name, font)} ({label})")  # fmt: skip
    ends = [n for n, step in found["curves"]["sequence"] if step in found["figures"]]
    for end in ends[1:-1]:
        axis.axvline(end, color="#aaaaaa", linewidth=0.8)
    for start, end, step in zip(ends, ends[1:], list(found["figures"])[1:], strict=False):
        stage = writable(Path(step).parts[-2], font)
        axis.text((start + end) / 2, 1.0, stage, transform=axis.get_xaxis_transform(),
                  ha="center", va="bottom", fontsize=8.5, color="#555555")  # fmt: skip
    axis.set_xlabel("步" if font else "step")
    axis.set_ylabel(f"验证{KINDS[key][0]}" if font else f"validation {KINDS[key][1]}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _label(found: dict, font: str | None) -> str:
    chinese, english = KINDS[found["compared_by"]]
    return (
        f"与第一行之差（{chinese}，红色为变差）" if font else f"change of {english} since the first"
    )


def _short(step: str) -> str:
    """The run and the step of a checkpoint's path."""
    return "/".join(Path(step).parts[-2:])


if __name__ == "__main__":
    run(main, parse(ForgettingConfig, __doc__, positional=["checkpoints"]))
