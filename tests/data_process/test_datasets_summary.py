"""Readers of summaries and of CSL's tasks: what becomes of each row of the fixtures, and why."""

import pytest
from reading import FIXTURES, SHARED, check_wrong_types, fault, raw, read, reason, set_of

from data_process.datasets import pairs
from data_process.raw import Record, Skip

KEYWORDS = "请列出下面这篇论文的关键词：\n"
DISCIPLINE = "下面这篇论文摘要属于哪个学科？\n"
CATEGORY = "下面这个论文标题属于哪个学科门类？\n"
META = {"keywords": ["注意力", "分类"], "discipline": "计算机科学与技术", "category": "工学"}
RICE = {"keywords": ["水稻", "育种"], "discipline": "作物学", "category": "农学"}

# What comes of every record: (id, split, text, summary, meta), or a Skip's reason, with "!" if the
# line is damaged. Questions and answers stand where texts and summaries do.
EXPECTED = {
    ("csl", "csl.train.tsv"): [
        (0, "train", '"提出一种分类方法,先提取词向量,再计算权重.', '基于"注意力"的分类方法'),
        "other_task",
        "other_task",
        "other_task",
        (4, "train", "提出一种分类方法.", "基于注意力的分类方法", META),
        (5, "train", "旧版的摘要.", "旧版的标题"),
        "no_title!",
        "wrong_columns!",
    ],
    ("csl", "csl.title_dev.json"): [
        (0, "val", "提出一种保持细节的变形算法.", "保持细节的网格变形算法"),
        (1, "val", "研究了水稻.", "水稻育种", RICE),
        "no_title",
        "no_title",
        "no_title",
        "false_keywords",
        "wrong_type!",
    ],
    ("csl_keywords", "csl.train.tsv"): [
        "other_task",
        (1, "train", f"{KEYWORDS}提出一种分类方法. 基于注意力的分类方法", "注意力、分类、词向量"),
        "other_task",
        "other_task",
        (4, "train", f"{KEYWORDS}提出一种分类方法. 基于注意力的分类方法", "注意力、分类"),
        "other_task",
        "other_task",
        "wrong_columns!",
    ],
    ("csl_keywords", "csl.title_dev.json"): [
        "no_keywords",
        (1, "val", f"{KEYWORDS}研究了水稻. 水稻育种", "水稻、育种"),
        "no_keywords",
        "no_keywords",
        (4, "val", f"{KEYWORDS}真的关键词.", "桥、梁"),
        "false_keywords",
        "wrong_type!",
    ],
    ("csl_discipline", "csl.train.tsv"): [
        "other_task",
        "other_task",
        (2, "train", f"{DISCIPLINE}提出一种分类方法.", "计算机科学与技术"),
        "other_task",
        (4, "train", f"{DISCIPLINE}提出一种分类方法.", "计算机科学与技术"),
        "other_task",
        "other_task",
        "wrong_columns!",
    ],
    ("csl_discipline", "csl.title_dev.json"): [
        "no_discipline",
        (1, "val", f"{DISCIPLINE}研究了水稻.", "作物学"),
        "no_discipline",
        (3, "val", f"{DISCIPLINE}有标签的摘要.", "土木工程"),
        "no_discipline",
        "false_keywords",
        "wrong_type!",
    ],
    ("csl_category", "csl.train.tsv"): [
        "other_task",
        "other_task",
        "other_task",
        (3, "train", f"{CATEGORY}基于注意力的分类方法", "工学"),
        (4, "train", f"{CATEGORY}基于注意力的分类方法", "工学"),
        "other_task",
        "other_task",
        "wrong_columns!",
    ],
    ("lcsts", "lcsts.PART_I.txt"): [
        (0, "train", "本市新增两条线路，票价 <2 元 & 全程可刷卡。", "两条公交线路下周试运行"),
        "outside_block!",
        "cut_block!",
        (12, "train", "【暴雨来袭】今晚有雨，\n请带伞。", "暴雨来袭"),
        "no_summary",
        "cut_block!",
    ],
    ("lcsts", "lcsts.PART_II.txt"): [
        "low_label",
        (9, "val", "【快讯】文字乙。", "相关的摘要"),
    ],
    ("lcsts", "lcsts.rows.jsonl"): [
        (0, None, "【】本市新增两条公交线路。", "两条公交线路"),
        (1, None, "原文", "摘要"),
        "low_label",
        "no_summary",
        "unknown_columns",
    ],
    ("nlpcc2017", "nlpcc2017.train_with_summ.txt"): [
        (0, "train", "本市新增两条线路。\n将于下周一开始。", "两条公交线路下周试运行。"),
        "no_summary",
        "unknown_columns",
        "no_text",
    ],
    ("nlpcc2017", "nlpcc2017.wrapped.json"): [
        (0, None, "图书馆本周起开放到十点。", "图书馆延长开放。"),
        "no_text",
    ],
    ("nlpcc2017", "nlpcc2017.bare.json"): [
        (0, None, "图书馆本周起开放到十点。", "图书馆延长开放。"),
    ],
    ("news_title", "news.json"): [
        (0, None, "本市新增两条线路。\n下周一开始。", "两条公交线路试运行"),
        (1, None, "图书馆本周起开放到晚上十点。", "图书馆 延长开放"),
        "no_summary",
        "no_text",
        "no_text",
    ],
}

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


def told(item: dict | Skip) -> object:
    """The short form of a row or a Skip in which EXPECTED is written."""
    if isinstance(item, Skip):
        return reason(item)
    texts = [m["content"] for m in item.get("messages", ())] or [item["text"], item["summary"]]
    meta = (item["meta"],) if "meta" in item else ()
    return (item["id"], item.get("split"), *texts, *meta)


@pytest.mark.parametrize(("name", "place"), EXPECTED)
def test_every_record_becomes_the_expected_rows_and_skips(name, place):
    data_set = set_of(name)
    items = read(data_set, raw(FIXTURES / place, data_set))
    assert [told(item) for item in items] == EXPECTED[name, place]
    assert not any(fault(data_set, item) for item in items if not reason(item))


@pytest.mark.parametrize(("name", "place"), EXPECTED)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(name, place):
    check_wrong_types(set_of(name), FIXTURES / place, fixed=False)


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
