"""Dialogues with a question some turns later: what is said, what counts, what fits."""

import json
import re
from itertools import permutations

import pytest

from babyllama.analysis import multi_turn
from babyllama.analysis.multi_turn import Dialogue, MultiTurnConfig
from babyllama.config import REPO
from babyllama.errors import ConfigError
from babyllama.rows import write_rows
from conftest import save_model

SCRIPT = "babyllama/analysis/multi_turn.py"


@pytest.mark.parametrize(
    "reply, is_right",
    [
        ("你叫小明。", True), ("小明，小明！", True), ("你叫王芳。", False), ("不知道。", False),
        ("你叫小明或王芳。", False), ("", False),
    ],
)  # fmt: skip
def test_an_answer_holds_the_value_and_no_other(reply, is_right):
    assert multi_turn.recalls(reply, "小明", multi_turn.FACTS["name"][2]) is is_right


def test_nothing_but_the_telling_gives_a_value_away():
    between = "".join(multi_turn.BETWEEN) + multi_turn.UNTOLD
    for told, question, values in multi_turn.FACTS.values():
        assert not any(value in between + question + told for value in values)
        assert not any(a in b for a, b in permutations(values, 2))


@pytest.mark.parametrize("n", [0, 3])
def test_each_value_is_told_once_and_left_untold_once(n):
    found = multi_turn.about_facts(n)
    for name, asked in found.items():
        assert len(asked) == sum(len(values) for _, _, values in multi_turn.FACTS.values())
        for one in asked:
            assert len(one.waiting) == n + 2 and len(set(one.waiting)) == n + 2
            assert (one.about["value"] in one.waiting[0]) == (name == "told")
            assert one.about["value"] not in "".join(one.waiting[1:])


def said(value: str, reply: str, fits: bool = True) -> Dialogue:
    return Dialogue(value.__eq__, [], [{"role": "assistant", "content": reply}], fits=fits)


def test_figures_are_shares_of_what_fits():
    asked = [
        said("小明", "小明"),
        said("王芳", "小明"),
        said("上海", "上海"),
        said("猫", "", False),
    ]
    found = multi_turn.share(asked)
    share, low, high = map(float, re.findall(r"[\d.]+", found)[:3])
    assert share == 66.7 and low <= share <= high
    assert found.endswith("of 3, 1 outgrew the context")
    assert multi_turn.share(asked[3:]) == "none fits, 1 outgrew the context"


def test_a_checkpoint_is_asked_with_its_own_answers_between(checkpoint, tmp_path, script):
    out = tmp_path / "said.jsonl"
    flags = ("--turns", "8,1,0", "--max_new_tokens", 3, "--out", out)
    done = script(SCRIPT, checkpoint, *flags)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert "none fits, 40 outgrew the context" in done.out.splitlines()[-2]
    assert {row["turns"] for row in rows} == {0, 1} and len(rows) == 160
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (row["turns"] + 2)
        assert row["right"] == multi_turn.recalls(
            row["messages"][-1]["content"], row["value"], multi_turn.FACTS[row["fact"]][2]
        )
        assert (row["value"] in row["messages"][0]["content"]) == (row["group"] == "told")


@pytest.fixture
def rows(tmp_path):
    """Small talk of the released model, as data_process.run leaves it."""
    lines = (REPO / "release/recipe/identity.jsonl").read_text("utf-8").splitlines()[:40]
    talks = [
        [{"role": "user", "content": row["instruction"]},
         {"role": "assistant", "content": row["output"]}]
        for row in map(json.loads, lines)
    ]  # fmt: skip
    with_system = [{"role": "system", "content": "资料"}, *talks[0]]
    path = tmp_path / "talk/train-00000.jsonl"
    write_rows(path, [{"id": str(i), "messages": t} for i, t in enumerate([*talks, with_system])])
    return path.parent


def shares(said: str) -> dict[int, list[float]]:
    lines = [line for line in said.splitlines() if line[:1].isdecimal()]
    return {int(line.split()[0]): [float(x) for x in re.findall(r"([\d.]+) %", line)]
            for line in lines}  # fmt: skip


def test_the_released_model_is_asked_in_any_turn_what_it_learnt(rows, script):
    assert len(multi_turn.read_turns(rows)) == 40
    words = (SCRIPT, "release", "--rows", rows, "--n", 30)
    found = shares(script(*words, "--turns", "3, 0,0").out)
    assert list(found) == [0, 3]
    # Word for word; most answers mean the same in other words.
    assert all(greedy > 15 and drawn > 10 for greedy, drawn in found.values()), found
    assert "no dialogue fits into the context" in script(*words, "--turns", 60).err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rows", "none"), "wanted train-*.jsonl with dialogues, found none"),
        (("--rows", "none", "--turns", "a"), "--turns: wanted numbers of 0 to 100"),
        (("--turns", "9"), "wanted numbers of 0 to 8"),
        (("--n", 0), "wanted n and max_new_tokens of 1 or more, found 0"),
    ],
)
def test_wrong_settings_are_one_line(flags, message, script, tmp_path):
    flags = [tmp_path if flag == "none" else flag for flag in flags]
    assert message in script(SCRIPT, "release", *flags).error


def test_mistakes_are_one_line(checkpoint, tmp_path, script, model, tokenizer):
    none = script(SCRIPT, checkpoint, "--turns", "8")
    assert none.code == 2 and "no dialogue fits into the context of 128" in none.err
    base = save_model(tmp_path / "base", model, tokenizer, "pretrain")
    assert "wanted a checkpoint that answers" in script(SCRIPT, base).error
    with pytest.raises(ConfigError, match="found '1,,2'"):
        MultiTurnConfig(turns="1,,2")
