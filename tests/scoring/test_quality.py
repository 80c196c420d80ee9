"""What titles are like, and what copying scores: laws on small texts."""

import pytest

from babyllama.scoring import rouge, tables
from babyllama.scoring.rouge import clipped_pair


def test_statistics_count_loops_and_blanks():
    titles = ["模型方法模型方法", "模型方法模型", "", " 方 法 "]
    found = tables.statistics(titles, ["模型方法的研究"] * 4)
    assert (found["mean_length"], found["share_empty"]) == (4.0, 0.25)
    assert found["share_repeated_4gram"] == 0.25
    assert (found["n_with_number"], found["share_wrong_number"]) == (0, None)


def test_a_loop_is_a_run_of_four_that_comes_twice():
    assert tables.repeats_ngram("哈哈哈哈哈") and not tables.repeats_ngram("哈哈哈哈")


def test_a_copy_has_nothing_new_and_a_foreign_text_nothing_else():
    text = "基于 ＡＢ 模型的研究方法，提高了 3.14 倍"
    for n in (1, 2, 4):
        assert tables.novelty("ab模型的研究", text, n) == 0
        assert tables.novelty("银杏叶子变黄", text, n) == 1
    assert tables.novelty("模型新", text, 2) == 0.5
    assert tables.novelty("新", text, 2) is None


@pytest.mark.parametrize(
    "title, text, wrong",
    [
        ("增长３０%", "增长了30%。", set()),
        ("共1,000人", "1000人参加", set()),
        ("3.14倍", "3.1倍到4倍", {"3.14"}),
        ("2007年的10项", "2008年，10项", {"2007"}),
        ("第一种", "无", set()),
    ],
)
def test_a_number_that_the_text_does_not_hold_is_wrong(title, text, wrong):
    assert tables.wrong_numbers(title, text) == wrong


def test_wrong_numbers_are_a_share_of_the_titles_with_numbers():
    found = tables.statistics(["10人", "20人", "人"], ["10人来"] * 3)
    assert (found["n_with_number"], found["share_wrong_number"]) == (2, 0.5)


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("目的。方法。", "目的"),
        ("目的. 方法.", "目的"),
        ("What?是", "What"),
        ("提高了3.14倍!好", "提高了3.14倍"),
        ("  \n标题\n正文。", "标题"),
        ("！目的！方法", "目的"),
        ("没有句号", "没有句号"),
        ("。", "。"),
    ],
)
def test_first_sentence(text, sentence):
    assert rouge.first_sentence(text) == sentence


def test_first_characters():
    assert rouge.first_characters("\n" + "一" * 30) == "一" * 25


@pytest.mark.parametrize(
    "text, clause",
    [
        ("针对问题，提出方法。好", "针对问题"),
        ("共1,000人:好", "共1,000人"),
        ("在12:30，来", "在12:30"),
        ("没有", "没有"),
    ],
)
def test_first_clause(text, clause):
    assert rouge.first_clause(text) == clause


def test_no_sentence_is_more_like_the_reference_than_the_best():
    text = "本文研究了很多东西。提出一种图像去噪的方法！实验表明有效。"
    title = "图像去噪方法"
    best = rouge.best_sentence(text, title)
    assert best == "提出一种图像去噪的方法"
    for sentence in rouge.parts(text):
        assert sum(clipped_pair(sentence, "图像去噪方法")) <= sum(
            clipped_pair(best, "图像去噪方法")
        )


def test_every_baseline_has_a_line_for_each_text():
    found = rouge.copies(["一。二。", "三"], ["二", "四"])
    assert {len(lines) for lines in found.values()} == {2} and len(found) == 4
    assert found["best sentence (knows the reference)"] == ["二", "三"]
