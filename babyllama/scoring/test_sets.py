"""Test sets of summaries, and the systems compared on them: checkpoints and files of titles.

    .tsv    CSL's benchmark/ts: `to title`, abstract, title
    .json   one object a line: {"id", "abst", "title"} (csl_title_public), {"content", "title"} and
            the like (LCSTS in its re-releases), or a row of ours
    folder  its files whose name holds the split

A file of titles has the keys id, text, reference and prediction.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babyllama.config import REPO, atomic_write, from_repo, require_writable, shown, similar
from babyllama.errors import ConfigError, DataError
from babyllama.language.letters import part_of
from babyllama.rows import (
    BODIES,
    SUMMARIES,
    check_row,
    numbered_lines,
    row_kind,
    write_rows,
)
from babyllama.run_dir import chosen_run, find_checkpoint, sha256
from babyllama.scoring.tables import System

PREDICTION_KEYS = ("id", "text", "reference", "prediction")
ENDINGS = (".tsv", ".json", ".jsonl")


def first_column(row: dict, names: Iterable[str]) -> str | None:
    """The first of the names under which a row has something. A `source` is a text only beside a
    `target`; elsewhere it names the publisher."""
    filled = (name for name in names if row.get(name) not in (None, "", []))
    return next((name for name in filled if name != "source" or "target" in row), None)


def write_json(path: Path, value: object) -> None:
    """A file for people and programs, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", "utf-8")


def beside(checkpoint: Path) -> Path:
    """Directory of reports on a checkpoint: its run; for one without a run (release/) out/."""
    run = checkpoint.resolve().parent
    return REPO / "out" if run == REPO.resolve() else run


def checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint: says in a report which one was measured."""
    return json.loads((checkpoint / "checksums.json").read_text("utf-8"))


@dataclass
class SummarySet:
    """A test set.

    name: as it was asked for; label: what files of its titles are called
    published: the set of published.yaml that it is, or None
    rows: summary rows (rows.py)
    """

    name: str
    label: str
    published: str | None
    files: list[Path]
    rows: list[dict]

    @property
    def sha256(self) -> str:
        """Of all its files."""
        return hashlib.sha256(b"".join(f.read_bytes() for f in self.files)).hexdigest()

    @property
    def columns(self) -> str:
        """What is read of its rows and what is not, as the first row shows."""
        row = _object(next(numbered_lines(self.files[0]))[1])
        used = [first_column(row, names) for names in (BODIES, SUMMARIES)]
        left = ", ".join(key for key in row if key not in (*used, "id", "meta"))
        return f"; title: {used[1]}; not used: {left}" if left and all(used) else ""

    def column(self, key: str) -> list[str]:
        return [row[key] for row in self.rows]


def open_set(
    data: Path | None,
    dataset: str | None,
    split: str,
    limit: int | None,
    systems: Sequence[Path] = (),
) -> SummarySet:
    """The first rows of a file or folder, or of a set's clean rows, or of the first file of titles.

    systems: where the titles come from; if all are files of titles, no set need be named
    raises: DataError if it is missing, or at the first line that is no text with its summary
    """
    if not (data or dataset) and systems and all(path.is_file() for path in systems):
        keys = {"id": "id", "text": "text", "summary": "reference"}
        found = read_predictions(systems[0])[:limit]
        rows = [{ours: row[key] for ours, key in keys.items()} for row in found]
        return SummarySet(shown(systems[0]), systems[0].stem, None, [systems[0]], rows)
    if data is None:
        dataset = dataset or "inews_title"
        folder, name = from_repo(Path("data/clean") / dataset), dataset
        files = sorted(folder.glob(f"{'val' if split == 'dev' else split}-*.jsonl"))
        if not files:
            raise DataError(
                f"wanted {split} rows in {shown(folder)}, found none{similar(folder)}; make the "
                f"set with `python -m data_process.run {dataset}`, or name a file with --data"
            )
    else:
        path, name = from_repo(data), str(data)
        files = _of_split(path, split) if path.is_dir() else [path]
    read = [pair for file in files for pair in _read(file)][:limit]
    layouts = {layout for _, layout in read}
    published = layouts.pop() if len(layouts) == 1 else None
    rows = [row for row, _ in read]
    if data is None and dataset == "lcsts":
        published = "lcsts"
    label = (Path(name).stem if data else f"{name}-{split}") + (f"-{limit}" if limit else "")
    return SummarySet(name, label, published, files, rows)


def _of_split(folder: Path, split: str) -> list[Path]:
    """The files of one part in a folder as its publisher leaves it."""
    inner = folder / "ts" if (folder / "ts").is_dir() else folder
    files = [path for path in sorted(inner.iterdir()) if path.suffix in ENDINGS]
    if found := [p for p in files if part_of(p.stem) == {"dev": "val"}.get(split, split)]:
        return found
    raise DataError(
        f"{shown(inner)}: wanted a file of {split} ({', '.join(ENDINGS)}), found "
        f"{[path.name for path in files][:5]}; name a file with --data"
    )


def _read(path: Path) -> list[tuple[dict, str | None]]:
    """Rows, each with the published set whose layout it has."""
    pairs = []
    keys = f"keys for the text: {', '.join(BODIES)}; for the title: {', '.join(SUMMARIES)}"
    for number, line in numbered_lines(path):
        row_id = f"{path.stem}/{number}"
        row, layout = _from_tsv(line, row_id) if path.suffix == ".tsv" else _from_json(line, row_id)
        reason = check_row(row)
        if reason or row_kind(row) != "summary":
            wanted = "cells `to title`, abstract, title" if path.suffix == ".tsv" else keys
            raise DataError(
                f"{shown(path)}:{number}: wanted a text with its title ({wanted}), found "
                f"{reason or row_kind(row)} in {line[:80]!r}; correct it, or make rows of it: "
                f"python -m data_process.run pairs --name NAME --raw {shlex.quote(str(path))}"
            )
        # The keys of LCSTS' re-releases are anybody's; the name must say it, too.
        if layout == "lcsts" and "lcsts" not in str(path.resolve()).lower():
            layout = None
        pairs.append((row, layout))
    if not pairs:
        raise DataError(f"{shown(path)}: wanted texts with titles, found an empty file")
    return pairs


def _from_tsv(line: str, row_id: str) -> tuple[Any, str | None]:
    """A row of CSL's folder ts; of its other folders, which hold no titles, nothing."""
    # No csv reader: abstracts hold single quotation marks, behind which it would swallow lines.
    cells = line.split("\t")
    if len(cells) != 3 or cells[0] != "to title":
        return cells, None
    return {"id": row_id, "text": cells[1], "summary": cells[2]}, "csl_ts"


def _from_json(line: str, row_id: str) -> tuple[Any, str | None]:
    """A row as it is, one of a known layout turned into ours, or what else stands there."""
    row = _object(line)
    if not row:
        return line, None
    if row.keys() == {"id", "abst", "title"}:
        return {"id": str(row["id"]), "text": row["abst"], "summary": row["title"]}, (
            "csl_title_public"
        )
    body, summary = first_column(row, BODIES), first_column(row, SUMMARIES)
    if body is None or summary is None:
        return row | {"id": str(row.get("id", row_id))}, None
    ours = {"id": str(row.get("id", row_id)), "text": row[body], "summary": row[summary]}
    if "meta" in row:
        ours["meta"] = row["meta"]
    return ours, None if (body, summary) == ("text", "summary") else "lcsts"


def _object(line: str) -> dict:
    """The object of a line, with small letters in its keys; an empty one if the line is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {key.strip().lower(): row[key] for key in row} if isinstance(row, dict) else {}


def read_predictions(path: Path) -> list[dict]:
    """The rows of a file of predictions.

    raises: DataError at the first line that is none
    """
    rows = []
    for number, line in numbered_lines(path):
        row = _object(line)
        if not all(isinstance(row.get(key), str) for key in PREDICTION_KEYS):
            raise DataError(
                f"{shown(path)}:{number}: wanted texts under {', '.join(PREDICTION_KEYS)}, found "
                f"{line[:80]!r}; eval_rouge.py --out writes such files"
            )
        rows.append({key: row[key] for key in PREDICTION_KEYS})
    if not rows:
        raise DataError(f"{shown(path)}: wanted predictions, found an empty file")
    return rows


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


def choose_systems(named: Sequence[Path], has_wordings: bool) -> dict[str, Path]:
    """The file of titles or the checkpoint of each system, by a name as short as can be.

    named: if empty the newest SFT run is taken
    raises: CheckpointError if there is none; ConfigError if one is named twice, or wordings are
        wanted of a file
    """
    given = [from_repo(one) for one in named or [chosen_run(None, kind="sft")]]
    paths = [p.resolve() if p.is_file() else find_checkpoint(p).resolve() for p in given]
    if len(set(paths)) < len(paths):
        raise ConfigError(
            f"wanted different systems, found the same checkpoint or file twice among "
            f"{', '.join(map(shown, paths))}; leave one out"
        )
    if has_wordings and paths[0].is_file():
        raise ConfigError("--wordings asks a checkpoint, the first system; name it first")
    places = [path.relative_to(REPO) if path.is_relative_to(REPO) else path for path in paths]
    for n_parts in (2, 3, 99):
        names = ["/".join(place.parts[-n_parts:]) for place in places]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, paths, strict=True))


def choose_out(out: Path | None, systems: Sequence[Path], found: SummarySet) -> Path:
    """Where the titles go; refuses at the start what would fail after the last title."""
    first = systems[0]
    usual = beside(first) / f"rouge-{found.label}-{first.name}.jsonl"
    if first.is_file():
        usual = first.with_name(f"{first.stem}-compared.jsonl")
    out = from_repo(out or usual)
    taken = [path.resolve() for path in (*found.files, *systems)]
    if out.resolve() in taken:
        raise ConfigError(f"--out {shown(out)} is the data; name a new .jsonl file")
    require_writable(out)
    return out


def describe(systems: Sequence[Path]) -> list[dict]:
    """Where each system lies, and the checksums by which it is known again."""
    return [
        {"path": shown(path), "sha256": sha256(path) if path.is_file() else checksums(path)}
        for path in systems
    ]


def write_titles(
    out: Path, found: SummarySet, lines: Sequence[System]
) -> Iterator[tuple[System, Path]]:
    """Write the titles that are new: the first system's to `out`, further ones beside it."""
    for number, line in enumerate((line for line in lines if line.seconds is not None), 1):
        place = out if number == 1 else out.with_name(f"{out.stem}-{number}{out.suffix}")
        rows = zip(found.rows, line.titles, strict=True)
        cells = ((row["id"], row["text"], row["summary"], title) for row, title in rows)
        write_rows(place, (dict(zip(PREDICTION_KEYS, c, strict=True)) for c in cells))
        yield line, place


def samples(found: SummarySet, lines: Sequence[System], n: int = 5) -> str:
    """A few rows with their titles, spread evenly over the set."""
    columns = {"text": found.column("text"), "reference": found.column("summary")}
    columns |= {line.name: line.titles for line in lines}
    chosen = sorted({i * (len(found.rows) - 1) // (n - 1) for i in range(n)})
    width = max(map(len, columns)) + 2
    return "\n\n".join(
        "\n".join(f"{name:<{width}}{' '.join(c[i].split())[:60]}" for name, c in columns.items())
        for i in chosen
    )
