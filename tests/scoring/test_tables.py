"""The tables of scores: every protocol in its own columns, published figures in theirs alone."""

import numpy as np
import pytest

from babyllama.scoring import rouge, tables
from babyllama.scoring.tables import Published, System, table

REFERENCES = ["图像去噪的方法", "银杏", "2018年的研究"]
TITLES = ["一种图像去噪方法", "银杏树", "2019年研究研究研究"]
TEXTS = ["提出图像去噪方法。", "银杏树叶变黄。", "2018年做了研究。"]


def scored(titles: list[str], name: str = "ours") -> System:
    system = System(name, titles)
    system.score(TEXTS[: len(titles)], REFERENCES[: len(titles)])
    return system


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_means_are_those_of_the_measures_times_100():
    found = scored(TITLES).summary()
    assert len(found["rouge"]) == 3
    for measure in rouge.ROUGE_MEASURES:
        wanted = measure(TITLES, REFERENCES)
        for name, row in found["rouge"][wanted.measure].items():
            assert row["mean"] == pytest.approx(100 * wanted.f[name].mean())
            assert row["low"] <= row["mean"] <= row["high"]
    bleu = 100 * rouge.bleu_published(TITLES, REFERENCES).mean()
    assert found["bleu"]["mean"] == pytest.approx(bleu)


def test_published_systems_have_figures_of_the_first_protocol_alone():
    others = [Published("theirs", 29.6, 18.0, 28.0, None, "a paper")]
    head, ours, published, *_ = cells(tables.score_table([scored(TITLES)], others))
    assert [c for c in head if c.startswith(("R-", "BLEU"))][3] == "BLEU"
    assert ours.count("-") == 1 and len(ours) == 1 + 10 + 3
    assert published[-11:] == ["29.6", "18.0", "28.0", *["-"] * 8]


def test_columns_are_straight_where_a_character_takes_two_places():
    lines = table([["名字", 1.0], ["a", "10.0"], ["很长的名字", "-"]]).splitlines()
    assert {sum(1 + (ord(c) > 0x2E80) for c in line) for line in lines} == {10 + 2 + 4}


def test_nature_counts_loops_blanks_and_what_the_text_does_not_hold():
    found = tables.nature(TITLES, TEXTS)
    assert (found["n_with_number"], found["percent_wrong_number"]) == (1, 100)
    assert found["percent_repeated_4gram"] == pytest.approx(100 / 3)
    assert found["percent_novel_1grams"] > 0
    odd = tables.nature(["模型方法模型方法", "模型方法模型", "", " 方 法 "], ["模型方法的研究"] * 4)
    assert (odd["mean_length"], odd["percent_empty"], odd["percent_repeated_4gram"]) == (4, 25, 25)
    assert (odd["n_with_number"], odd["percent_wrong_number"]) == (0, None)
    half = tables.nature(["10人", "20人", "人"], ["10人来"] * 3)
    assert (half["n_with_number"], half["percent_wrong_number"]) == (2, 50)


def test_the_references_are_a_line_without_seconds():
    ours = scored(TITLES)
    ours.seconds = 2.5
    _, first, last, *_ = cells(tables.nature_table([ours], tables.nature(REFERENCES, TEXTS)))
    assert first[-2:] == ["1", "2.5"] and last[:2] == ["the", "references"] and last[-1] == "-"


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


def test_a_difference_is_that_of_the_means():
    a, b = scored(TITLES), scored(TEXTS)
    found = tables.differences(a, b)
    for ours, theirs in zip(a.rouge, b.rouge, strict=True):
        for name in rouge.ROUGE:
            gain = 100 * (ours.f[name].mean() - theirs.f[name].mean())
            assert found[ours.measure][name]["mean"] == pytest.approx(gain)
    gain = 100 * (a.bleu.mean() - b.bleu.mean())
    assert found[a.rouge[0].measure]["bleu"]["mean"] == pytest.approx(gain)
    assert "one minus two" in tables.difference_table(found, "one", "two")


def test_long_texts_are_told_of():
    long = scored(["方" * 900])
    assert "1 texts were too long for (1)" in tables.score_table([long], ())


def test_published_figures_are_plausible_and_never_shared_between_sets():
    sets = tables.published_sets()
    for systems in sets.values():
        for each in systems:
            figures = [f for f in (each.r1, each.r2, each.rl, each.bleu) if f is not None]
            assert figures and all(10 < f < 80 for f in figures) and each.source
            if each.r1 is not None:
                assert each.r2 < each.rl < each.r1
    assert not set(sets["csl_title_public"]) & set(sets["lcsts"]) and sets["csl_ts"] == []
    assert np.mean([each.r1 for each in sets["csl_title_public"]]) > 60
