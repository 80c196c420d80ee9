"""One question, one answer: Alpaca's and BELLE's {instruction, input, output} and relatives.

All question columns (columns.py) and the input behind them are what is asked. `history` (a list of
[question, answer]) and `system` are understood beside them; an input may say in words that there
is none ("无输入"). A record with a list of turns instead is read as conversations.py does it.
"""

import re
from collections.abc import Iterator, Mapping

from data_process.clean import unescape
from data_process.columns import Fields, Refused
from data_process.datasets.conversations import about_of, conversation
from data_process.datasets.turns import dialogue, in_turns, messages_of
from data_process.raw import Record

NO_INPUT = re.compile(
    r"\W{0,9}(?:(?:无|没有|无需|不需要)输入|no ?input)\W{0,9}|无|不适用|n/a", re.IGNORECASE
)
PLACEHOLDER = re.compile(r"\{\{(?:name|author)\}\}")  # in LLaMA-Factory's identity.json


def instruction(
    record: Record, columns: Mapping[str, str] | None = None, roles: Mapping[str, str] | None = None
) -> dict:
    """One dialogue, with earlier turns where it has a history."""
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
