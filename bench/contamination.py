"""Rows of a benchmark that stand in what a checkpoint was trained on.

The checkpoint's run names its training sets, and so does the run that it started from, down to
the first. Their rows lie in data/clean/<set>; data_process.decontaminate looks the benchmark up in
them.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from babyllama.config import REPO, from_repo, shown
from babyllama.errors import DataError
from babyllama.rows import write_rows


class Training(NamedTuple):
    """What a checkpoint was trained on.

    files: the rows; missing: sets and runs whose rows are not here
    """

    files: tuple[Path, ...]
    missing: tuple[str, ...]


def training_of(checkpoint: Path, named: Sequence[Path] = ()) -> Training:
    """The training rows of a checkpoint and of all that it started from.

    named: files or folders that hold all of them; what the runs say is not looked at then
    raises: DataError if one of these holds no rows
    """
    files: dict[Path, None] = {}
    missing: dict[str, None] = {}
    for path in named:
        found = _rows_in(path)
        if not found:
            raise DataError(
                f"--training {path}: wanted train-*.jsonl in it, found none; name a file"
            )
        files |= dict.fromkeys(found)
    place = None if named else checkpoint
    seen: set[Path] = set()
    while place and place.resolve() not in seen:
        seen.add(place.resolve())
        step = place if (place / "model.yaml").is_file() else None
        run = place.parent if step else place
        config = _yaml(run / "config.yaml")
        sources = (config.get("data") or {}).get("sources")
        if not sources:
            missing[f"{shown(run)}/config.yaml"] = None
        for source in sources or []:
            name = Path(source["name"])
            found = _rows_in(name) or _rows_in("data/clean" / Path(name.name))
            files |= dict.fromkeys(found)
            if not found:
                missing[source["name"]] = None
        parent = _yaml(step / "model.yaml").get("parent") if step else config.get("base")
        place = from_repo(parent) if parent else None
    return Training(tuple(files), tuple(missing))


def _yaml(path: Path) -> dict:
    return (yaml.safe_load(path.read_text("utf-8")) or {}) if path.is_file() else {}


def _rows_in(path: Path) -> list[Path]:
    # The files are read by another process, whose working directory is the repository.
    place = from_repo(path).resolve()
    return [place] if place.is_file() else sorted(place.rglob("train-*.jsonl"))


def count(rows: dict[str, list[dict]], training: Training) -> dict[str, int]:
    """For each task, how many of its rows stand in the training rows.

    rows: by task
    """
    if not training.files:
        return {}
    with tempfile.TemporaryDirectory() as place:
        asked, found = Path(place) / "asked.jsonl", Path(place) / "found.json"
        lines = (
            {"group": task, "text": "\0".join(filter(None, texts))}
            for task, its_rows in rows.items()
            for row in its_rows
            for texts in [(row["context"], row["ask"], *row["options"])]
        )
        write_rows(asked, lines)
        done = subprocess.run(
            [sys.executable, "-m", "data_process.decontaminate", asked, *training.files,
             "--out", found],
            cwd=REPO, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise DataError(done.stderr.strip().removeprefix("error: "))
        return {group: 0 for group in rows} | json.loads(found.read_text("utf-8"))["groups"]
