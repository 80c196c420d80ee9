"""CSL's four task files joined: one row a paper, each in one part only."""

import json
import lzma
from pathlib import Path

import pytest

from babyllama.errors import DataError
from data_process.raw import records
from data_process.registry import data_sets
from release.recipe.papers import joined, write_parts

N = 40


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """N papers in four tasks; kg lacks the first, cls_ctg the second; ts has a test file beside."""
    root = tmp_path / "benchmark"
    tasks = {
        "ts/dev.tsv": [f"to title\t提出第{i}种方法.\t第{i}个题目" for i in range(N)],
        "ts/test.tsv": ["to title\t不该读的摘要.\t不该读的题目"],
        "kg/dev.tsv": [
            f"to keywords\t提出第{i}种方法. 第{i}个题目\t词{i}_方法" for i in range(1, N)
        ],
        "cls_dcp/dev.tsv": [f"to discipline\t提出第{i}种方法.\t作物学" for i in range(N)],
        "cls_ctg/dev.tsv": [f"to category\t第{i}个题目\t农学" for i in range(N) if i != 1],
    }
    for name, lines in tasks.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", "utf-8")
    return root


def main(benchmark: Path, out: Path, dev: float = 0.2) -> None:
    write_parts(out, joined(benchmark), dev)


def rows_of(out: Path, part: str) -> list[dict]:
    return [json.loads(line) for line in (out / f"{part}.jsonl").read_text("utf-8").splitlines()]


def test_every_paper_is_in_one_part_with_all_that_the_tasks_know_of_it(benchmark, tmp_path):
    main(benchmark, tmp_path / "out", dev=0.25)
    dev, train = (rows_of(tmp_path / "out", part) for part in ("dev", "train"))
    titles = [row["title"] for row in dev + train]
    assert sorted(titles) == sorted(f"第{i}个题目" for i in range(N))
    assert 0 < len(dev) < N / 2
    by_title = {row["title"]: row for row in dev + train}
    assert by_title["第7个题目"] == {
        "title": "第7个题目", "abstract": "提出第7种方法.", "keywords": ["词7", "方法"],
        "discipline": "作物学", "category": "农学",
    }  # fmt: skip
    assert "keywords" not in by_title["第0个题目"]
    assert "category" not in by_title["第1个题目"]


def test_a_paper_keeps_its_part_when_others_go(benchmark, tmp_path):
    main(benchmark, tmp_path / "all")
    path = benchmark / "ts" / "dev.tsv"
    path.write_text("\n".join(path.read_text("utf-8").splitlines()[N // 2 :]), "utf-8")
    main(benchmark, tmp_path / "half")
    whole = {row["title"] for row in rows_of(tmp_path / "all", "dev")}
    assert {row["title"] for row in rows_of(tmp_path / "half", "dev")} <= whole


def test_the_reader_of_csl_takes_the_rows_with_their_parts(benchmark, tmp_path):
    main(benchmark, tmp_path / "out")
    rows = list(data_sets("csl")[0].read(records(tmp_path / "out", "utf-8")))
    assert len(rows) == N and {row["split"] for row in rows} == {"train", "val"}
    assert {"keywords", "discipline", "category"} == set(rows[-1]["meta"])


def test_packed_files_are_read(benchmark, tmp_path):
    path = benchmark / "kg" / "dev.tsv"
    path.with_name("dev.tsv.xz").write_bytes(lzma.compress(path.read_bytes()))
    path.unlink()
    main(benchmark, tmp_path / "out")
    rows = rows_of(tmp_path / "out", "train") + rows_of(tmp_path / "out", "dev")
    assert sum("keywords" in row for row in rows) == N - 1


def test_a_missing_task_and_a_foreign_line_are_refused(benchmark, tmp_path):
    with pytest.raises(DataError, match="wanted data files"):
        main(benchmark / "ts", tmp_path / "out")
    (benchmark / "kg" / "dev.tsv").write_text("to title\ta.\tb\n", "utf-8")
    with pytest.raises(DataError, match=r"kg.*wanted abstract and keywords, found"):
        main(benchmark, tmp_path / "out")
    assert not (tmp_path / "out").exists()
