"""The systems that are compared: checkpoints, and files of titles that an earlier run wrote."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from babyllama.checkpoint import Loaded, load_model
from babyllama.cli import REPO, shown
from babyllama.errors import ConfigError
from babyllama.report import Compared, write_report
from babyllama.rows import write_rows
from babyllama.run_dir import checksums
from babyllama.scoring import Measured
from babyllama.summaries import PREDICTION_KEYS, SummarySet, is_predictions, predictions_for
from babyllama.titles import Asking, Titles, summarise, summarise_together

System = Loaded | Path


def open_systems(paths: Sequence[Path], device: torch.device) -> dict[str, System]:
    """Each system by a short name."""
    opened = [path if is_predictions(path) else load_model(path, device) for path in paths]
    places = [each if isinstance(each, Path) else each.path for each in opened]
    return dict(zip(labelled(places), opened, strict=True))


def labelled(paths: Sequence[Path]) -> list[str]:
    """A short name for each system, and a longer one where two would be alike.

    raises: ConfigError if one is named twice
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(
            f"wanted different systems, found the same checkpoint or file twice among "
            f"{', '.join(map(shown, paths))}; leave one out"
        )
    whole = [path.resolve() for path in paths]
    places = [p.relative_to(REPO) if p.is_relative_to(REPO) else p for p in whole]
    for n_parts in (2, 3, 99):
        names = ["/".join(place.parts[-n_parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return names


def describe(systems: dict[str, System]) -> dict[str, dict]:
    """Where each system lies, and the checksums by which it is known again."""
    return {
        name: {"file": shown(one), "sha256": hashlib.sha256(one.read_bytes()).hexdigest()}
        if isinstance(one, Path)
        else {"path": shown(one.path), "step": one.step, "sha256": checksums(one.path)}
        for name, one in systems.items()
    }


def all_titles(
    systems: dict[str, System], found: SummarySet, ways: dict[str, Asking], pool: bool = False
) -> dict[str, Titles]:
    """The titles of each file, and of each checkpoint in each way to decode.

    pool: the checkpoints are one system, in the place of the first
    """
    titles, texts = {}, found.column("text")
    if pool:
        together = {name: one for name, one in systems.items() if not isinstance(one, Path)}
        label = " + ".join(together)
        for way, how in ways.items():
            made = summarise_together(list(together.values()), texts, how)
            titles[f"{label} {way}".rstrip()] = made
        systems = {name: one for name, one in systems.items() if name not in together}
    for label, system in systems.items():
        if isinstance(system, Path):
            titles[label] = Titles(predictions_for(system, found), 0, 0, 0.0)
            continue
        for way, how in ways.items():
            titles[f"{label} {way}".rstrip()] = summarise(system, texts, how)
    return titles


def write_titles(
    out: Path, found: SummarySet, systems: dict[str, System], made: dict[str, Titles]
) -> dict[str, Path]:
    """Write the titles that are new: the first system's to `out`, further ones beside it."""
    new = [name for name in made if not isinstance(systems.get(name), Path)]
    places = {}
    for number, name in enumerate(new, 1):
        places[name] = out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        rows = zip(found.rows, made[name].titles, strict=True)
        cells = ((row["id"], row["text"], row["summary"], title) for row, title in rows)
        write_rows(places[name], (dict(zip(PREDICTION_KEYS, c, strict=True)) for c in cells))
    return places


def write_page(
    path: Path,
    found: SummarySet,
    titles: dict[str, list[str]],
    measured: dict[str, Measured],
    compared: str,
) -> None:
    """The page about the first two systems, with ROUGE-1 as published."""
    a, b = list(titles)[:2]
    published = [measured[name].rouge[0] for name in (a, b)]
    points = [(100 * each.f["rouge-1"]).tolist() for each in published]
    cells = zip(found.rows, zip(titles[a], titles[b], strict=True), zip(*points, strict=True),
                strict=True)  # fmt: skip
    rows = [Compared(row["id"], row["text"], row["summary"], *rest) for row, *rest in cells]
    write_report(path, (a, b), f"ROUGE-1 × 100, {published[0].measure}", rows, [compared])
