"""Dialogues that tell a fact and ask for it later: what is said, what counts, what fits."""

import json
from itertools import permutations

import pytest

from babyllama.analysis import multi_turn
from babyllama.checkpoint import save_checkpoint
from babyllama.errors import ConfigError
from babyllama.optim import OptimConfig, make_optimizer


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


@pytest.mark.parametrize("gap", [0, 3])
def test_each_value_is_told_once_and_left_untold_once(gap):
    found = multi_turn.probes(gap)
    assert len(found) == 2 * sum(len(values) for _, _, values in multi_turn.FACTS.values())
    for one in found:
        assert len(one.waiting) == gap + 2 and len(set(one.waiting)) == gap + 2
        assert (one.value in one.waiting[0]) == one.is_told
        assert one.value not in "".join(one.waiting[1:])


def said(kind: str, value: str, is_told: bool, reply: str, fits: bool = True) -> multi_turn.Probe:
    return multi_turn.Probe(
        kind, value, is_told, [], [{"role": "assistant", "content": reply}], fits
    )


def test_figures_are_shares_of_what_fits():
    asked = [said("name", "小明", True, "小明"), said("name", "王芳", True, "小明"),
             said("city", "上海", True, "上海"), said("pet", "小狗", True, "", fits=False),
             said("name", "小明", False, "王芳")]  # fmt: skip
    found = multi_turn.figures(asked)
    assert found["told"]["n"] == 3 and found["told"]["right"] == pytest.approx(200 / 3)
    assert found["told"]["low"] <= found["told"]["right"] <= found["told"]["high"]
    assert (found["not told"]["right"], found["left_out"]) == (0, 1)
    assert "66.7 %" in multi_turn.line(2, found) and "1 outgrew the context" in multi_turn.line(
        2, found
    )


def test_a_checkpoint_is_asked_with_its_own_answers_between(checkpoint, tmp_path, script):
    out = tmp_path / "said.jsonl"
    done = script("babyllama/analysis/multi_turn.py", checkpoint, "--gaps", "8,1,0",
                  "--max_new_tokens", 3,
                  "--out", out)  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert "8 turns between   none fits; 80 outgrew the context" in done.out
    assert {row["gap"] for row in rows} == {0, 1} and len(rows) == 160
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (row["gap"] + 2)
        assert row["right"] == multi_turn.recalls(
            row["messages"][-1]["content"], row["value"], multi_turn.FACTS[row["fact"]][2]
        )
        assert (row["value"] in row["messages"][0]["content"]) == row["told"]


def test_mistakes_are_one_line(checkpoint, tmp_path, script, model, tokenizer):
    def mistake(*argv: object) -> str:
        return script("babyllama/analysis/multi_turn.py", *argv).error

    assert "no dialogue fits into the context of 128" in mistake(checkpoint, "--gaps", "8")
    assert "wanted numbers of 0 to 8" in mistake(checkpoint, "--gaps", "9")
    optimizer = make_optimizer(model, OptimConfig())
    base = save_checkpoint(tmp_path / "base", 1, model, tokenizer, optimizer, {}, kind="pretrain")
    assert "which knows no turns" in mistake(base)
    with pytest.raises(ConfigError, match="batch_size of 1 or more"):
        multi_turn.RecallConfig(batch_size=0)
    with pytest.raises(ConfigError, match="found '1,,2'"):
        multi_turn.RecallConfig(gaps="1,,2")
