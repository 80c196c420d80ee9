"""The four tasks of CSL's benchmark put together again: one row a paper, with all that is known of it.

    python -m release.recipe.csl_papers data/raw/csl/benchmark --out data/raw/csl_papers
    python -m data_process.run csl --name csl_papers --raw data/raw/csl_papers --tokenizer FILE

The tasks' dev files hold the same papers, but each states another field. Apart,
a paper may be trained on in one file and judged by another; together it is in one part only, and
rows with keywords and disciplines get second turns. Writes train.jsonl and dev.jsonl with the keys
title, abstract, keywords, discipline, category; dev.jsonl also serves as --evaluation for other sets.
"""  # noqa: E501

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import write_rows
from data_process.columns import Refused
from data_process.datasets.csl import paper_of
from data_process.raw import Skip, records
from data_process.stages import share_of

# Where each field beside title and abstract stands.
FOLDERS = {"keywords": "kg", "discipline": "cls_dcp", "category": "cls_ctg"}


@dataclass(frozen=True)
class PapersConfig:
    """Files that are put together.

    Args:
        benchmark: folder with ts, kg, cls_dcp and cls_ctg, as in CSL's repository
        out: folder for train.jsonl and dev.jsonl
        dev_share: papers that are kept for validation, by a hash of their abstract
    """

    benchmark: Path
    out: Path = Path("data/raw/csl_papers")
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
            if isinstance(record, Skip):
                raise Refused(record.reason)
            paper = paper_of(record, *wanted)
        except Refused:
            found = record.sample if isinstance(record, Skip) else str(record.data)
            raise DataError(
                f"{shown(place)}, {record.where}: wanted {' and '.join(wanted)}, found "
                f"{found[:60]!r}; take the file from CSL's repository again"
            ) from None
        if record.split == "val":
            yield paper


def joined(cfg: PapersConfig) -> list[dict]:
    """The papers of ts with what the other tasks know of them.

    kg has abstract, a space and title; cls_dcp the abstract; cls_ctg the title.
    """
    known = {}
    for field, folder in FOLDERS.items():
        by = "title" if field == "category" else "abstract"
        known[field] = {paper[by]: paper[field] for paper in task(cfg, folder, by, field)}
    rows = []
    for paper in task(cfg, "ts", "abstract", "title"):
        abstract, title = paper["abstract"], paper["title"]
        keys = {"keywords": f"{abstract} {title}", "discipline": abstract, "category": title}
        found = {f: known[f][key] for f, key in keys.items() if key in known[f]}
        rows.append({"title": title, "abstract": abstract} | found)
    if not rows:
        raise DataError(
            f"{shown(from_repo(cfg.benchmark))}: wanted dev.tsv in ts, found no row of that part; "
            f"the parts there are named by their files"
        )
    return rows


def main(cfg: PapersConfig) -> None:
    """Join, divide, write."""
    rows, out = joined(cfg), from_repo(cfg.out)
    for name in ("dev", "train"):
        part = [r for r in rows if (share_of(r["abstract"]) < cfg.dev_share) == (name == "dev")]
        n = write_rows(out / f"{name}.jsonl", part)
        known = ", ".join(f"{field} {sum(field in row for row in part)}" for field in FOLDERS)
        print(f"{shown(out / name)}.jsonl: {n} papers, with {known}")


if __name__ == "__main__":
    run(main, parse(PapersConfig, __doc__, positional=("benchmark",)))
