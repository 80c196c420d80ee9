"""Test sets of summaries, and files of predictions: reading them, and knowing which set it is.

    .tsv    CSL's benchmark/ts: `to title`, abstract, title
    .json   one object a line: {"id", "abst", "title"} (csl_title_public), {"content", "title"} and
            the like (LCSTS in its re-releases, with a system's output perhaps), or a row of ours
    folder  its files whose name begins with the split, or holds it; beside benchmark/ts the
            folders kg and cls_dcp, which give its papers their keywords and disciplines

A file of predictions has the keys id, text, reference and prediction. No torch.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import check_row, numbered_lines, row_kind
from babyllama.scoring.tables import SETS

PREDICTION_KEYS = ("id", "text", "reference", "prediction")
BODIES = ("short_text", "content", "source", "article")
SUMMARIES = ("summary", "title", "target", "summarization")
# As the publishers name the parts of their sets.
PARTS = {"test": ("test", "part_iii"), "dev": ("dev", "val", "valid", "part_ii")}
ENDINGS = (".tsv", ".json", ".jsonl")
# CSL's other tasks, and the key of a row's meta that each gives.
BESIDE_TS = {"kg": ("to keywords", "keywords"), "cls_dcp": ("to discipline", "discipline")}


@dataclass
class SummarySet:
    """A test set.

    published: the set that others' figures are known of (babyllama/scoring/tables.py), or None
    rows: summary rows (rows.py)
    """

    name: str
    published: str | None
    files: list[Path]
    rows: list[dict]

    @property
    def sha256(self) -> str:
        """Of all its files."""
        return hashlib.sha256(b"".join(f.read_bytes() for f in self.files)).hexdigest()

    def column(self, key: str) -> list[str]:
        return [row[key] for row in self.rows]


def open_set(data: Path | None, dataset: str, split: str, limit: int | None) -> SummarySet:
    """The set that is asked for: a file or folder, or else the clean rows of a set.

    raises: DataError if it is missing, or at the first line that is no text with its summary
    """
    if data is None:
        folder, name = from_repo(Path("data/clean") / dataset), dataset
        files = sorted(folder.glob(f"{'val' if split == 'dev' else split}-*.jsonl"))
        if not files:
            raise DataError(
                f"wanted {split} rows in {shown(folder)}, found none; make the set with "
                f"`python -m data_process.run {dataset}`, or name a file with --data"
            )
    else:
        path, name = from_repo(data), str(data)
        files = _of_split(path, split) if path.is_dir() else [path]
    found = [pair for file in files for pair in _read(file)][:limit]
    layouts = {layout for _, layout in found}
    published = layouts.pop() if len(layouts) == 1 else None
    rows = [row for row, _ in found]
    if data is None and dataset == "lcsts":
        published = "lcsts"
    if published == "csl_ts":
        _add_meta(rows, files[0], split)
    return SummarySet(name, published, files, rows)


def _of_split(folder: Path, split: str) -> list[Path]:
    """The files of one part in a folder as its publisher leaves it."""
    inner = folder / "ts" if (folder / "ts").is_dir() else folder
    files = [path for path in sorted(inner.iterdir()) if path.suffix in ENDINGS]
    words = [(path, re.split(r"[^a-z0-9]+", path.stem.lower())) for path in files]
    for name in PARTS[split]:
        found = [path for path, parts in words if name in parts]
        if found:
            return found
    raise DataError(
        f"{shown(inner)}: wanted a file of {split} ({', '.join(ENDINGS)}), found "
        f"{[path.name for path in files][:5]}; name a file with --data"
    )


def read_pairs(path: Path) -> list[dict]:
    """The summary rows of one file in any of the formats; errors as open_set."""
    return [row for row, _ in _read(path)]


def _read(path: Path) -> list[tuple[dict, str | None]]:
    """Rows, each with the published set whose layout it has."""
    pairs = []
    for number, line in numbered_lines(path):
        row_id = f"{path.stem}/{number}"
        row, layout = _from_tsv(line, row_id) if path.suffix == ".tsv" else _from_json(line, row_id)
        reason = check_row(row)
        if reason or row_kind(row) != "summary":
            wanted = "cells `to title`, abstract, title"
            wanted = wanted if path.suffix == ".tsv" else "keys id, text, summary"
            raise DataError(
                f"{shown(path)}:{number}: wanted a text with its title ({wanted}), found "
                f"{reason or row_kind(row)} in {line[:80]!r}; correct or remove the line, or name "
                f"another file"
            )
        # The keys of LCSTS' re-releases are anybody's; the name must say it, too.
        if layout == "lcsts" and "lcsts" not in str(path.resolve()).lower():
            layout = None
        pairs.append((row, layout))
    if not pairs:
        raise DataError(f"{shown(path)}: wanted texts with titles, found an empty file")
    return pairs


def _from_tsv(line: str, row_id: str) -> tuple[object, str | None]:
    """A row of CSL's folder ts; of its other folders, which hold no titles, nothing."""
    # No csv reader: abstracts hold single quotation marks, behind which it would swallow lines.
    cells = line.split("\t")
    if len(cells) != 3 or cells[0] != "to title":
        return cells, None
    return {"id": row_id, "text": cells[1], "summary": cells[2]}, "csl_ts"


def _from_json(line: str, row_id: str) -> tuple[object, str | None]:
    """A row as it is, one of a known layout turned into ours, or what else stands there."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line, None
    if not isinstance(row, dict):
        return row, None
    if row.keys() == {"id", "abst", "title"}:
        return {"id": str(row["id"]), "text": row["abst"], "summary": row["title"]}, (
            "csl_title_public"
        )
    body = next((key for key in BODIES if key in row), None)
    summary = next((key for key in SUMMARIES if key in row), None)
    if body is None or summary is None:
        return row, None
    ours = {"id": str(row.get("id", row_id)), "text": row[body], "summary": row[summary]}
    if "system" in row:
        ours["meta"] = {"system": row["system"]}
    return ours, "lcsts"


def _add_meta(rows: Sequence[dict], ts: Path, split: str) -> None:
    """Keywords and disciplines of the same papers, from the folders beside benchmark/ts."""
    for folder, (task, key) in BESIDE_TS.items():
        found: dict[str, str] = {}
        for path in sorted((ts.parent.parent / folder).glob(f"{split}.tsv")):
            for _, line in numbered_lines(path):
                cells = line.split("\t")
                if len(cells) == 3 and cells[0] == task:
                    found[cells[1]] = cells[2]
        for row in rows:
            # The keyword task's text is the abstract, a blank and the title.
            text = f"{row['text']} {row['summary']}" if folder == "kg" else row["text"]
            if text in found:
                value = found[text]
                words = [word.strip() for word in value.split("_") if word.strip()]
                row.setdefault("meta", {})[key] = words if key == "keywords" else value


def is_predictions(path: Path) -> bool:
    """Whether a path is a file, which a checkpoint never is."""
    return path.is_file()


def read_predictions(path: Path) -> list[dict]:
    """The rows of a file of predictions.

    raises: DataError at the first line that is none
    """
    rows = []
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        keys = row.keys() if isinstance(row, dict) else ()
        if not all(key in keys and isinstance(row[key], str) for key in PREDICTION_KEYS):
            raise DataError(
                f"{shown(path)}:{number}: wanted texts under {', '.join(PREDICTION_KEYS)}, found "
                f"{line[:80]!r}; eval_rouge.py --out writes such files"
            )
        rows.append({key: row[key] for key in PREDICTION_KEYS})
    if not rows:
        raise DataError(f"{shown(path)}: wanted predictions, found an empty file")
    return rows


def set_of_predictions(path: Path, limit: int | None) -> SummarySet:
    """The set that a file of predictions was made from, as far as the file tells."""
    rows = [
        {"id": row["id"], "text": row["text"], "summary": row["reference"]}
        for row in read_predictions(path)[:limit]
    ]
    return SummarySet(shown(path), None, [path], rows)


def predictions_for(path: Path, wanted: SummarySet) -> list[str]:
    """What a file predicts for the rows of a set.

    raises: DataError if it holds other rows
    """
    found = read_predictions(path)[: len(wanted.rows)]
    if len(found) < len(wanted.rows):
        raise DataError(
            f"{shown(path)}: wanted predictions for the {len(wanted.rows)} rows of {wanted.name}, "
            f"found {len(found)}; compare fewer rows (--limit {len(found)})"
        )
    for number, (row, own) in enumerate(zip(found, wanted.rows, strict=True), 1):
        if (row["text"], row["reference"]) != (own["text"], own["summary"]):
            raise DataError(
                f"{shown(path)}: its row {number} ({row['id']!r}) is about another text than row "
                f"{number} of {wanted.name} ({own['id']!r}); only outputs for the same set, in the "
                f"same order, can be compared"
            )
    return [row["prediction"] for row in found]


def choose_published(wanted: str, found: SummarySet, known: Sequence[str]) -> str | None:
    """Which published set the rows are: what the user says, or what their layout says."""
    if wanted == "none":
        return None
    if wanted != "auto" and wanted not in known:
        raise ConfigError(f"--published {wanted}: wanted auto, none or one of {', '.join(known)}")
    return found.published if wanted == "auto" else wanted


def known_as(published: str | None) -> str:
    """What can be said of others' figures for a set."""
    if published is None:
        return "no published set that is known here (--published names one)"
    n = len(SETS[published])
    return f"published as {published}, {n or 'no'} systems known by this protocol"


def stored_outputs(found: SummarySet) -> dict[str, list[str]]:
    """A system's outputs that the set itself holds, if it holds one for each row."""
    outputs = [row.get("meta", {}).get("system") for row in found.rows]
    held = all(isinstance(output, str) for output in outputs)
    return {"outputs in the file": outputs} if held else {}
