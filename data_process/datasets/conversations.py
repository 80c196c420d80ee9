"""Lists of turns: ShareGPT, minimind, Diamante, KdConv, DuConv, LCCC, MOSS and relatives.

The list stands under one of the names in columns.py, its turns in any form that turns.py knows.
Dialogues that call tools are left out. A reference text or a list of facts beside the turns is
what the dialogue is about, and becomes its system turn.
"""

import re
from collections.abc import Iterable, Iterator, Mapping

from data_process.columns import Fields, Refused
from data_process.datasets.turns import TOOL_KEYS, dialogue, in_turns, messages_of
from data_process.raw import Record, Skip


def conversation(
    record: Record, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> dict:
    """One dialogue."""
    if isinstance(record.data, list):  # the turns themselves
        return dialogue(record, messages_of(record.data, roles))
    fields = Fields(record, columns)
    if any(record.data.get(key) for key in TOOL_KEYS):
        raise Refused("tools")
    turns = fields.value("turns")
    if turns is None:
        raise Refused("no_answer") if "turns" in fields else fields.unknown("turns")
    messages = messages_of(turns, roles)
    about = about_of(fields)
    if about and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": about})
    return dialogue(record, messages, unused=fields.unused())


def about_of(fields: Fields) -> str:
    """What a dialogue is about: a reference text, a list of texts or of (subject, relation, object)
    as lines, or else what the system says."""
    about = fields.value("reference")
    if not isinstance(about, list):
        return fields.text("reference") or fields.text("system")
    lines = (" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in about)
    return "\n".join(lines)


INNER_SPACE = re.compile(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])")


def spaced(record: Record) -> dict:
    """LCCC: a list of utterances, published with spaces between their characters or words, which
    go again but for those between Latin words."""
    turns = record.data.split("\t") if isinstance(record.data, str) else record.data
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise Refused("wrong_type", "wanted a list of utterances", broken=True)
    return dialogue(record, in_turns(map(_joined, turns)))


def _joined(text: str) -> str:
    words = text.split()
    if all(len(word) == 1 for word in words):  # spaced by characters, Latin words too
        return "".join(words)
    return INNER_SPACE.sub("", text)


SIDES = ("Human", "MOSS")
TAGS = re.compile(r"^\s*<\|(?:Human|MOSS)\|>:|<eo[hm]>\s*$")
NO_COMMAND = ("", "None")


def moss(record: Record) -> dict:
    """MOSS: {"chat": {"turn_1": {"Human": "<|Human|>: …<eoh>", "Commands": …, "MOSS": …}, …}}."""
    data = record.data if isinstance(record.data, dict) else {}
    turns = list(data["chat"].values()) if isinstance(data.get("chat"), dict) else []
    persona = data.get("meta_instruction") or ""
    texts = [t.get(side) if isinstance(t, dict) else None for t in turns for side in SIDES]
    if not texts or not all(isinstance(text, str) for text in (persona, *texts)):
        raise Refused("wrong_keys", "wanted chat.turn_1.Human and .MOSS", broken=True)
    commands = (str(turn.get("Commands", "")).strip() for turn in turns)
    commands = (c.removeprefix("<|Commands|>:").removesuffix("<eoc>").strip() for c in commands)
    if any(command not in NO_COMMAND for command in commands):
        raise Refused("tools")
    system = [{"role": "system", "content": persona}] if persona.strip() else []
    return dialogue(record, system + in_turns(TAGS.sub("", str(text)).strip() for text in texts))


ORDER = ("test", "val", "train", None)


def naturalconv(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """NaturalConv: {"dialog_id", "content": […]}, and the official split in lists of ids, which may
    be read after the dialogues they name; so these wait (about 50 MB). Held-out parts come first.
    """
    split: dict[str, str | None] = {}
    waiting = []
    for record in records:
        if isinstance(record, Skip):
            yield record
        elif isinstance(record.data, str):
            split[record.data.strip()] = record.split
        else:
            waiting.append(record)
    named = [record._replace(split=split.get(_dialog_id(record))) for record in waiting]
    for record in sorted(named, key=lambda record: ORDER.index(record.split)):
        data = record.data if isinstance(record.data, dict) else {}
        try:
            if not isinstance(data.get("content"), list):
                raise Refused("wrong_keys", f"columns {', '.join(data)}; wanted content", True)
            yield dialogue(record, in_turns(data["content"]))
        except Refused as refused:
            yield refused.skip(record)


def _dialog_id(record: Record) -> str:
    return str(record.data.get("dialog_id")) if isinstance(record.data, dict) else ""
