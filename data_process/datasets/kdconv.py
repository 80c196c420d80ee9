"""KdConv: dialogues of two people about films, music and travel, led by a knowledge graph.

JSON lists of {"messages": [{"message", "attrs"?}], "name"}; speakers take turns, and the first is
the user. `attrs` (the facts that an utterance rests on) are not read.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home="github.com/thu-coai/KdConv",
    rows="4,500 (1,200 / 150 / 150 in each of three fields)",
    manual="clone the repository and put data/film, data/music and data/travel with their "
    "{train,dev,test}.json there, without data/resources (the knowledge graph)",
)
LICENSE = "Apache-2.0"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    turns = record.data.get("messages") if isinstance(record.data, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return refuse(record, "wrong_keys")
    return dialogue(record, in_turns(turn.get("message") for turn in turns))
