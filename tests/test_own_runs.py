"""`sft.py --rows` and `pretrain.py --text` from a file to an answer, with the released model."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from babyllama.config import REPO
from conftest import write_run

ROWS = [(f"第{n}号房间里有什么？", f"第{n}号房间里有{n + 2}只猫。") for n in range(12)]


@pytest.fixture
def place(tmp_path):
    """A folder of the user's; what the scripts put into the repository for it goes afterwards."""
    folder = tmp_path / "zz-own"
    folder.mkdir()
    before = {*REPO.glob("data/own/zz-own*"), *REPO.glob("out/zz-own*")}
    yield folder
    for made in {*REPO.glob("data/own/zz-own*"), *REPO.glob("out/zz-own*")} - before:
        shutil.rmtree(made)


def write_rows(path: Path, rows=ROWS) -> Path:
    lines = (json.dumps({"question": q, "answer": a}, ensure_ascii=False) for q, a in rows)
    path.write_text("\n".join(lines), "utf-8")
    return path


FEW = ("--train.max_steps", "2", "--device.device", "cpu")


def test_rows_train_from_release_and_another_content_is_another_run(place, script):
    rows = write_rows(place / "zz-own-rows.jsonl")
    first = script("sft.py", "--rows", rows, *FEW)
    assert first.code == 0, first
    lines = first.err.splitlines()
    assert lines[0].startswith("base: release, ")
    assert "11 rows to learn from and 1 to check with" in lines[1] and "人类：第" in lines[2]
    assert "talk to it: python chat.py out/zz-own-rows" in first.err
    config = yaml.safe_load((REPO / "out/zz-own-rows/config.yaml").read_text("utf-8"))
    assert config["base"] == "release" and config["train"]["max_steps"] == 2
    assert "finished" in script("sft.py", "--rows", rows, *FEW).err  # the same goes on
    write_rows(rows, [*ROWS, ("新的问题是什么？", "新的回答在这里。")])
    assert "out/zz-own-rows-2 starts from release" in script("sft.py", "--rows", rows, *FEW).err


def test_texts_train_with_the_tokenizer_of_their_base(place, script):
    text = place / "zz-own-diary.txt"
    text.write_text(
        "\n".join(f"今天是第{n}天，天气很好，我去了河边。" for n in range(200)), "utf-8"
    )
    found = script("pretrain.py", "--text", text, *FEW)
    assert found.code == 0, found
    assert found.err.splitlines()[0].startswith("base: release, ")
    config = yaml.safe_load((REPO / "out/zz-own-diary/config.yaml").read_text("utf-8"))
    shape = yaml.safe_load((REPO / "release/model.yaml").read_text("utf-8"))["model"]
    assert config["tokenizer"] == "release/tokenizer.model"
    assert config["model"]["dim"] == shape["dim"] and config["name"] == "zz-own-diary"


def test_a_run_of_ones_own_is_a_base_for_more(place, script):
    rows = write_rows(place / "zz-own-base.jsonl")
    assert script("sft.py", "--rows", rows, *FEW).code == 0
    more = write_rows(place / "zz-own-more.jsonl", [(q, a + "真的。") for q, a in ROWS])
    found = script("sft.py", "--rows", more, "--base", "out/zz-own-base", *FEW)
    assert found.code == 0 and found.err.startswith("base: out/zz-own-base, ")


def test_the_newest_run_is_not_taken_where_own_data_is_named(place, checkpoint, script):
    write_run(place / "zz-own-newest.yaml", place)  # whatever lies in out/, release is the base
    found = script("sft.py", "--rows", write_rows(place / "zz-own-b.jsonl"), "--inspect")
    assert found.code == 0 and found.err.startswith("base: release, ")


INEWS = "[{name: inewz}]"
FAULTS = {
    "a missing file": (["--rows", "PLACE/zz-own-raws.jsonl"], "did you mean zz-own-rows.jsonl"),
    "a set too": (["--rows", "PLACE/zz-own-rows.jsonl", "--dataset", "csl"], "not both"),
    "a missing base": (["--rows", "PLACE/zz-own-rows.jsonl", "--base", "realease"], "release"),
    "a misspelt set": (["--dataset", "smaltalk"], "did you mean smalltalk?"),
    "a misspelt flag": (["--datset", "csl"], "did you mean --dataset?"),
    "a misspelt value": (["--optim.name", "adam"], "did you mean adamw?"),
    "a misspelt config": (["--config", "configs/sft/smaple.yaml"], "did you mean sample.yaml?"),
    "a misspelt set among others": (["--dataset", "csl:2,smaltalk"], "did you mean smalltalk?"),
    "a misspelt text": (["pretrain.py", "--text", "PLACE/zz-own-raws.jsonl"], "zz-own-rows.jsonl"),
    "a misspelt base of texts": (
        ["pretrain.py", "--text", "PLACE/zz-own-rows.jsonl", "--base", "realease"],
        "did you mean release?",
    ),
    "a misspelt tokenizer": (
        ["pretrain.py", "--tokenizer", "release/tokeniser.model"],
        "did you mean tokenizer.model?",
    ),
    "a misspelt source": (["pretrain.py", "--data.sources", INEWS], "did you mean inews?"),
    "a misspelt shape": (["pretrain.py", "--model", "configs/model/44m.yaml"], "mean 43m.yaml?"),
    "a misspelt reader": (["data_process/run.py", "smaple"], "did you mean sample?"),
    "a misspelt vocabulary": (
        ["data_process/run.py", "sample", "--tokenizer", "release/tokeniser.model"],
        "did you mean tokenizer.model?",
    ),
    "a misspelt checkpoint": (["chat.py", "realease"], "did you mean release?"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_name_is_answered_with_the_one_that_was_meant(fault, place, script):
    write_rows(place / "zz-own-rows.jsonl")
    argv, words = FAULTS[fault]
    name, *argv = argv if argv[0].endswith(".py") else ("sft.py", *argv)
    assert words in script(name, *(word.replace("PLACE", str(place)) for word in argv)).error
