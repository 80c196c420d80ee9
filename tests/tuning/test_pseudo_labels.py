"""Titles of a model's own: which texts are read, which are kept, and that work is not redone."""

import shutil

import pytest

from babyllama.errors import DataError
from babyllama.rows import write_rows
from babyllama.tuning.pseudo_labels import keep_good, read_texts
from data_process.raw import records, sorted_files
from data_process.registry import data_sets

ABSTRACTS = [
    f"针对{what}中存在的噪声问题,提出了一种基于{how}的{what}方法.该方法首先对数据进行预处理,然后利用{how}"
    f"提取特征,最后给出{what}的结果.实验结果表明,与传统方法相比,该方法的准确率提高了{n}%."
    for n, (what, how) in enumerate(
        [("图像分割", "模糊聚类"), ("语音识别", "隐马尔可夫模型"), ("文本分类", "支持向量机")], 5
    )
]


@pytest.fixture
def abstracts(tmp_path):
    rows = [{"id": f"a/{i}", "text": text} for i, text in enumerate([*ABSTRACTS, ABSTRACTS[0]])]
    rows += [{"id": "a/short", "text": "太短。"}, {"id": "a/long", "text": "长" * 700}]
    write_rows(tmp_path / "abstracts/train-00000.jsonl", rows)
    return tmp_path / "abstracts"


def test_texts_are_read_once_and_what_is_left_out_is_counted(abstracts):
    assert read_texts(abstracts, 80, 600) == (ABSTRACTS, 3)
    assert read_texts(abstracts / "train-00000.jsonl", 1, 5) == (["太短。"], 5)
    with pytest.raises(DataError, match="wanted texts of 900 to 999 characters, found none in 6"):
        read_texts(abstracts, 900, 999)


def test_dialogues_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"wanted train-.*found none"):
        read_texts(tmp_path, 80, 600)
    talk = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    write_rows(tmp_path / "train-00000.jsonl", [{"id": "t/0", "messages": talk}])
    with pytest.raises(DataError, match="dialogues have no title"):
        read_texts(tmp_path, 80, 600)


@pytest.mark.parametrize(
    "title, reason",
    [
        ("基于模糊聚类的图像分割方法", None),
        ("基于图像分割的图像分割方法", "loops"),
        (" \n", "blank"),
        (ABSTRACTS[0][:80], "as_long_as_half_the_text"),
    ],
)
def test_a_title_not_worth_learning_is_left_out_by_reason(title, reason):
    rows, left_out = keep_good([ABSTRACTS[0]], [title])
    assert rows == ([] if reason else [{"abst": ABSTRACTS[0], "title": title}])
    assert left_out == ({reason: 1} if reason else {})


def test_the_released_model_titles_abstracts_and_finished_files_are_kept(
    abstracts, tmp_path, script
):
    out = tmp_path / "own"
    words = (
        "babyllama/tuning/pseudo_labels.py",
        "release",
        "--rows",
        abstracts,
        "--out",
        out,
    )
    done = script(*words)
    assert done.code == 0, done.err
    (path,), _ = sorted_files(out)
    assert path.read_text("utf-8").count("\n") > 1
    read = list(data_sets("csl")[0].read(records(out, "utf-8")))
    assert read and {row["text"] for row in read} <= set(ABSTRACTS)
    for row in read:  # a title is made of the abstract's words
        assert len(set(row["summary"]) & set(row["text"])) > len(set(row["summary"])) / 2
    path.write_text("kept", "utf-8")
    again = script(*words)
    assert again.code == 0 and "is kept" in again.out and path.read_text("utf-8") == "kept"


def test_several_checkpoints_vote(abstracts, tmp_path, script):
    out = tmp_path / "own"
    twin = tmp_path / "twin"
    shutil.copytree("release", twin, ignore=shutil.ignore_patterns("recipe"))
    done = script(
        "babyllama/tuning/pseudo_labels.py", "release", twin,
        "--rows", abstracts, "--out", out,
        "--beams", 4, "--n", 4, "--limit", 2,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"{twin}: 100%" in done.err and sorted_files(out)[0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--limit", 0), "limit must be at least 1"),
        (("--min_chars", 0), "min_chars of 1 or more"),
        (("--max_chars", 10), "max_chars of min_chars"),
    ],
)
def test_wrong_settings_are_one_line(flags, message, script):
    assert message in script("babyllama/tuning/pseudo_labels.py", *flags).error
