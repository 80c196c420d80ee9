"""BELLE multiturn_chat_0.8M: dialogues whose whole history stands in one string.

    {"instruction": "Human:…\\nAssistant:…\\nHuman:…\\nAssistant:", "input": "", "output": "…"}

JSON lines. The instruction ends with an open "Assistant:" (rarely with the question itself),
which `output` answers. A label counts only where a line begins: both words also occur inside
sentences.
"""

import re
from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, labelled, refuse, split_at_labels
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
SOURCE = Source(
    home="github.com/LianjiaTech/BELLE",
    rows="831,036",
    size="990 MB",
    huggingface="BelleGroup/multiturn_chat_0.8M",
    files=("multiturn_chat_0.8M.json",),
)
LICENSE = "three statements: GPL-3.0 (cards), ODC-By (DATA_LICENSE), research only (README)"

LABEL = re.compile(r"(?:^|\n)(Human|Assistant):")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue an object."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    history, answer = data.get("instruction"), data.get("output")
    if not isinstance(history, str) or not isinstance(answer, str):
        return refuse(record, "wrong_keys")
    before, turns = split_at_labels(LABEL, history)
    if before.strip() or not turns:
        return refuse(record, "text_before_label", broken=False)
    if data.get("input") or LABEL.search(answer):
        reason = "unexpected_input" if data.get("input") else "role_label_inside"
        return refuse(record, reason, broken=False)
    label, last = turns[-1]
    if label == "Assistant":
        if last:
            return refuse(record, "no_open_turn", broken=False)
        turns.pop()
    return dialogue(record, labelled([*turns, ("Assistant", answer)]))
