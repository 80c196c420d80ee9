"""The table of data sets: complete, aligned also with Chinese text, and true to the disk."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest

from data_process.registry import Source, catalog, data_sets
from data_process.tools.list import (
    LONGEST,
    aligned,
    cells,
    described,
    markdown,
    on_disk,
    shortened,
    width,
)


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


def test_json_tells_of_every_set_what_is_on_the_disk(script, root):
    found = script("data_process/tools/list.py", "--root", root, "--json").out.splitlines()
    entries = {entry["name"]: entry for entry in map(json.loads, found)}
    assert list(entries) == [*catalog(), "朋友圈"]
    assert entries["csl"]["raw_bytes"] == 2000 and entries["csl"]["raw_unfinished"]
    assert entries["csl"]["rows_kept"] == 12345
    assert entries["csl"]["tokens"] == {"a": 770, "b": 5}
    assert (entries["朋友圈"]["kind"], entries["朋友圈"]["rows_kept"]) == ("chat", 3)
    assert entries["inews"]["raw_bytes"] == 0 and entries["inews"]["rows_kept"] is None


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


def test_markdown_holds_the_same_with_links(script, root):
    lines = script("data_process/tools/list.py", "--root", root, "--markdown").out.splitlines()
    assert len(lines) == len(catalog()) + 3
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert set(lines[1]) <= set("| -")
    for name in catalog():
        source = data_sets(name)[0].source
        (line,) = (line for line in lines if line.startswith(f"| {name} |"))
        for address in (f"huggingface.co/datasets/{source.huggingface}",
                        f"www.modelscope.cn/datasets/{source.modelscope}"):  # fmt: skip
            assert address.endswith("/") or f"](https://{address})" in line


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
def test_where_a_set_comes_from(source, wanted, tmp_path):
    entry = described(replace(data_sets("csl")[0], source=source)) | on_disk("csl", tmp_path)
    assert cells(entry)["from"] == wanted


def test_a_page_is_linked_only_if_it_is_one(tmp_path):
    for home, link in [("github.com/a/b (part c)", "[by hand](https://github.com/a/b)"),
                       ("your own files of text", "by hand")]:  # fmt: skip
        entry = described(replace(data_sets("csl")[0], source=Source(home)))
        assert cells(entry | on_disk("csl", tmp_path), linked=True)["from"] == link


def test_widths_count_what_a_terminal_shows():
    assert [width(text) for text in ("", "ab", "资料", "a资b", "e\u0301", "Ａ")] == [
        0,
        2,
        4,
        4,
        1,
        2,
    ]
    for text in ("短", "资" * 20, "资" * 40, "a" * 40, "a资" * 20):
        short = shortened(text)
        assert width(short) <= LONGEST and (short == text or short.endswith("…"))
        assert text.startswith(short.rstrip("…"))
    assert aligned([{"a": "资", "b": "x"}, {"a": "ab", "b": "y"}]).split("\n") == [
        "a   b",
        "资  x",
        "ab  y",
    ]


def test_a_cell_cannot_break_a_markdown_table():
    assert markdown([{"a": "x|y\nz"}]) == "| a |\n| --- |\n| x\\|y z |"


def test_mistakes_are_one_line(script, root):
    assert "leave one out" in script("data_process/tools/list.py", "--json", "--markdown").error
    assert "nosuch" in script("data_process/tools/list.py", "--nosuch").error
    write(root / "clean/csl/counts.json", "{")
    assert (
        "clean/csl/counts.json: wanted"
        in script("data_process/tools/list.py", "--root", root).error
    )
