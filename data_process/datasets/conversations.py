"""Dialogues: lists of turns, and texts whose turns begin with the name of who speaks.

ShareGPT, minimind, Diamante, KdConv, DuConv, LCCC, MOSS and relatives: the list stands under one of
the names in names.yaml, its turns in any form that `messages_of` knows. Dialogues that call tools
are left out. A reference text or a list of facts beside the turns is what the dialogue is about,
and becomes its system turn. Then RedGPT, BELLE's dialogues and Llama-Chinese: labels in a text.
"""

import functools
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle

from babyllama.rows import check_messages
from data_process.clean import unescape
from data_process.columns import Fields, Refused, as_text, columns, names
from data_process.raw import Record, Skip, as_row

# Both sides of a turn in one object: {"human": …, "assistant": …}, {"q": …, "a": …}.
SIDES = ((("user",), "question", ("input",)), (("bot", "gpt", "moss"), "answer", ()))
LABEL = re.compile(r"\s*(\w{1,10})\s?[:：]\s*")
AROUND = " \t\r\n<|>:：[]【】#*"  # a role: 用户： and <|user|>


@functools.cache
def roles_by_name() -> dict[str, str]:
    """Who speaks under a name."""
    return {name: role for role, some in names("roles").items() for name in some}


def calls_tools(data: dict) -> bool:
    """True if an entry or a turn calls a tool."""
    return any(data.get(key) for key in names("turns")["tool_keys"])


def dialogue(record: Record, messages: list[dict], **more: object) -> dict:
    """The row of a dialogue.

    A last question without an answer may stay: clean.py cuts and counts it.
    more: further keys of the row
    raises: Refused if the turns do not alternate, or one is empty
    """
    turns = [message for message in messages if message["role"] != "system"]
    if turns and turns[-1]["role"] == "user":
        turns.pop()
    if reason := check_messages(turns) if turns else "no_answer":
        said_by = ", ".join(message["role"] for message in messages[:5]) or "nobody"
        raise Refused(reason, f"turns of {said_by}; wanted user and assistant in turn")
    return as_row(record, messages=messages, **more)


def labelled(
    pairs: Iterable[tuple[object, object]], roles: Mapping[str, str] | None = None
) -> list[dict]:
    """Messages of (label, content); labels stand in names.yaml or in `roles`.

    raises: Refused that names a label which stands in neither
    """
    known = roles_by_name() | {name.lower(): role for name, role in (roles or {}).items()}
    messages = []
    for label, content in pairs:
        name = str(label).strip(AROUND).lower()
        if name not in known:
            raise Refused(
                "unknown_role",
                f"role {label!r}; known are {', '.join(roles_by_name())}; say what it is with "
                f"--roles.{shlex.quote(name)} user (or assistant, or system)",
            )
        messages.append({"role": known[name], "content": as_text(content, f"a turn of {label!r}")})
    return messages


def in_turns(utterances: Iterable[object]) -> list[dict]:
    """Messages of two speakers who take turns; the first is the user."""
    sides = cycle(("user", "assistant"))
    return [
        {"role": side, "content": as_text(said, "a turn")}
        for side, said in zip(sides, utterances, strict=False)
    ]


def split_at_labels(label: re.Pattern[str], text: str) -> tuple[str, list[tuple[str, str]]]:
    """A text with marked turns, as what stands before the first mark and (label, content) pairs.

    label: finds a mark; its one group is the label
    """
    before, *rest = label.split(text)
    return before, list(zip(rest[::2], map(str.strip, rest[1::2]), strict=True))


def messages_of(turns: object, roles: Mapping[str, str] | None = None) -> list[dict]:
    """Messages of a list of turns in any form.

    {"from" | "role": …, "value" | "content": …}, {"human": …, "assistant": …}, [question, answer],
    "text", "A: text", or {"turn_1": …}; turns without a role alternate, the first is the user's
    raises: Refused
    """
    if isinstance(turns, str):  # as parquet files hold them
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise Refused("wrong_type", "the turns: one text; wanted a list") from None
    turns = list(turns.values()) if isinstance(turns, dict) else turns
    if not isinstance(turns, list):
        raise Refused("wrong_type", f"the turns: {turns!r:.40}; wanted a list")
    found = [LABEL.match(turn) if isinstance(turn, str) else None for turn in turns]
    marks = [mark for mark in found if mark and mark[1].lower() in roles_by_name()]
    if turns and len(marks) == len(turns):
        pairs = [(mark[1], turn[mark.end() :]) for mark, turn in zip(marks, turns, strict=True)]
    else:
        pairs = [pair for turn in turns for pair in _pairs(turn)]
    if any(label in names("turns")["tool_roles"] for label, _ in pairs):
        raise Refused("tools")
    if all(label is None for label, _ in pairs):
        return in_turns(said for _, said in pairs)
    return labelled(pairs, roles)


def _pairs(turn: object) -> list[tuple[str | None, object]]:
    """(speaker or None, content) of one turn, or of the two that stand in it."""
    if isinstance(turn, list) and len(turn) == 2:
        return [("user", turn[0]), ("assistant", turn[1])]
    if not isinstance(turn, dict):
        return [(None, turn)]
    if calls_tools(turn):
        raise Refused("tools")
    turn = {str(key).lower(): value for key, value in turn.items()}
    speakers, contents = names("turns")["speakers"], names("turns")["contents"]
    speaker = next((turn[key] for key in speakers if key in turn), None)
    said = next((key for key in contents if key in turn), None)
    if speaker is not None:
        if not said:
            raise Refused("unknown_columns", f"a turn with {', '.join(turn)}; known for what is "
                          f"said are {', '.join(contents)}")  # fmt: skip
        return [(speaker, turn[said])]
    asked, answered = (
        next((key for key in (*first, *columns()[role], *last) if key in turn), None)
        for first, role, last in SIDES
    )
    if asked and answered:
        return [("user", turn[asked]), ("assistant", turn[answered])]
    if not said:
        raise Refused("unknown_columns", f"a turn with {', '.join(turn) or 'nothing'}; known are "
                      f"{', '.join(speakers)} with {', '.join(contents)}")  # fmt: skip
    return [(None, turn[said])]


def conversation(
    record: Record, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> dict:
    """One dialogue."""
    if isinstance(record.data, list):  # the turns themselves
        return dialogue(record, messages_of(record.data, roles))
    fields = Fields(record, columns)
    if calls_tools(record.data):
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


TAGS = re.compile(r"^\s*<\|(?:Human|MOSS)\|>:|<eo[hm]>\s*$")


def moss(record: Record) -> dict:
    """MOSS: {"chat": {"turn_1": {"Human": "<|Human|>: …<eoh>", "Commands": …, "MOSS": …}, …}}."""
    data = record.data if isinstance(record.data, dict) else {}
    turns = list(data["chat"].values()) if isinstance(data.get("chat"), dict) else []
    persona = data.get("meta_instruction") or ""
    texts = [
        t.get(side) if isinstance(t, dict) else None for t in turns for side in ("Human", "MOSS")
    ]
    if not texts or not all(isinstance(text, str) for text in (persona, *texts)):
        raise Refused("wrong_keys", "wanted chat.turn_1.Human and .MOSS", broken=True)
    for turn in turns:
        command = str(turn.get("Commands", "")).strip().removeprefix("<|Commands|>:")
        if command.removesuffix("<eoc>").strip() not in ("", "None"):
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
            data = record.data if isinstance(record.data, dict) else {}
            waiting.append((str(data.get("dialog_id")), data, record))
    named = [(data, record._replace(split=split.get(name))) for name, data, record in waiting]
    for data, record in sorted(named, key=lambda one: ORDER.index(one[1].split)):
        try:
            if not isinstance(data.get("content"), list):
                raise Refused("wrong_keys", f"columns {', '.join(data)}; wanted content", True)
            yield dialogue(record, in_turns(data["content"]))
        except Refused as refused:
            yield refused.skip(record)


# Labels drift (`HUMAN：`, `Human(用户): `) and count only where a line begins.
SPEAKER = re.compile(
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
    before, turns = split_at_labels(SPEAKER, text)
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


# One question, one answer: Alpaca's and BELLE's {instruction, input, output} and relatives.
NO_INPUT = re.compile(
    r"\W{0,9}(?:(?:无|没有|无需|不需要)输入|no ?input)\W{0,9}|无|不适用|n/a", re.IGNORECASE
)
PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")  # in LLaMA-Factory's identity.json


def instruction(
    record: Record, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> dict:
    """One dialogue: all question columns (columns.py) and the input behind them are what is asked,
    `history` (a list of [question, answer]) comes before. An input may say in words that there is
    none ("无输入"). A record with a list of turns instead is read as `conversation` does it."""
    fields = Fields(record, columns)
    if "turns" in fields and "answer" not in fields:
        return conversation(record, columns, roles)
    if "answer" not in fields or not ("question" in fields or "input" in fields):
        raise fields.unknown("question", "answer")
    asked, given, answer = fields.texts("question"), fields.texts("input"), fields.text("answer")
    history = fields.value("history") or []
    about = about_of(fields)
    if PLACEHOLDER.search(answer):
        raise Refused("placeholder")
    if asked and given and NO_INPUT.fullmatch(unescape(given[0])):
        del given[0]
    question = "\n".join(asked + given)
    if not question or not answer:
        raise Refused("no_answer" if question else "no_question")
    system = [{"role": "system", "content": about}] if about else []
    turns = messages_of(history, roles) if history else []
    return dialogue(
        record, [*system, *turns, *in_turns((question, answer))], unused=fields.unused()
    )


def belle(record: Record, columns: Mapping[str, str] | None = None) -> Iterator[dict]:
    """The same; a seed task {"instruction", "instances": [{"input", "output"}]} gives one dialogue
    for each of its instances, and the evaluation set is left out."""
    data = record.data if isinstance(record.data, dict) else {}
    if "std_answer" in data:
        raise Refused("evaluation_set")
    if not isinstance(data.get("instances"), list):
        yield instruction(record, columns)
    elif not all(isinstance(instance, dict) for instance in data["instances"]):
        raise Refused("wrong_type", "column 'instances': wanted objects", broken=True)
    else:
        for instance in data["instances"]:
            yield instruction(record._replace(data=data | instance), columns)


ANSWER_LABEL = re.compile(r"(?<!\s)\s*答案[:：]\s*\Z")
CUT_OUT = re.compile(r"#idiom\d+#|__")


def pclue(record: Record) -> dict:
    """pCLUE's {"input", "target", "type", "answer_choices"?}.

    Several targets are joined by "，", as the official scorer does. Left out are rows whose target
    is none of the choices, and texts with the marks of cut-out idioms.
    """
    fields = Fields(record)
    question, target = fields.value("input"), fields.value("answer")
    choices = record.data.get("answer_choices") or []
    if target is None and "input" in fields:  # the test files that the publisher scores
        raise Refused("no_target")
    targets = target if isinstance(target, list) else [target]
    good = isinstance(choices, list) and all(isinstance(t, str) for t in (question, *targets))
    if not good:
        raise fields.unknown("input", "answer")
    if choices and not all(text in choices for text in targets):
        raise Refused("target_not_a_choice")
    if any(map(CUT_OUT.search, (question, *targets))):
        raise Refused("cut_out_mark")
    return dialogue(record, in_turns((ANSWER_LABEL.sub("", question), "，".join(targets))))
