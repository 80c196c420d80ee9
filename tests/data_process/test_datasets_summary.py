"""Readers of summaries and of CSL's tasks: what becomes of each row of the fixtures, and why."""

import pytest
from reading import SHARED, fault, raw, read, reason, set_of

from data_process.datasets import pairs
from data_process.raw import Record

# The real files: rows by split, and Skips by reason.
REAL = {
    ("csl", "csl/benchmark"): {"val": 1000, "other_task": 11_000},
    ("csl", "csl/csl_title_public"): {"train": 3000, "val": 250},
    ("csl_keywords", "csl/benchmark"): {"val": 1000, "other_task": 11_000},
    ("csl_keywords", "science_abstracts/fewclue_csl.jsonl.xz"): {None: 659, "no_keywords": 681},
    ("csl_discipline", "csl/benchmark"): {"val": 1000, "other_task": 11_000},
    ("csl_discipline", "science_abstracts/fewclue_csldcp.jsonl.xz"): {
        None: 5870,
        "no_discipline": 2985,
    },
    ("csl_category", "csl/benchmark"): {"train": 8000, "val": 1000, "other_task": 3000},
    ("lcsts", "lcsts"): {"test": 362},
    ("news_title", "news_zh/inews_dev.jsonl.xz"): {"val": 689},
}


@pytest.mark.parametrize(("name", "place"), REAL)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_real_files_give_the_published_numbers_of_rows(name, place):
    data_set = set_of(name)
    items = read(data_set, raw(SHARED / place, data_set))
    found = [item.get("split") if isinstance(item, dict) else reason(item) for item in items]
    assert {kind: found.count(kind) for kind in set(found)} == REAL[name, place]
    rows = [item for item in items if isinstance(item, dict)]
    assert not any(fault(data_set, row) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


# CSL.


@pytest.mark.parametrize("keywords", ["甲_乙", " 甲 __乙_", ["甲", "", " 乙"]])
def test_keywords_are_the_same_list_however_they_are_written(keywords):
    data = {"title": "题", "abst": "摘要.", "keyword": keywords}
    (row,) = read(set_of("csl"), [Record(0, "a:1", None, data)])
    assert row["meta"] == {"keywords": ["甲", "乙"]}


@pytest.mark.parametrize(("label", "wanted"), [("土木工程", None), ("1", "no_discipline"),
                                               (1, "no_discipline"), (0, "false_keywords"),
                                               (None, "no_discipline")])  # fmt: skip
def test_only_a_name_is_taken_for_a_discipline(label, wanted):
    data = {"abst": "摘要.", "keyword": ["甲"], "label": label}
    (item,) = read(set_of("csl_discipline"), [Record(0, "a:1", None, data)])
    assert reason(item) == wanted


# LCSTS.


def block(label: str = "", body: str = "正文。", end: str = "</doc>") -> list[str]:
    texts = ["<doc id=0>", label, "<summary>", "摘要", "</summary>", "<short_text>", body,
             "</short_text>", end]  # fmt: skip
    return [text for text in texts if text]


def read_lcsts(lines: list[str], file: str) -> list:
    entries = [Record(n, f"{file}:{n + 1}", None, text) for n, text in enumerate(lines)]
    return list(pairs.lcsts(entries))


@pytest.mark.parametrize(("file", "split"), [("DATA/PART_I.txt", "train"), ("PART_II.txt", "val"),
                                             ("x.zip/PART_III.txt", "test")])  # fmt: skip
@pytest.mark.parametrize("label", range(1, 6))
def test_labels_under_three_are_left_out_and_parts_are_the_official_split(file, split, label):
    (item,) = read_lcsts(block(f"    <human_label>{label}</human_label>"), file)
    assert reason(item) == ("low_label" if label < 3 else None)
    assert label < 3 or item["split"] == split


def test_held_out_texts_keep_their_lead_so_that_scores_can_be_compared():
    bodies = [read_lcsts(block(body="【快讯】正文。"), f"PART_{part}.txt")[0]["text"]
              for part in ("I", "II", "III")]  # fmt: skip
    assert bodies == ["正文。", "【快讯】正文。", "【快讯】正文。"]


def test_an_endless_block_is_read_in_bounded_memory_and_its_lines_are_counted():
    lines = block(end="没有结尾") + ["还有一行"] * 500
    items = read_lcsts(lines, "PART_I.txt")
    assert {reason(item) for item in items} == {"outside_block!", "cut_block!"}
    assert len(items) == len(lines) - 1 - pairs.MOST_LINES
    assert not set_of("lcsts").split_files, "a block has several lines"


# News.


@pytest.mark.parametrize("name", ["news", "inews"])
def test_documents_and_headlines_are_made_of_the_same_articles(name):
    documents, headlines = set_of(name), set_of(f"{name}_title")
    assert (documents.ids, documents.shares) == (headlines.ids, headlines.shares)
    assert documents.refused_count and headlines.refused_count, "they agree on duplicates"
    assert documents.reader == headlines.reader
    row = {"id": 0, "text": "正文。", "summary": "标题"}
    assert documents.finished(row) == {"id": 0, "text": "标题\n正文。"}
    assert headlines.finished(row) == row
