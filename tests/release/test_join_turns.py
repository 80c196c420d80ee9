"""Short dialogues joined into longer ones: what is taken, what comes out, what is refused."""

import pytest

from babyllama.rows import write_rows
from data_process.datasets import conversations
from data_process.raw import records
from release.recipe.join_turns import join

PAIRS = [
    [{"role": "user", "content": f"问{i}"}, {"role": "assistant", "content": f"答{i}"}]
    for i in range(9)
]


def test_turns_stay_together_and_no_dialogue_holds_one_twice():
    rows = list(join(PAIRS, 200, 4, seed=0))
    assert {len(row["messages"]) for row in rows} == {4, 6, 8}
    for row in rows:
        turns = [row["messages"][i : i + 2] for i in range(0, len(row["messages"]), 2)]
        assert all(turn in PAIRS for turn in turns)
        assert len({turn[0]["content"] for turn in turns}) == len(turns)
    assert {turn["content"] for row in rows for turn in row["messages"][::2]} == {
        pair[0]["content"] for pair in PAIRS
    }
    assert rows == list(join(PAIRS, 200, 4, seed=0)) != list(join(PAIRS, 200, 4, seed=1))


def test_train_parts_alone_are_joined_and_read_again(tmp_path, script):
    with_system = [{"role": "system", "content": "资料"}, *PAIRS[8]]
    train = [{"id": str(i), "messages": one} for i, one in enumerate([*PAIRS[:5], with_system])]
    write_rows(tmp_path / "talk/train-00000.jsonl", train)
    write_rows(tmp_path / "talk/val-00000.jsonl", [{"id": "9", "messages": PAIRS[7]}])
    out = tmp_path / "raw/several"
    done = script("release/recipe/join_turns.py", tmp_path / "talk", "--out", out, "--n", 40)
    assert done.code == 0, done.err
    assert "40 dialogues out of 5" in done.out
    text = (out / "train.jsonl").read_text("utf-8")
    assert "资料" not in text and "问7" not in text
    rows = list(conversations.read(records(out, "utf-8")))  # as data_process.run reads them
    assert len(rows) == 40 and max(len(row["messages"]) for row in rows) == 10


@pytest.mark.parametrize(
    "words, message",
    [
        ((), "wanted sets of dialogues, found none"),
        (("none",), "wanted train-*.jsonl with dialogues, found none"),
        (("none", "--n", 0), "--n of 1"),
        (("none", "--most", 1), "--most of 2 or more"),
    ],
)
def test_wrong_settings_are_one_line(words, message, script):
    assert message in script("release/recipe/join_turns.py", *words).error
