"""Dialogues with a question some turns later: what is said, what counts, what fits."""

import json
import re
from itertools import permutations

import pytest

from babyllama.analysis import multi_turn
from babyllama.analysis.multi_turn import Dialogue, MultiTurnConfig
from babyllama.errors import ConfigError
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
            assert (one.value in one.waiting[0]) == (name == "told")
            assert one.value not in "".join(one.waiting[1:])


def said(fact: str, value: str, reply: str, fits: bool = True) -> Dialogue:
    return Dialogue(fact, value, [], [{"role": "assistant", "content": reply}], fits)


def test_figures_are_shares_of_what_fits():
    asked = [
        said("name", "小明", "小明"),
        said("name", "王芳", "小明"),
        said("city", "上海", "上海"),
        said("pet", "小猫", "", False),
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


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--turns", "a"), "--turns: wanted numbers of 0 to 8"),
        (("--turns", "9"), "wanted numbers of 0 to 8"),
        (("--max_new_tokens", 0), "wanted max_new_tokens of 1 or more, found 0"),
    ],
)
def test_wrong_settings_are_one_line(flags, message, script):
    assert message in script(SCRIPT, "release", *flags).error


def test_mistakes_are_one_line(checkpoint, tmp_path, script, model, tokenizer):
    none = script(SCRIPT, checkpoint, "--turns", "8")
    assert none.code == 2 and "no dialogue fits into the context of 128" in none.err
    base = save_model(tmp_path / "base", model, tokenizer, "pretrain")
    assert "wanted a checkpoint that answers" in script(SCRIPT, base).error
    with pytest.raises(ConfigError, match="found '1,,2'"):
        MultiTurnConfig(turns="1,,2")
