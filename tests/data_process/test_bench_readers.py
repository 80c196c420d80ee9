"""Readers of benchmarks' training parts: dialogues from train, nothing from what is scored."""

import json

import pytest
from reading import EXPECTED, FIXTURES, raw, read, set_of

from data_process.decontaminate import overlap
from data_process.pipeline import make_clean
from data_process.run import ProcessConfig, chosen

BENCHMARKS = ("gsm8k", "math", "ape210k", "commonsenseqa", "boolq", "nq_open", "triviaqa", "quac")


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("part", ["val", "test"])
def test_nothing_is_learnt_from_a_part_that_is_scored(name, part):
    data_set, (place,) = set_of(name), EXPECTED[name]
    held_out = [record._replace(split=part) for record in raw(FIXTURES / place, data_set)]
    found = read(data_set, held_out)
    assert [item.reason for item in found] == ["scored_part"] * len(held_out)


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
        ((counts, _),) = make_clean(chosen(cfg), cfg)
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
