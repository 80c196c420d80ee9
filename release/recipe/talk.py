"""Talk for the last stages: the project's own, and dialogues of others in the layouts of readers.

talk      talk.yaml drawn out: every talk in many wordings
turns     two to four of these talks, of identity.jsonl or about an abstract, one after the other: a
          model that only saw one subject at a time loses the thread
short     questions of Alpaca and others whose answer is short Chinese
paper_dialogues, duconv, persona   about a 资料, as {"reference", "dialogue"}
crosswoz, smile, liver             as {"messages"}
"""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from data_process.clean import han_share
from data_process.raw import records
from data_process.registry import data_sets
from release.recipe.papers import filled
from release.recipe.passages import HERE, grounded, objects, turn, words, write_set

SHORT = (
    "sft/alpaca_zh_train.jsonl.xz", "sft/alpaca_zh_carbonz0.jsonl.xz", "sft/chatlm_mini",
    "sft/llama_factory/alpaca_zh_demo.json", "sft/sharegpt_zh_1K.jsonl.xz",
)  # fmt: skip
MOST = 36  # wordings of a talk
JOINED, SMILE = 6000, 2500  # dialogues that are joined, and that are taken of the counselling set
LONGEST_ASKED, LONGEST_ANSWER = 150, 110  # characters
NOT_TALK = re.compile(r"[`<>{}\\]|https?:|\n\s*\n")
ABOUT_TITLES = re.compile("标题|题目|起个名|取个名")


def drawn(talks: list[list[str]], slots: dict[str, list[str]], most: int, seed: int) -> list[dict]:
    """Each talk in up to `most` wordings, as rows of a dialogue each."""
    rows = []
    for number, talk in enumerate(talks):
        chance = random.Random(f"{seed} {number}")
        mine = {}
        for _ in range(most):
            said = [chance.choice(str(variants).split("|")) for variants in talk]
            # The same word for a slot in all turns; {a} and {a2} are different ones.
            pieces = {}
            for name, choices in slots.items():
                pieces[name], pieces[f"{name}2"] = chance.sample(choices, 2)
            said = [filled(one, pieces) for one in said]
            asked = zip(said[::2], said[1::2], strict=True)
            messages = [message for pair in asked for message in turn(*pair)]
            mine["\n".join(said)] = {"messages": messages}
        rows += mine.values()
    return rows


def joined(
    dialogues: list[list[dict]], papers: list[list[dict]], n: int, seed: int
) -> Iterator[dict]:
    """Rows of two to four dialogues; in two of five one of them is about an abstract."""
    chance = random.Random(seed)
    for _ in range(n):
        some = chance.sample(dialogues, chance.randint(2, 4))
        if papers and chance.random() < 0.4:
            some = some[:2]
            some.insert(chance.randint(0, 1), chance.choice(papers))
        yield {"messages": [message for dialogue in some for message in dialogue]}


def read(reader: str, path: Path) -> Iterator[dict]:
    """The dialogues that a reader of data_process finds in a file."""
    for row in data_sets(reader)[0].read(records(path, "utf-8")):
        if isinstance(row, dict):
            yield {"messages": row["messages"]}


def short(paths: Iterable[Path]) -> Iterator[dict]:
    """Dialogues whose questions and answers are short and Chinese."""
    for row in (row for path in paths for row in read("instruction", path)):
        said = [message["content"] for message in row["messages"]]
        if all(map(_is_talk, said)) and max(map(len, said[1::2])) <= LONGEST_ANSWER:
            yield row


def _is_talk(text: str) -> bool:
    fits = len(text) <= LONGEST_ASKED and text.count("\n") < 3
    return fits and not NOT_TALK.search(text) and han_share(text) > 0.6


def paper_dialogues(path: Path, seed: int) -> Iterator[dict]:
    """Dialogues about abstracts. What answers "give it a title" is a gist, so a gist is asked."""
    chance, gists = random.Random(seed), words()["later"]["gist"]
    for one in objects(path):
        lines = one["dialogue"].split("\n")
        asked = [
            f"Human: {chance.choice(gists)}"
            if line.startswith("Human:") and ABOUT_TITLES.search(line)
            else line
            for line in lines
        ]
        yield {"reference": one["reference"], "dialogue": "\n".join(asked)}


def duconv(path: Path) -> Iterator[dict]:
    """Talk about films whose leader knows the 资料: the leader is the assistant, so asks first."""
    for one in objects(path):
        known = dict.fromkeys(f"{a}的{b}是{c}" for a, b, c in one["knowledge"])
        said = [f"聊聊{one['goal'][0][1]}吧。", *one["conversation"]]
        yield grounded("；".join(known) + "。", pairs_of(said))


def pairs_of(said: list[str]) -> list[tuple[str, str]]:
    """What one says and what the other answers; a last one without answer goes."""
    return list(zip(said[::2], said[1::2], strict=False))


def persona(path: Path) -> Iterator[dict]:
    """Small talk of somebody whose persona is the 资料."""
    for one in objects(path):
        said = [utterance.split(": ", 1)[-1].strip() for utterance in one["conversation"]]
        pairs = pairs_of(said)
        if all(a and b for a, b in pairs) and pairs:
            yield grounded("。".join(one["p2_persona"]) + "。", pairs)


def write(raw: Path, out: Path) -> None:
    """Make all sets of raw files, in a folder in which papers.py wrote about_real."""
    own = yaml.safe_load((HERE / "talk.yaml").read_text("utf-8"))
    talk = drawn(own["talks"], own["slots"], MOST, seed=0)
    identity = [turn(one["instruction"], one["output"]) for one in objects(HERE / "identity.jsonl")]
    talks = [row["messages"] for row in talk] + identity * 5
    written = sorted(out.glob("about_real/*/train.jsonl"))
    about = [row["messages"] for path in written for row in objects(path)]
    smile = list(read("conversations", raw / "dialogue/smilechat.jsonl.xz"))
    chance = random.Random(0)
    sets = {
        "talk": talk,
        "turns": joined(talks, about, JOINED, seed=0),
        "short": short(raw / place for place in SHORT if (raw / place).exists()),
        "paper_dialogues": paper_dialogues(raw / "dialogue/paper_dialogues.jsonl.xz", seed=0),
        "duconv": duconv(raw / "dialogue/duconv_dev.jsonl.xz"),
        "persona": persona(raw / "dialogue/persona_dev.jsonl.xz"),
        "crosswoz": read("conversations", raw / "dialogue/crosswoz_val_test.jsonl.xz"),
        "smile": chance.sample(smile, min(SMILE, len(smile))),
        "liver": read("conversations", raw / "dialogue/huatuo_liver_cancer.jsonl.xz"),
    }
    for name, rows in sets.items():
        write_set(out / name, rows)
