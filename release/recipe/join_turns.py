"""Dialogues of several turns out of short ones: a model that only saw first turns loses the thread.

    python -m release.recipe.join_turns data/clean/identity --out data/raw/several_turns
    python -m data_process.run conversations --name several_turns --raw data/raw/several_turns

Each new dialogue is 2 to --most different ones of the sets' train parts, one after the other, drawn
with a seed. Nothing ties the turns together: what is learnt is to answer the last one whatever
stands before it. Writes train.jsonl with the key messages.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, write_rows


@dataclass(frozen=True)
class JoinConfig:
    """Which dialogues are joined.

    Args:
        sets: folders of cleaned dialogues, whose train-*.jsonl are read
        out: folder for train.jsonl
        n: dialogues that are made
        most: dialogues of the sets that one of them joins, at most
        seed: other numbers draw other dialogues
    """

    sets: tuple[Path, ...] = ()
    out: Path = Path("data/raw/several_turns")
    n: int = 1000
    most: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("wanted sets of dialogues, found none; as in data/clean/identity")
        if self.n < 1 or self.most < 2:
            raise ConfigError(
                f"wanted --n of 1 and --most of 2 or more, found {self.n} and {self.most}"
            )


def read_dialogues(places: Sequence[Path]) -> list[list[dict]]:
    """The messages of all train rows that are dialogues without a system message.

    raises: DataError if a set has none, or if there are fewer than two in all
    """
    found = []
    for place in places:
        rows = [row for path in sorted(place.glob("train-*.jsonl")) for row in read_rows(path)]
        mine = [row["messages"] for row in rows if "messages" in row]
        mine = [messages for messages in mine if messages[0]["role"] != "system"]
        if not mine:
            raise DataError(
                f"{shown(place)}: wanted train-*.jsonl with dialogues, found none; make the set: "
                f"python -m data_process.run {place.name}"
            )
        found += mine
    if len(found) < 2:
        raise DataError(f"{shown(places[0])}: wanted two dialogues to join, found one")
    return found


def join(dialogues: Sequence[list[dict]], n: int, most: int, seed: int) -> Iterator[dict]:
    """Rows of 2 to `most` different dialogues each."""
    chance = random.Random(seed)
    for _ in range(n):
        some = chance.sample(dialogues, chance.randint(2, min(most, len(dialogues))))
        yield {"messages": [message for dialogue in some for message in dialogue]}


def main(cfg: JoinConfig) -> None:
    """Read, join, write."""
    dialogues = read_dialogues([from_repo(place) for place in cfg.sets])
    path = from_repo(cfg.out) / "train.jsonl"
    n = write_rows(path, join(dialogues, cfg.n, cfg.most, cfg.seed))
    print(f"{shown(path)}: {n} dialogues out of {len(dialogues)}")


if __name__ == "__main__":
    run(main, parse(JoinConfig, __doc__, positional=["sets"]))
