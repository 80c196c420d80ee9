"""Readers of benchmarks' training parts: dialogues from train, nothing from what is scored."""

import json

import pytest
from reading import FIXTURES, check_wrong_types, fault, raw, read, set_of
from test_datasets_chat import told

from data_process.decontaminate import overlap
from data_process.pipeline import make_clean
from data_process.raw import Skip
from data_process.run import ProcessConfig, chosen, settings_of

STEPS = "请一步一步计算，最后写“答案是”和得数。"

EXPECTED = {
    "gsm8k_train.jsonl": [
        (0, "train", f"U:Tom has 3 pens and buys 4 more. How many pens does he have?\n{STEPS}",
         "A:He has 3+4=7 pens.\n答案是7"),
        (1, "train", f"U:A farm sells 1,200 eggs and then 34. How many?\n{STEPS}",
         "A:1200+34=1,234.\n答案是1234"),
        "no_answer",
        "no_question!",
    ],
    "math_train.jsonl": [
        (0, "train", "U:What is $1+1$?\n请写出解题过程，并把最后结果写在 \\boxed{} 里。",
         "A:Adding gives $\\boxed{2}$."),
        "no_answer",
        "wrong_keys!",
    ],
    "ape210k_train.json": [
        (0, "train", "U:小明有3个苹果，又买了4个，现在有几个？\n请列出算式，再写出得数。",
         "A:x=3+4\n答案是7"),
        (1, "train", "U:一根绳子长(3/4)米，用去(1/4)米，还剩几米？\n请列出算式，再写出得数。",
         "A:x=(3/4)-(1/4)\n答案是(1/2)"),
        "no_answer",
    ],
    "commonsenseqa_train.jsonl": [
        (0, "train",
         "U:Where do you buy bread?\nA. river\nB. bakery\n请写出正确选项的字母和内容。",
         "A:B. bakery"),
        (1, "train", "U:Where do fish live?\nA. water\nB. sky\n请写出正确选项的字母和内容。",
         "A:A. water"),
        "no_answer",
    ],
    "boolq_train.jsonl": [
        (0, "train", "S:Water is a liquid that wets.", "U:is water wet？\n请用“是”或“否”回答。",
         "A:是"),
        (1, "train", "S:Fire is hot.", "U:is fire cold？\n请用“是”或“否”回答。", "A:否"),
        (2, "train", "S:Ice floats on water.", "U:does ice sink？\n请用“是”或“否”回答。", "A:否"),
        "no_answer",
    ],
    "nq_open_train.jsonl": [
        (0, "train", "U:who wrote hamlet？\n请用几个词回答。", "A:William Shakespeare"),
        "no_answer",
    ],
    "triviaqa_train.json": [
        (0, "train", "U:Which planet is red?\n请用几个词回答。", "A:Mars"),
        "no_answer",
    ],
    "quac_train.json": [
        (0, "train", "S:Tea was first drunk in China. It reached Europe later. ",
         "U:Where was tea first drunk?", "A:in China", "U:Who drank it?", "A:无法回答"),
    ],
}  # fmt: skip


def name_of(place: str) -> str:
    return place.split(".")[0].removesuffix("_train")


@pytest.mark.parametrize("place", EXPECTED)
def test_every_record_becomes_the_expected_rows_and_skips(place):
    data_set = set_of(name_of(place))
    items = read(data_set, raw(FIXTURES / place, data_set))
    assert [told(item) for item in items] == EXPECTED[place]
    rows = [item for item in items if not isinstance(item, Skip)]
    assert not any(fault(data_set, row, fixed=True) for row in rows)


@pytest.mark.parametrize("place", EXPECTED)
@pytest.mark.parametrize("part", ["val", "test"])
def test_nothing_is_learnt_from_a_part_that_is_scored(place, part):
    data_set = set_of(name_of(place))
    held_out = [record._replace(split=part) for record in raw(FIXTURES / place, data_set)]
    found = read(data_set, held_out)
    assert [item.reason for item in found] == ["scored_part"] * len(held_out)


@pytest.mark.parametrize("place", EXPECTED)
def test_a_wrong_type_anywhere_is_counted_and_never_raises(place):
    check_wrong_types(set_of(name_of(place)), FIXTURES / place, fixed=True)


def test_english_dialogues_with_short_answers_pass_the_rules(tmp_path):
    """The usual rules would drop all of them as not Chinese; a leak into the test part goes."""
    evaluation = tmp_path / "test.jsonl"
    question = "Tom has 3 pens and buys 4 more. How many pens does he have?"
    evaluation.write_text(f'{{"question": "{question}"}}\n', "utf-8")
    for names, wanted in ((), 2), ((evaluation,), 1):
        cfg = ProcessConfig(
            dataset="gsm8k", raw=FIXTURES / "gsm8k_train.jsonl", out=tmp_path / str(wanted),
            max_bad=1.0, evaluation=names,
        )  # fmt: skip
        ((counts, _),) = make_clean(chosen(cfg), settings_of(cfg))
        assert counts["rows_out"] == wanted, counts["dropped"]


# What a benchmark has in common with training rows.

LEAK = "小明的妈妈在果园里摘了三十六个苹果，平均装进四个篮子里，每个篮子里有几个苹果呢？"
OTHER = "一列火车早上八点从北京开往上海，每小时行三百公里，全长一千三百公里，几点到达终点站？"


def test_a_question_counts_if_half_of_it_stands_in_the_rows(tmp_path):
    rows = [tmp_path / "train-00000.jsonl", tmp_path / "train-00001.jsonl"]
    for path, text in zip(
        rows, ("前言。" + LEAK + "后记。", "无关的话，说的是天气。" * 5), strict=True
    ):
        row = {"id": f"{path.stem}/0", "text": text}
        path.write_text(json.dumps(row, ensure_ascii=False) + "\n", "utf-8")
    texts = {"whole": LEAK, "none": OTHER, "little": LEAK[:20] + OTHER * 3, "short": LEAK[:9],
             "with options": f"{LEAK}\0九个\0八个"}  # fmt: skip
    asked = [{"group": name, "text": text} for name, text in texts.items()]
    found = overlap(asked, rows)
    assert found["groups"] == {"whole": 1, "none": 0, "little": 0, "short": 0, "with options": 1}
    assert found["short"]["short"] == 1 and found["short"]["whole"] == 0
    assert overlap(asked, rows[1:])["groups"] == dict.fromkeys(texts, 0)


def test_wording_that_many_questions_share_is_no_leak(tmp_path):
    path = tmp_path / "train-00000.jsonl"
    path.write_text(json.dumps({"id": "x/0", "text": LEAK}, ensure_ascii=False) + "\n", "utf-8")
    asked = [{"group": "x", "text": f"{LEAK}{n}"} for n in range(21)]
    assert overlap(asked, [path])["groups"] == {"x": 0}
    assert overlap(asked[:20], [path])["groups"] == {"x": 20}
