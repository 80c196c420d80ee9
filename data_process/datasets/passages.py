"""Questions about a passage: SQuAD and sets in its layout, CMRC 2018, QuAC, C3, DuReader.

The passage is the reference text, its questions are the turns, the first answer counts. Questions
without an answer or without words are left out. A passage with many questions gives several
dialogues of at most MAX_TURNS: a long one would lose its last turns to the model's context, of
which the reference text alone takes most.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from data_process.columns import Fields, Refused, as_text
from data_process.datasets.exam import refuse_scored
from data_process.datasets.turns import dialogue, in_turns
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
    if asked is None:
        asked = [article]
    if columns:
        fields = Fields(record, columns)
        context, asked = (
            fields.text("reference"),
            [{"question": fields.text("question"), "answer": fields.text("answer")}],
        )
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
