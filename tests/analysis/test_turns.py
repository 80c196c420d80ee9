"""Questions in later turns: what is asked, what counts, and that the released model keeps up."""

import json
import re

import pytest

from babyllama.analysis.multi_turn import read_turns
from babyllama.config import REPO
from babyllama.rows import write_rows


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


def shares(said: str) -> dict[int, tuple[float, float]]:
    found = re.findall(r"(\d+) turns before +greedy +([\d.]+)% +drawn +([\d.]+)%", said)
    return {int(n): (float(greedy), float(drawn)) for n, greedy, drawn in found}


def test_the_released_model_answers_in_any_turn_what_it_learnt(rows, script):
    assert len(read_turns(rows)) == 40
    words = ("babyllama/analysis/multi_turn.py", "release", "--rows", rows, "--n", 30)
    found = shares(script(*words, "--before", "3, 0,0").out)
    assert list(found) == [0, 3]
    assert all(greedy > 80 and drawn > 70 for greedy, drawn in found.values()), found
    one, *_ = shares(script(words[0], "release/third", *words[2:], "--before", 2).out).values()
    assert one[0] < 50, "a model that saw first turns alone loses the thread"
    assert "none fits into the context" in script(*words, "--before", 60).out


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rows", "none"), "wanted train-*.jsonl with dialogues, found none"),
        (("--before", "a"), "--before: wanted numbers of 0 to 100"),
        (("--n", 0), "wanted n, max_new_tokens and batch_size of 1 or more"),
        (("--temperature", 0), "a temperature above 0"),
    ],
)
def test_wrong_settings_are_one_line(flags, message, script, tmp_path):
    flags = [tmp_path if flag == "none" else flag for flag in flags]
    words = ("babyllama/analysis/multi_turn.py", "release", "--rows", tmp_path, *flags)
    assert message in script(*words).error
