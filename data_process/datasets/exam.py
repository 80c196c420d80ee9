"""Training parts of benchmarks as dialogues: the question, a request in Chinese, the answer.

Each function turns one of the published layouts into a question and an answer; what is asked of
the model stands in the catalogue (`request`). Parts that a benchmark scores are refused.
"""

import re
from collections.abc import Callable

from data_process.columns import Refused, as_text
from data_process.datasets.turns import dialogue, in_turns
from data_process.raw import Record

Pair = tuple[object, object]  # question, answer


def asked(pair_of: Callable[[dict], Pair]) -> Callable[..., dict]:
    """A reader out of a function that finds question and answer in an object."""

    def reader(record: Record, request: str = "") -> dict:
        refuse_scored(record)
        if not isinstance(record.data, dict):
            raise Refused("not_an_object", broken=True)
        try:
            question, answer = pair_of(record.data)
        except (KeyError, TypeError, AttributeError, IndexError):
            found = ", ".join(map(str, record.data))
            raise Refused("wrong_keys", f"columns {found}; wanted those of "
                          f"{pair_of.__name__}: {pair_of.__doc__}", True) from None  # fmt: skip
        question = question.strip() if isinstance(question, str) else ""
        answer = as_text(answer, "answer").strip()
        if not question:
            raise Refused("no_question", broken=True)
        if not answer:
            raise Refused("no_answer")
        return dialogue(record, in_turns((f"{question}\n{request}".strip(), answer)))

    reader.__doc__ = pair_of.__doc__
    return reader


def refuse_scored(record: Record) -> None:
    """Rows of the parts that a benchmark scores must not be learnt from."""
    if record.split in ("val", "test"):
        raise Refused("scored_part")


CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")


@asked
def gsm8k(data: dict) -> Pair:
    """{"question", "answer"}, with calculator notes <<3+4=7>> and "#### 7" at the end."""
    steps, mark, result = CALCULATOR.sub("", data["answer"]).rpartition("####")
    answer = f"{steps.strip()}\n答案是{result.strip().replace(',', '')}" if mark else ""
    return data["question"], answer


@asked
def ape210k(data: dict) -> Pair:
    """{"original_text", "equation", "ans"}"""
    equation, result = data["equation"].strip(), data["ans"].strip()
    return data["original_text"], f"{equation}\n答案是{result}" if equation and result else ""


@asked
def math(data: dict) -> Pair:
    r"""{"problem", "solution"}, whose result stands in \boxed{…}"""
    solution = data["solution"]
    return data["problem"], solution if "\\boxed" in solution else ""


@asked
def commonsenseqa(data: dict) -> Pair:
    """{"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}, or two lists."""
    question = data["question"]
    choices = question["choices"] if isinstance(question, dict) else data["choices"]
    question = question["stem"] if isinstance(question, dict) else question
    if isinstance(choices, dict):
        options = dict(zip(choices["label"], choices["text"], strict=False))
    else:
        options = {choice["label"]: choice["text"] for choice in choices}
    if not all(isinstance(text, str) and text.strip() for pair in options.items() for text in pair):
        raise TypeError
    shown = "\n".join(f"{label}. {text}" for label, text in options.items())
    key = data.get("answerKey")
    question = f"{question.strip()}\n{shown}" if question.strip() else ""
    return question, f"{key}. {options[key]}" if key in options else ""


PACKED = re.compile(r"(?s)Passage: (.*)\n?Question: (.*?)\n?")


def boolq(record: Record, request: str = "") -> dict:
    """BoolQ: {"question", "passage", "answer" | "label"}, or a packed `query` with `gold`; the
    passage is the reference text, the answer 是 or 否."""
    refuse_scored(record)
    data = record.data if isinstance(record.data, dict) else {}
    passage, question = data.get("passage"), data.get("question")
    answer = data.get("answer", data.get("label", data.get("gold")))
    packed = PACKED.fullmatch(data["query"]) if isinstance(data.get("query"), str) else None
    if packed:
        passage, question = packed.groups()
    passage, question = (x if isinstance(x, str) else "" for x in (passage, question))
    if not passage.strip() or not question.strip():
        raise Refused("wrong_keys", "wanted question, passage and answer", broken=True)
    if answer not in (0, 1):  # true and false are these numbers
        raise Refused("no_answer")
    turns = in_turns(
        [f"{question.strip().removesuffix('?')}？\n{request}", "是" if answer else "否"]
    )
    return dialogue(record, [{"role": "system", "content": passage.strip()}, *turns])


@asked
def nq_open(data: dict) -> Pair:
    """{"question", "answer": […]}, of whose answers the first is learnt"""
    question, answers = data["question"].strip(), data.get("answer")
    answer = answers[0] if isinstance(answers, list) and answers else answers
    return f"{question}？" if question else "", answer or ""


@asked
def triviaqa(data: dict) -> Pair:
    """{"Question", "Answer": {"Value"}}, or the parquet form in lower case"""
    low = {str(key).lower(): value for key, value in data.items()}
    answer = low.get("answer")
    if isinstance(answer, dict):
        answer = {str(key).lower(): value for key, value in answer.items()}.get("value")
    return low["question"], answer or ""
