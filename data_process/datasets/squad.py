"""SQuAD and sets in its layout (DRCD, XQuAD, CMRC 2018): questions about a paragraph.

    {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}

The paragraph is the reference text, its questions are the turns, the first answer counts.
Questions without an answer (SQuAD v2) or without words are left out. A paragraph with many
questions gives several dialogues of at most MAX_TURNS: a long one would lose its last turns to
the model's context, of which the reference text alone takes most.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse, with_ids
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "reference"
SOURCE = Source(
    home="github.com/DRCKnowledgeTeam/DRCD",
    rows="26,936 / 3,524 / 3,493 questions",
    urls=tuple(
        f"https://raw.githubusercontent.com/DRCKnowledgeTeam/DRCD/HEAD/DRCD_{part}.json"
        for part in ("training", "dev", "test")
    ),
)
LICENSE = "CC BY-SA 3.0 (DRCD)"

MAX_TURNS = 8


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue or more a paragraph."""
    for record in records:
        if isinstance(record, Skip):
            yield record
        else:
            yield from with_ids(record, squad_rows(record))


def squad_rows(record: Record) -> Iterator[dict | Skip]:
    """The rows of an article, or of a whole file that stands on one line."""
    try:
        articles = record.data.get("data", [record.data])
        paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
        asked = [
            (paragraph["context"], [(qa["question"], qa.get("answers")) for qa in paragraph["qas"]])
            for paragraph in paragraphs
        ]
    except (AttributeError, KeyError, TypeError):
        yield refuse(record, "wrong_keys")
        return
    for context, pairs in asked:
        yield from reference_rows(
            record, context, [(q, first_answer(answers)) for q, answers in pairs]
        )


def first_answer(answers: object) -> object:
    """The text of the first answer, given as {"text": …} or plainly; None if there is none."""
    answer = answers[0] if isinstance(answers, list) and answers else None
    return answer.get("text") if isinstance(answer, dict) else answer


def reference_rows(
    record: Record, reference: object, pairs: list[tuple[object, object]]
) -> Iterator[dict | Skip]:
    """Dialogues about a reference text, of at most MAX_TURNS questions each.

    pairs: questions with their answers
    """
    if not isinstance(reference, str) or not reference.strip():
        yield refuse(record, "no_reference")
        return
    answered = []
    for question, answer in pairs:
        if not isinstance(answer, str) or not answer.strip():
            yield Skip("no_answer", record.where, str(question), broken=False)
        elif not isinstance(question, str) or not question.strip():
            yield Skip("no_question", record.where, answer, broken=False)
        else:
            answered += [question, answer]
    for start in range(0, len(answered), 2 * MAX_TURNS):
        turns = in_turns(answered[start : start + 2 * MAX_TURNS])
        yield dialogue(record, [{"role": "system", "content": reference}, *turns])
