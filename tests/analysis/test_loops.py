"""The loop report: its figures by hand, and the guard's lines against those without it."""

import json
import re

import pytest

from babyllama.analysis import loops
from babyllama.decoder import Reply
from babyllama.errors import ConfigError, DataError

LOOP = "今天天气很好，我们去公园。"


def test_figures_are_those_counted_by_hand():
    replies = [
        Reply([1], LOOP * 3, "length"),
        Reply([1], "一二 一二", "eos"),
        Reply([], "", "eos"),
        Reply([1], "甲乙丙", "loop"),
    ]
    found = loops.statistics(replies)
    assert found["% loops"] == 25 and found["% ended"] == 50 and found["% cut"] == 25
    assert found["length"] == pytest.approx((39 + 4 + 0 + 3) / 4)


def test_replies_that_are_all_blank_have_figures():
    assert set(loops.statistics([Reply([], " \n", "eos")]).values()) == {0, 100}


def test_the_table_compares_with_and_without_the_guard():
    found = loops.ways(loops.LoopsConfig(loop_guard="end", top_p=0.8, repetition_penalty=1.2))
    assert list(found) == ["greedy", "top-p 0.8", "greedy, end", "top-p 0.8, end"]
    assert [way.loop_guard for way in found.values()] == ["off", "off", "end", "end"]
    assert [way.temperature == 0 for way in found.values()] == [True, False, True, False]
    assert {(way.repetition_penalty, way.seed) for way in found.values()} == {(1.2, 0)}


@pytest.mark.parametrize("changes", [{"temperature": 0}, {"batch_size": 0}, {"loop_guard": "off"}])
def test_settings_without_sense_here_are_refused(changes):
    with pytest.raises(
        ConfigError, match=r"for the drawn replies, found|batch_size must be at least"
    ):
        loops.LoopsConfig(**changes)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe", None])
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="wanted UTF-8 text with a prompt on each line, found"):
        loops.read_prompts(path)


def test_a_checkpoint_is_reported_on(checkpoint, tmp_path, script):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "replies.jsonl"
    prompts.write_text("你好\n\n今天去哪里？\n银杏是什么？\n", "utf-8")
    flags = ("--max_new_tokens", 60, "--batch_size", 2, "--n", 2)
    done = script(
        "babyllama/analysis/loops.py", checkpoint, "--prompts", prompts, "--out", out, *flags
    )
    assert done.code == 0, done.err
    lines = re.findall(r"^ *((?:greedy|top-p).*?)  +([\d.]+)  ", done.out, re.MULTILINE)
    shares = {name: float(share) for name, share in lines}
    assert list(shares) == ["greedy", "top-p 0.9", "greedy, redraw", "top-p 0.9, redraw"]
    assert shares["greedy"] > 0, "a random model loops where it takes the likeliest token"
    assert shares["greedy, redraw"] == shares["top-p 0.9, redraw"] == 0
    replies = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(replies) == 4 * 3 * 2
    assert [row["prompt"] for row in replies[:6]] == [
        prompt for prompt in ("你好", "今天去哪里？", "银杏是什么？") for _ in range(2)
    ]


def test_without_a_checkpoint_the_way_to_one_is_shown(tmp_path, script):
    assert "no complete checkpoint" in script("babyllama/analysis/loops.py", tmp_path).error
