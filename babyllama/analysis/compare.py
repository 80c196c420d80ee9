"""Several runs side by side: their curves in one picture and what their configs differ in.

python -m babyllama.analysis.compare out/a out/b                    writes out/compare.png
python -m babyllama.analysis.compare out/a out/b --out figures.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from babyllama.config import atomic_write, from_repo, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.log import read_metrics


@dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Args:
        runs: directories of runs, each with its metrics.jsonl and config.yaml
        out: the picture
    """

    runs: tuple[Path, ...] = ()
    out: Path = Path("out/compare.png")


def settings(config: object, at: str = "") -> dict[str, str]:
    """Every setting by its full name, as text."""
    if isinstance(config, dict) and config:
        parts = [
            settings(value, f"{at}.{key}" if at else str(key)) for key, value in config.items()
        ]
        return {name: value for part in parts for name, value in part.items()}
    return {at: json.dumps(config, ensure_ascii=False)}


def table(runs: dict[str, dict], results: dict[str, dict]) -> str:
    """The settings that are not the same in all runs, and the last figures, as Markdown.

    runs: settings by run; results: figures by run
    """
    names = dict.fromkeys(name for found in runs.values() for name in found)
    rows = [(name, [found.get(name, "-") for found in runs.values()]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    figures = dict.fromkeys(name for found in results.values() for name in found)
    rows += [(name, [found.get(name, "-") for found in results.values()]) for name in figures]
    lines = [("setting or figure", list(runs)), ("---", ["---"] * len(runs)), *rows]
    return "\n".join(f"| {' | '.join([name, *values])} |" for name, values in lines)


def last_figures(records: list[dict]) -> dict[str, str]:
    """What a run came to: its last and its best validation, and its speed."""
    val = [record for record in records if record["kind"] == "val"]
    train = [record for record in records if record["kind"] == "train"]
    figures = {}
    if val:
        best = min(val, key=lambda record: record["loss"])
        figures["val loss, last"] = f"{val[-1]['loss']:.4f} (step {val[-1]['step']})"
        figures["val loss, best"] = f"{best['loss']:.4f} (step {best['step']})"
        if "bpb" in val[-1]:
            figures["bits per byte"] = f"{val[-1]['bpb']:.4f}"
    if train:
        rates = sorted(record["tokens_per_s"] for record in train)
        figures["tokens seen"] = f"{train[-1]['tokens']:,}"
        figures["tokens/s, median"] = f"{rates[len(rates) // 2]:,.0f}"
    return figures


def worth_seeing(curves: list[list[tuple[float, float]]]) -> tuple[float, float] | None:
    """Limits that show how curves differ: what falls in the first tenth of a run is cut off above.

    curves: of points (x, y); None where no curve has a point beyond
    """
    found = [y for points in curves for x, y in points if x > 0 and x >= points[-1][0] / 10]
    if not found:
        return None
    margin = 0.05 * (max(found) - min(found)) or 0.05
    return min(found) - margin, max(found) + margin


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    """Training and validation loss of every run over steps and over tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.2), constrained_layout=True)
    drawn: list[list] = [[], [], []]
    for number, (name, records) in enumerate(runs.items()):
        color = f"C{number % 10}"
        tokens = {r["step"]: r["tokens"] for r in records if r["kind"] == "train"} | {0: 0}
        for axis, kind, key, curves in zip(axes, ("train", "val", "val"),
                                           ("step", "step", "tokens"), drawn,
                                           strict=True):  # fmt: skip
            points = [(tokens.get(r["step"]) if key == "tokens" else r["step"], r["loss"])
                      for r in records if r["kind"] == kind]  # fmt: skip
            points = [(x, y) for x, y in points if x is not None]
            if points:
                curves.append(points)
                axis.plot(*zip(*points, strict=True), color=color, label=name, lw=1.3)
            axis.set(xlabel=key, title=f"{kind} loss over {key}s".replace("tokenss", "tokens"))
            axis.grid(alpha=0.3)
    for axis, curves in zip(axes, drawn, strict=True):
        if limits := worth_seeing(curves):
            axis.set_ylim(*limits)
    axes[0].legend(fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        pyplot.close(figure)


def main(cfg: CompareConfig) -> None:
    """Print the table and write the picture."""
    if len(cfg.runs) < 2:
        raise ConfigError(
            "wanted two runs or more: python -m babyllama.analysis.compare out/a out/b"
        )
    records, configs = {}, {}
    for given in cfg.runs:
        path = from_repo(given)
        name = shown(path.resolve())
        records[name] = read_metrics(path)
        if not records[name] or not (path / "config.yaml").is_file():
            raise ConfigError(
                f"{shown(path)}: wanted the directory of a run with metrics.jsonl and config.yaml"
            )
        configs[name] = settings(yaml.safe_load((path / "config.yaml").read_text("utf-8")))
    print(table(configs, {name: last_figures(found) for name, found in records.items()}))
    out = from_repo(cfg.out)
    draw(records, out)
    print(f"\n{shown(out)}")


if __name__ == "__main__":
    run(main, parse(CompareConfig, __doc__, positional=("runs",)))
