"""The pictures of forgetting.py: a heat map of checkpoints and sources, and curves beside it."""

from pathlib import Path

from babyllama.fonts import writable
from babyllama.log import written_whole

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
        with written_whole(path) as temporary:
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
