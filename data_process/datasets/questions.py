"""Questions about a passage: SQuAD and sets in its layout, CMRC 2018, QuAC, C3; and those of
benchmarks, with a request in Chinese that stands in the catalogue.

A passage is the reference text, its questions are the turns, the first answer counts. Questions
without an answer or without words are left out. A passage with many questions gives several
dialogues of at most MAX_TURNS: a long one would lose its last turns to the model's context, of
which the reference text alone takes most. Parts that a benchmark scores are refused.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_process.columns import Fields, Refused, as_text
from data_process.datasets.conversations import dialogue, in_turns
from data_process.raw import Record, Skip

MAX_TURNS = 8
CONTEXTS = ("context", "context_text", "passage", "paragraph", "document", "text", "短文", "文章")
LISTS = ("qas", "questions", "qa", "问答")
QUESTIONS = ("question", "query_text", "query", "q", "问题")
ANSWERS = ("orig_answer", "answers", "answer", "a", "答案", "response")
NO_ANSWER, UNKNOWN = "CANNOTANSWER", "无法回答"  # as QuAC says it, as the model is to say it


def passages(record: Record, columns: Mapping[str, str] | None = None) -> Iterator[dict | Skip]:
    """Dialogues about the passages of a record, which is {"paragraphs": [{context, qas}]}, one such
    passage, or one passage with one question."""
    articles = record.data.get("data") if isinstance(record.data, dict) else None
    articles = articles if isinstance(articles, list) else [record.data]
    found = [pair for article in articles for pair in _passages(article, record, columns)]
    for context, pairs in found:
        yield from about(record, context, pairs)


def scored_passages(record: Record) -> Iterator[dict | Skip]:
    """The same, of a set whose dev part a benchmark scores."""
    refuse_scored(record)
    return passages(record)


def _passages(
    article: Any, record: Record, columns: Mapping[str, str] | None
) -> Iterator[tuple[str, list]]:
    if not isinstance(article, dict):
        raise Refused("not_an_object", broken=True)
    if isinstance(article.get("paragraphs"), list):
        for paragraph in article["paragraphs"]:
            yield from _passages(paragraph, record, columns)
        return
    context = next((article[name] for name in CONTEXTS if name in article), None)
    asked = next((article[name] for name in LISTS if isinstance(article.get(name), list)), None)
    asked = [article] if asked is None else asked
    if columns:
        fields = Fields(record, columns)
        context = fields.text("reference")
        asked = [{name: fields.text(name) for name in ("question", "answer")}]
    if (
        context is None
        or not all(isinstance(qa, dict) for qa in asked)
        or not (any(name in qa for qa in asked for name in QUESTIONS) or not asked)
    ):
        raise Refused("unknown_columns", f"columns {', '.join(article)}; known are for the "
                      f"passage {', '.join(CONTEXTS)}, for its questions {', '.join(LISTS)} of "
                      f"{', '.join(QUESTIONS)} with {', '.join(ANSWERS)}")  # fmt: skip
    yield context, [(_first(qa, QUESTIONS), answer_of(_first(qa, ANSWERS))) for qa in asked]


def _first(found: dict, names: tuple[str, ...]) -> object:
    return next((found[name] for name in names if name in found), None)


def answer_of(answers: object) -> object:
    """The text of the first answer: plain, {"text": …}, a list of either, or {"text": […]}."""
    answer = answers[0] if isinstance(answers, list) and answers else answers
    answer = answer.get("text") if isinstance(answer, dict) else answer
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return UNKNOWN if answer == NO_ANSWER else answer


def c3(record: Record) -> Iterator[dict | Skip]:
    """C3: [[line, …], [{"question", "choice": […], "answer"}], id]; the answer is the text of a
    choice. The choices are not shown, since the model is to answer, not to choose."""
    data = record.data
    if not (isinstance(data, list) and len(data) == 3 and isinstance(data[0], list)
            and all(isinstance(line, str) for line in data[0]) and isinstance(data[1], list)
            and all(isinstance(q, dict) for q in data[1])):  # fmt: skip
        raise Refused("wrong_type", "wanted [lines, questions, id]", broken=True)
    pairs = [(question.get("question"), question.get("answer")) for question in data[1]]
    return about(record, "\n".join(data[0]), pairs)


def about(
    record: Record, reference: object, pairs: list[tuple[object, object]]
) -> Iterator[dict | Skip]:
    """Dialogues about a reference text, of at most MAX_TURNS questions each."""
    reference = as_text(reference, "the passage").removesuffix(NO_ANSWER)
    if not reference.strip():
        yield Refused("no_reference", broken=True).skip(record)
        return
    answered = []
    for question, answer in pairs:
        texts = [as_text(question, "a question"), as_text(answer, "an answer")]
        if all(text.strip() for text in texts):
            answered += texts
        else:
            reason = "no_answer" if texts[0].strip() else "no_question"
            yield Skip(reason, record.where, "".join(texts), broken=False)
    for start in range(0, len(answered), 2 * MAX_TURNS):
        turns = in_turns(answered[start : start + 2 * MAX_TURNS])
        yield dialogue(record, [{"role": "system", "content": reference}, *turns])


Asked = tuple[object, ...]  # question, answer, and the passage where there is one


def asked(parts_of: Callable[[dict], Asked]) -> Callable[..., dict]:
    """A reader out of a function that finds question and answer in an object."""

    def reader(record: Record, request: str = "") -> dict:
        refuse_scored(record)
        if not isinstance(record.data, dict):
            raise Refused("not_an_object", broken=True)
        try:
            question, answer, *passage = parts_of(record.data)
        except (KeyError, TypeError, AttributeError, IndexError):
            found = ", ".join(map(str, record.data))
            raise Refused("wrong_keys", f"columns {found}; wanted those of "
                          f"{parts_of.__name__}: {parts_of.__doc__}", True) from None  # fmt: skip
        question = question.strip() if isinstance(question, str) else ""
        answer = as_text(answer, "answer").strip()
        if not question:
            raise Refused("no_question", broken=True)
        if not answer:
            raise Refused("no_answer")
        about = [{"role": "system", "content": text} for text in passage]
        return dialogue(record, about + in_turns((f"{question}\n{request}".strip(), answer)))

    reader.__doc__ = parts_of.__doc__
    return reader


def refuse_scored(record: Record) -> None:
    """Rows of the parts that a benchmark scores must not be learnt from."""
    if record.split in ("val", "test"):
        raise Refused("scored_part")


CALCULATOR = re.compile(r"<<[^<>\n]{0,200}>>")


@asked
def gsm8k(data: dict) -> Asked:
    """{"question", "answer"}, with calculator notes <<3+4=7>> and "#### 7" at the end."""
    steps, mark, result = CALCULATOR.sub("", data["answer"]).rpartition("####")
    answer = f"{steps.strip()}\n答案是{result.strip().replace(',', '')}" if mark else ""
    return data["question"], answer


@asked
def commonsenseqa(data: dict) -> Asked:
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


@asked
def boolq(data: dict) -> Asked:
    """{"question", "passage", "answer" | "label"}, or a packed `query` with `gold`; the answer is
    是 or 否"""
    packed = PACKED.fullmatch(data["query"]) if isinstance(data.get("query"), str) else None
    passage, question = packed.groups() if packed else (data["passage"], data["question"])
    if not (passage.strip() and question.strip()):
        raise KeyError
    answer = data.get("answer", data.get("label", data.get("gold")))
    said = (
        ("是" if answer else "否") if answer in (0, 1) else ""
    )  # true and false are these numbers
    return f"{question.strip().removesuffix('?')}？", said, passage.strip()


SLOT = re.compile(r"\{([\w.]+)\}")


def pair(record: Record, question: str, answer: str, request: str = "", must: str = "") -> dict:
    """A question and an answer out of the columns that the catalogue names, in capitals or not:
    "{problem}", "{equation}\\n答案是{ans}", "{answer.value}"; of a list the first counts.

    must: what an answer has to hold
    """
    refuse_scored(record)
    if not isinstance(record.data, dict):
        raise Refused("not_an_object", broken=True)
    cells = {path: _cell(record.data, path) for path in SLOT.findall(question + answer)}
    for template, missing in ((question, "no_question"), (answer, "no_answer")):
        if not all(cells[path] for path in SLOT.findall(template)):
            raise Refused(missing, broken=template is question)
    asked, said = (SLOT.sub(lambda slot: cells[slot[1]], text) for text in (question, answer))
    if must not in said:
        raise Refused("no_answer")
    return dialogue(record, in_turns((f"{asked}\n{request}".strip(), said)))


def _cell(data: dict, path: str) -> str:
    value: Any = data
    for name in path.split("."):
        if isinstance(value, dict):
            low = {str(key).lower(): inner for key, inner in value.items()}
            if value is data and name not in low:
                raise Refused("wrong_keys", f"columns {', '.join(low)}; wanted {path}", broken=True)
            value = low.get(name)
    value = value[0] if isinstance(value, list) and value else value
    return as_text(value, path).strip()
