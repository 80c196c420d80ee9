"""The four tasks of CSL's benchmark put together again: one row a paper, with all that is known of it.

    python -m release.recipe.csl_papers data/raw/csl/benchmark --out data/raw/csl_papers
    python -m data_process.run csl --name csl_papers --raw data/raw/csl_papers --tokenizer FILE

The tasks' dev files (or train files) hold the same papers, but each states another field. Apart,
a paper may be trained on in one file and judged by another; together it is in one part only, and
rows with keywords and disciplines get second turns. Writes train.jsonl and dev.jsonl with the keys
title, abstract, keywords, discipline, category; dev.jsonl also serves as --evaluation for other sets.
"""  # noqa: E501

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import write_rows
from data_process.columns import Refused
from data_process.datasets.csl import paper_of
from data_process.raw import Skip, records
from data_process.stages import share_of

# Where each field beside title and abstract stands.
FOLDERS = {"keywords": "kg", "discipline": "cls_dcp", "category": "cls_ctg"}
SPLIT = {"dev": "val", "train": "train"}


@dataclass(frozen=True)
class PapersConfig:
    """Files that are put together.

    Args:
        benchmark: folder with ts, kg, cls_dcp and cls_ctg, as in CSL's repository
        out: folder for train.jsonl and dev.jsonl
        part: the files that are read, dev or train (.tsv or .tsv.xz)
        dev_share: papers that are kept for validation, by a hash of their abstract
    """

    benchmark: Path
    out: Path = Path("data/raw/csl_papers")
    part: Literal["dev", "train"] = "dev"
    dev_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.dev_share < 1:
            raise ConfigError(f"--dev_share: wanted between 0 and 1, found {self.dev_share:g}")


def task(cfg: PapersConfig, folder: str, *wanted: str) -> Iterator[dict]:
    """The papers of one task's files, as far as its lines state them.

    raises: DataError if a line is not one of the task's
    """
    place = from_repo(cfg.benchmark) / folder
    if not place.is_dir():
        raise DataError(
            f"{shown(place)}: wanted the folders ts, kg, cls_dcp and cls_ctg of CSL's benchmark, "
            f"found none of that name; see github.com/ydli-ai/CSL"
        )
    for record in records(place, "utf-8"):
        try:
            paper = None if isinstance(record, Skip) else paper_of(record, *wanted)
        except Refused:
            paper = None
        if paper is None or isinstance(record, Skip):
            found = record.sample if isinstance(record, Skip) else str(record.data)
            raise DataError(
                f"{shown(place)}, {record.where}: wanted {' and '.join(wanted)}, found "
                f"{found[:60]!r}; take the file from CSL's repository again"
            )
        if record.split == SPLIT[cfg.part]:
            yield paper


def joined(cfg: PapersConfig) -> list[dict]:
    """The papers of ts with what the other tasks know of them.

    kg has abstract, a space and title; cls_dcp the abstract; cls_ctg the title.
    """
    known = {field: {} for field in FOLDERS}
    for field, folder in FOLDERS.items():
        by = "title" if field == "category" else "abstract"
        for paper in task(cfg, folder, by, field):
            known[field][paper[by]] = paper[field]
    rows = []
    for paper in task(cfg, "ts", "abstract", "title"):
        abstract, title = paper["abstract"], paper["title"]
        keys = {"keywords": f"{abstract} {title}", "discipline": abstract, "category": title}
        found = {f: known[f][key] for f, key in keys.items() if key in known[f]}
        rows.append({"title": title, "abstract": abstract} | found)
    if not rows:
        raise DataError(
            f"{shown(from_repo(cfg.benchmark))}: wanted {cfg.part}.tsv in ts, found no row of that "
            f"part; the parts there are named by their files, see --part"
        )
    return rows


def main(cfg: PapersConfig) -> None:
    """Join, divide, write."""
    rows, out = joined(cfg), from_repo(cfg.out)
    held_out = [share_of(row["abstract"]) < cfg.dev_share for row in rows]
    for name, is_dev in (("dev", True), ("train", False)):
        part = [row for row, held in zip(rows, held_out, strict=True) if held == is_dev]
        n = write_rows(out / f"{name}.jsonl", part)
        with_field = {f: sum(f in row for row in part) for f in FOLDERS}
        print(f"{shown(out / name)}.jsonl: {n} papers, with " + ", ".join(
            f"{field} {count}" for field, count in with_field.items()))  # fmt: skip


if __name__ == "__main__":
    run(main, parse(PapersConfig, __doc__, positional=("benchmark",)))
