"""Dialogues that stand in one text, whose turns begin with the name of who speaks."""

import re
from collections.abc import Mapping

from data_process.columns import Fields, Refused
from data_process.datasets.turns import dialogue, labelled, split_at_labels
from data_process.raw import Record

# Labels drift (`HUMAN：`, `Human(用户): `) and count only where a line begins.
LABEL = re.compile(
    r"^[ \t]*(human|assistant)(?:[ \t]*[(（][^)）\n]{0,20}[)）])?[ \t]*[:：]",
    re.IGNORECASE | re.MULTILINE,
)


def about_text(record: Record, columns: Mapping[str, str] | None = None) -> dict:
    """RedGPT: {"reference": "…", "dialogue": "Human: …\\nAssistant: …"}; the reference text is the
    system turn."""
    fields = Fields(record, columns)
    if not ("reference" in fields and "turns" in fields):
        raise fields.unknown("reference", "turns")
    reference, text = fields.text("reference"), fields.text("turns")
    if not reference:
        raise Refused("no_reference")
    before, turns = split_at_labels(LABEL, text)
    if before.strip():
        raise Refused("text_before_label")
    return dialogue(record, labelled([("system", reference), *turns]), unused=fields.unused())


HISTORY_LABEL = re.compile(r"(?:^|\n)(Human|Assistant):")


def open_turn(record: Record) -> dict:
    """BELLE multiturn_chat_0.8M: {"instruction": "Human:…\\nAssistant:…\\nHuman:…\\nAssistant:",
    "input": "", "output": "…"}, where `output` answers the open turn (rarely the last question)."""
    data = record.data if isinstance(record.data, dict) else {}
    history, answer = data.get("instruction"), data.get("output")
    if not isinstance(history, str) or not isinstance(answer, str):
        raise Refused("wrong_keys", f"columns {', '.join(data)}; wanted instruction, output", True)
    before, turns = split_at_labels(HISTORY_LABEL, history)
    if before.strip() or not turns:
        raise Refused("text_before_label")
    if data.get("input") or HISTORY_LABEL.search(answer):
        raise Refused("unexpected_input" if data.get("input") else "role_label_inside")
    label, last = turns[-1]
    if label == "Assistant":
        if last:
            raise Refused("no_open_turn")
        turns.pop()
    return dialogue(record, labelled([*turns, ("Assistant", answer)]))


BLOCK = re.compile(r"<s>(Human|Assistant):")


def in_blocks(record: Record) -> dict:
    """Llama-Chinese: a cell `text` of "<s>Human: …\\n</s><s>Assistant: …\\n</s>"."""
    text = record.data.get("text") if isinstance(record.data, dict) else None
    if not isinstance(text, str):
        raise Refused("wrong_keys", "wanted a column text", broken=True)
    before, turns = split_at_labels(BLOCK, text)
    if before.strip() or not all(said.endswith("</s>") for _, said in turns):
        raise Refused("text_outside_turns", broken=True)
    return dialogue(
        record, labelled((label, said.removesuffix("</s>").strip()) for label, said in turns)
    )
