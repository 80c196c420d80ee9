"""What counts as right, what a score is worth, and how published files become rows."""

import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections import Counter
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.config import REPO
from babyllama.errors import DataError
from bench.readers import boxed, find, read_rows, row, table
from bench.report import cells, markdown
from bench.scoring import (
    METRICS,
    SCORES,
    bare,
    bbh,
    chance_of_answer,
    chance_of_choice,
    cmrc,
    constant_answer,
    constant_choice,
    exact,
    interval,
    math_answer,
    number,
    shared_words,
    verdict,
    wilson,
)
from bench.tasks import rows_of, tasks

DATA = REPO / ".." / "shared" / "data" / "benchmarks"
FIXTURES = Path(__file__).parents[1] / "fixtures" / "bench"

# Rows of the files beside the project, as their publishers count them.
PUBLISHED = {
    "gsm8k": 1319, "math": 5000, "humaneval": 164, "commonsenseqa": 1221, "naturalquestions": 3610,
    "triviaqa": 3000, "quac": 12, "boolq": 3270, "mmlu": 14042, "bbh": 6511, "cmmlu": 11582,
    "mgsm_zh": 250, "cmath": 600, "ape210k": 5000, "c3": 3816, "cmrc2018": 3219, "xquad_zh": 1190,
    "agieval": 7148, "agieval_cloze_math": 1118, "gaokao": 2944,
}  # fmt: skip
LEFT_OUT: dict[str, dict] = {
    "agieval": {"no options": 1119, "empty option": 2},
    "agieval_cloze_math": {"has options": 7151},
}


@pytest.mark.parametrize(
    "reply, answer, is_right",
    [
        ("3+4=7，答案是7", "7", True),
        ("答案：1,234。", "1234", True),
        ("一共 12.", "12", True),
        ("先有3，再有4", "4", True),
        ("答案是3，不是4", "4", False),
        ("所以得 \\boxed{-2}", "-2", True),
        ("#### 0.50", "1/2", True),
        ("答案是15/16", "93.75%", True),
        ("23(1/3)", "23(1/3)", True),
        ("答案是11/20米", "(11/20)", True),
        ("没有数字", "0", False),
        ("", "0", False),
    ],
)
def test_the_number_of_a_reply_is_found(reply, answer, is_right):
    assert number(reply, [answer]) == {"acc": float(is_right)}


@given(st.fractions(max_denominator=999))
def test_a_number_is_right_however_it_is_written(value):
    from bench.scoring import to_number

    assert to_number(str(value)) == to_number(f"{value}。") == value
    whole, rest = divmod(abs(value), 1)
    mixed = f"{'-' if value < 0 else ''}{whole}({rest.numerator}/{rest.denominator})"
    assert to_number(mixed) == value
    assert to_number(f"{float(100 * Fraction(1, 8)) * 8}%") == 1


def test_formulas_are_compared_as_the_harness_compares_them():
    assert math_answer("得 \\boxed{\\dfrac{3}{2}}", ["\\frac{3}{2}"]) == {"acc": 1.0}
    assert math_answer("所以 $x = 3$", ["3"]) == {"acc": 1.0}
    assert math_answer("3。", ["3"]) == math_answer("过程\n答案是3", ["3"]) == {"acc": 1.0}
    assert math_answer("", ["3"]) == math_answer("\\boxed{4} 不是 3", ["3"]) == {"acc": 0.0}


def test_short_answers_are_compared_without_case_signs_and_articles():
    assert exact("The  Red Planet.\n说明", ["red planet"])["em"] == 1
    assert exact("答案是“巴黎”。", ["巴黎"])["em"] == 1
    assert exact("Paris, France", ["Paris"])["em"] == exact("", ["x"])["em"] == 0
    assert bbh("(B) big red ball", ["(B)"])["em"] == bbh("答案是 b", ["(B)"])["em"] == 1
    assert bbh("(A)", ["(A)"])["em"] == bbh("A", ["(A)"])["em"] == 1
    assert bbh("A dog", ["(A)"])["em"] == bbh("", ["(A)"])["em"] == 0
    assert bbh("False", ["False"])["em"] == bbh("rita, Sue", ["Rita Sue"])["em"] == 1
    assert bare("“Monsters, Inc”!") == bare("the monsters  inc")


def test_f1_counts_han_characters_and_words():
    assert cmrc("称为白果", ["白果"])["f1"] == pytest.approx(2 * 2 / (4 + 2))
    assert cmrc("果白", ["白果"])["f1"] == pytest.approx(0.5), "a run, not a bag"
    assert shared_words("果白", ["白果"])["f1"] == 1 and shared_words("果白", ["白果"])["em"] == 0
    assert cmrc("ω-force 光荣", ["光荣和ω-force", "光荣"])["f1"] == pytest.approx(4 / 6)
    assert shared_words("In China", ["China, long ago", "in china"]) == {"f1": 1.0, "em": 1.0}


@given(st.text(max_size=40), st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_every_score_is_a_share_for_any_reply(reply, answers):
    for name, score in SCORES.items():
        if name != "math":  # the harness' rules are their own
            found = score(reply, answers)
            assert METRICS[name] in found and all(0 <= value <= 1 for value in found.values())


# What a score is worth.


def test_intervals_hold_the_score_and_shrink_with_rows():
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    few, many = interval([1.0, 0.0] * 10), interval([1.0, 0.0] * 100)
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    low, high = interval([0.2, 0.4, 0.9] * 30)
    assert low < 0.5 < high


def test_chance_and_constant_answers():
    rows = [{"gold": [0], "letters": list("AB")}, {"gold": [0, 1], "letters": list("ABCD")},
            {"gold": [3], "letters": list("ABCD")}]  # fmt: skip
    assert chance_of_choice(rows) == pytest.approx((1 / 2 + 2 / 4 + 1 / 4) / 3)
    assert constant_choice(rows) == pytest.approx(2 / 3)
    said = [{"answers": [a], "subject": s, "n_options": n} for a, s, n in
            [("True", "logic", 0), ("False", "logic", 0), ("True", "logic", 0), ("(B)", "x", 4),
             *((str(i), "count", 0) for i in range(6))]]  # fmt: skip
    assert chance_of_answer(said) == pytest.approx((3 / 2 + 1 / 4) / 10)
    assert constant_answer(said, exact, "em") == pytest.approx((2 + 1 + 1) / 10)


@pytest.mark.parametrize(
    "low, high, words",
    [
        (0.20, 0.30, "not above chance"),
        (0.10, 0.20, "below chance"),
        (0.26, 0.40, "not above one constant answer"),
        (0.31, 0.40, "above chance"),
    ],
)
def test_the_verdict_is_in_words(low, high, words):
    assert verdict(low, high, chance=0.25, constant=0.3) == words


def test_an_answer_that_must_be_found_is_compared_with_a_constant_one():
    assert verdict(0.0, 0.1, chance=0.0, constant=0.0) == "not above chance"
    assert verdict(0.01, 0.1, chance=0.0, constant=0.02) == "not above one constant answer"
    assert verdict(0.03, 0.1, chance=0.0, constant=0.02) == "above one constant answer"


def test_the_card_names_what_makes_a_number_doubtful():
    report = {
        "title": "甲", "metric": "acc_norm", "score": 0.5, "low": 0.4, "high": 0.6, "chance": 0.25,
        "constant": 0.3, "n": 20, "n_all": 100, "shots": 5, "mean_shots": 1.5, "language": "en",
        "prompt_language": "zh", "leaked": 3, "verdict": "above chance", "n_cut": 7,
        "left_out": {"no label": 2}, "own_shots": True,
        "other_metrics": {"acc": 0.444},
    }  # fmt: skip
    card = {
        "checkpoint": "out/x", "tasks": [report], "skipped": {"quac": "no files"},
        "model": {"n_parameters": 1000, "step": 1, "kind": "sft", "context": 64},
        "about": {"harness": "0", "prompts": "zh", "form": "text", "commit": "abc"},
        "training": {"files": ["a"], "missing": ["b"]},
    }  # fmt: skip
    assert cells(report)[5:9] == ["20 / 100", "5 (1.5 fit)", "en / zh", "3"]
    assert "| ≥ 3 |" in markdown(card), "the rows of b were not looked through"
    assert "| 3 |" in markdown(card | {"training": {"files": ["a", "b"], "missing": []}})
    text = markdown(card)
    wanted = ("7 questions are longer", "2 no label", "not known for b",
              "for lack of another", "quac was not run: no files", "as it is: 44.4%")  # fmt: skip
    for words in wanted:
        assert words in text


# Files and layouts.


def test_files_are_found_however_they_are_packed(tmp_path):
    text = "行\n".encode()
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.txt").write_bytes(text)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(text))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("deep/d.txt", text)
    with tarfile.open(tmp_path / "e.tar.xz", "w:xz") as archive:
        member = tarfile.TarInfo("deep/e.txt")
        member.size = len(text)
        archive.addfile(member, io.BytesIO(text))
    for letter in "abcde":
        ((name, found),) = find(tmp_path, [f"no_{letter}.txt", f"{letter}.txt"])
        assert name.endswith(f"{letter}.txt") and found == "行\n"
    assert find(tmp_path, ["nothing"]) == [] and find(tmp_path / "nowhere", ["*"]) == []
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text)[:-9])
    with pytest.raises(DataError, match=r"b.txt.*get it again"):
        find(tmp_path, ["b.txt"])


PARQUET = {
    "gsm8k/main/test-00000-of-00001": {"question": "3+4？", "answer": "<<3+4=7>>7\n#### 7"},
    "gsm8k_zh/data/test-00000-of-00001": {"question_zh-cn": "3+4？", "answer_only": 7},
    "commonsense_qa/data/validation-0": {
        "question": "哪里有鱼？", "answerKey": "B",
        "choices": {"label": ["A", "B"], "text": ["天上", "水里"]},
    },
    "trivia_qa/rc.nocontext/validation-0": {
        "question": "Who?", "answer": {"value": "Tom", "aliases": ["Tom", "T."]},
    },
    "mmlu/all/test-0": {
        "question": "哪里？", "subject": "birds", "choices": ["甲", "乙", "丙", "丁"], "answer": 2,
    },
    "boolq/data/validation-0": {"question": "is it", "passage": "It is.", "answer": True},
    "natural_questions/nq_open/validation-0": {"question": "who", "answer": ["Tom", "T."]},
}  # fmt: skip
RIGHT = {"gsm8k": ["7"], "gsm8k_zh": ["7"], "commonsense_qa": [1], "trivia_qa": ["Tom", "T."],
         "mmlu": [2], "boolq": [1], "natural_questions": ["Tom", "T."]}  # fmt: skip


@pytest.mark.parametrize("place", PARQUET)
def test_the_parquet_form_is_read_and_scored_too(place, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"{place}.parquet"
    path.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist([PARQUET[place]] * 2), path)
    folder = place.split("/")[0]
    (task,) = (t for t in tasks().values() if t.folder == folder and t.name[-6:] != "_cloze")
    found = rows_of(task, tmp_path, None)
    assert [r["gold"] or r["answers"] for r in found.every] == [RIGHT[folder]] * 2
    assert found.every[0]["subject"] == ("birds" if folder == "mmlu" else "")
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"0.*\.parquet.*get it again"):
        rows_of(task, tmp_path, None)


def test_what_makes_no_row_is_counted_by_reason():
    assert row("", answers=["a"]) == "no question"
    assert row("q", options=["a", "b"], gold=[]) == row("q", options=["a", "b"], gold=[2])
    assert row("q", options=["a", " "], gold=[0]) == "empty option"
    assert row("q", answers=[""]) == "no answer"
    left_out: Counter[str] = Counter()
    read = partial(table, columns=tasks()["math"].columns)
    text = '{"problem": "Prove.", "solution": "Clear."}\n'
    assert read_rows(read, [("x.jsonl", text * 2)], left_out) == []
    assert left_out == {"no answer": 2}
    with pytest.raises(DataError, match=r"x.jsonl: wanted the published layout"):
        read_rows(read, [("x.jsonl", '{"other": 1}\n')], left_out)


def test_boxes_are_found_by_counting_braces():
    assert boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}"
    assert boxed("so \\boxed 7$ ends") == "7"
    assert boxed("\\boxed{open") is None and boxed("none") is None


def test_a_limit_takes_rows_from_everywhere():
    task = tasks()["cmmlu"]
    whole = rows_of(task, FIXTURES, None)
    some = rows_of(task, FIXTURES, 2)
    assert len(some.every) == len(whole.scored) == 4
    assert [r["subject"] for r in some.scored] == ["agronomy", "arts"]
    in_one_file = rows_of(tasks()["mmmlu_zh"], FIXTURES, None)
    assert {r["subject"] for r in in_one_file.every} == {"agronomy", "arts"}


def test_every_task_file_says_what_it_is():
    for name in tasks():
        task = tasks()[name]
        assert task.title and task.groups and task.score in (*SCORES, "choice", "code")
        assert task.harness["output_type"] in ("multiple_choice", "generate_until")
        asked = task.harness["doc_to_text"]
        han = any("\u4e00" <= sign <= "\u9fff" for sign in asked)
        assert han or task.form == "text", f"{name}: the prompt is not Chinese"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the published files")
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_give_the_published_number_of_rows(name):
    rows = rows_of(tasks()[name], DATA, None)
    assert (len(rows.every), dict(rows.left_out)) == (PUBLISHED[name], LEFT_OUT.get(name, {}))
    assert json.dumps(rows.scored[:3])
