"""The table of data sets: complete, aligned also with Chinese text, and true to the disk."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from data_process.registry import Source, catalog, data_sets
from data_process.tools.list import described


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data directory: csl with raw files, rows and tokens, and a set of the user's own."""
    write(tmp_path / "raw/csl/train.tsv", "x" * 1500)
    write(tmp_path / "raw/csl/dev/dev.tsv.part", "y" * 500)
    write(tmp_path / "raw/csl/.fetch.lock", "")
    write(tmp_path / "clean/csl/counts.json", '{"rows_out": 12345}')
    own = {"kind": "chat", "license": "我的", "source": "mine", "rows_out": 3}
    write(tmp_path / "clean/朋友圈/counts.json", json.dumps(own))
    for tokenizer, split, n in [("a", "train", 700), ("a", "val", 70), ("b", "train", 5)]:
        stem = tmp_path / f"tokens/{tokenizer}/csl/{split}-00000"
        write(stem.with_suffix(".done"), json.dumps({"key": "k", "counts": {"tokens": n}}))
        write(stem.with_suffix(".bin"), "ids")
    write(tmp_path / "tokens/b/csl/val-00000.done", '{"counts": {"tokens": 9}}')  # its .bin is gone
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def columns_of(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def test_the_columns_of_the_table_stand_below_each_other(script, root):
    header, *lines = script("data_process/tools/list.py", "--root", root).out.splitlines()
    assert len(lines) == len(catalog()) + 1
    start = columns_of(header[: header.index("from")])
    for line, name in zip(lines, [*catalog(), "朋友圈"], strict=True):
        assert line.startswith(name)
        before = next(n for n in range(len(line) + 1) if columns_of(line[:n]) >= start)
        assert columns_of(line[:before]) == start and line[before - 2 : before] == "  "
    (csl,) = (line for line in lines if line.startswith("csl "))
    assert all(text in csl for text in ("2.00kB, unfinished", "12,345", "a 770, b 5"))
    assert {"chat", "我的", "3"} <= set(lines[-1].split())


def test_columns_without_an_entry_are_left_out(script, tmp_path):
    header = script("data_process/tools/list.py", "--root", tmp_path).out.splitlines()[0]
    assert "from" in header.split() and not {"raw", "kept", "tokens"} & set(header.split())


@pytest.mark.parametrize(
    "source, wanted",
    [
        (Source("h", huggingface="a/b", modelscope="c/d"), "HF, ModelScope"),
        (Source("h", huggingface="a/b", manual="or by hand"), "HF"),
        (Source("h", urls=("https://x/y",)), "URL"),
        (Source("h", manual="fill in the form"), "by hand"),
        (Source("h"), "by hand"),
    ],
)
def test_where_a_set_comes_from(source, wanted):
    assert described(replace(data_sets("csl")[0], source=source))["from"] == wanted


def test_mistakes_are_one_line(script, root):
    assert "nosuch" in script("data_process/tools/list.py", "--nosuch").error
    write(root / "clean/csl/counts.json", "{")
    assert (
        "clean/csl/counts.json: wanted"
        in script("data_process/tools/list.py", "--root", root).error
    )
