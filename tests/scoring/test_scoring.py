"""The tables of scores: every protocol on its own columns, published figures on theirs alone."""

import numpy as np
import pytest

from babyllama.scoring import rouge, tables
from babyllama.scoring.tables import CSL_TITLE_PUBLIC, LCSTS, SETS

REFERENCES = ["图像去噪的方法", "银杏", "2018年的研究"]
TITLES = ["一种图像去噪方法", "银杏树", "2019年研究研究研究"]
TEXTS = ["提出图像去噪方法。", "银杏树叶变黄。", "2018年做了研究。"]


def cells(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_means_are_those_of_the_measures_times_100():
    found = tables.summary(tables.measure(TITLES, REFERENCES))
    assert len(found["rouge"]) == 3
    for measure in rouge.ROUGE_MEASURES:
        wanted = measure(TITLES, REFERENCES)
        for name, row in found["rouge"][wanted.measure].items():
            assert row["mean"] == pytest.approx(100 * wanted.f[name].mean())
            assert row["low"] <= row["mean"] <= row["high"]
    bleu = 100 * rouge.bleu_published(TITLES, REFERENCES).mean()
    assert found["bleu"]["mean"] == pytest.approx(bleu)


def test_published_systems_have_figures_of_the_first_protocol_alone():
    scores = {"ours": tables.summary(tables.measure(TITLES, REFERENCES))}
    head, ours, published, *_ = cells(tables.score_table(scores, LCSTS[:1]))
    assert [c for c in head if c.startswith(("R-", "BLEU"))][3] == "BLEU"
    assert ours.count("-") == 1 and len(ours) == 1 + 10 + 3
    assert published[-11:] == ["29.6", "18.0", "28.0", *["-"] * 8]


def test_lines_are_as_wide_as_each_other_on_a_terminal():
    lines = tables.aligned([["名字", "1.0"], ["a", "10.0"], ["很长的名字", "-"]]).splitlines()
    assert {sum(1 + (ord(c) > 0x2E80) for c in line) for line in lines} == {10 + 2 + 4}


def test_nature_counts_what_the_text_does_not_hold():
    found = tables.nature(TITLES, TEXTS)
    assert (found["n_with_number"], found["percent_wrong_number"]) == (1, 100)
    assert (
        found["percent_repeated_4gram"] == pytest.approx(100 / 3)
        and found["percent_novel_1grams"] > 0
    )
    assert tables.nature(["银杏"], TEXTS[1:2])["percent_wrong_number"] is None
    table = tables.nature_table({"ours": found}, {"ours": 2.5})
    assert cells(table)[1][-2:] == ["1", "2.5"]


def test_a_difference_is_that_of_the_means():
    a, b = (tables.measure(titles, REFERENCES) for titles in (TITLES, TEXTS))
    found = tables.differences(a, b)
    for ours, theirs in zip(a.rouge, b.rouge, strict=True):
        for name in rouge.ROUGE:
            gain = 100 * (ours.f[name].mean() - theirs.f[name].mean())
            assert found[ours.measure][name]["mean"] == pytest.approx(gain)
    assert found[a.rouge[0].measure]["bleu"]["mean"] == pytest.approx(
        100 * (a.bleu.mean() - b.bleu.mean())
    )
    assert "one minus two" in tables.difference_table(found, ("one", "two"))


def test_long_texts_are_told_of():
    scores = {"ours": tables.summary(tables.measure(["方" * 900], ["法方"]))}
    assert "1 texts were too long for (1)" in tables.score_table(scores, ())


def test_published_figures_are_plausible_and_never_shared_between_sets():
    for systems in SETS.values():
        for each in systems:
            figures = [f for f in (each.r1, each.r2, each.rl, each.bleu) if f is not None]
            assert figures and all(10 < f < 80 for f in figures) and each.source
            if each.r1 is not None:
                assert each.r2 < each.rl < each.r1
    assert not set(CSL_TITLE_PUBLIC) & set(LCSTS) and SETS["csl_ts"] == ()
    assert np.mean([each.r1 for each in CSL_TITLE_PUBLIC]) > 60
