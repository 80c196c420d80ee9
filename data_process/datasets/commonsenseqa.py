"""CommonsenseQA: everyday knowledge in English, five options.

{"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}, or the parquet form with two
lists. The answer is the letter and the option. dev is what the benchmark scores: refused here.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import refuse
from data_process.datasets.gsm8k import asked, scored
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
RULES = "exam"
SOURCE = Source(
    home="tau-nlp.org/commonsenseqa",
    rows="9,741 (train)",
    huggingface="tau/commonsense_qa",
    files=("data/train-*.parquet",),
    urls=("https://s3.amazonaws.com/commensenseqa/train_rand_split.jsonl",),
)
LICENSE = "MIT"

REQUEST = "请写出正确选项的字母和内容。"


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One dialogue a question."""
    for record in records:
        yield record if isinstance(record, Skip) else scored(record) or _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    question, choices = data.get("question"), data.get("choices")
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices")
    if isinstance(choices, dict):
        labels, texts = choices.get("label"), choices.get("text")
        if not isinstance(labels, list) or not isinstance(texts, list):
            return refuse(record, "wrong_keys")
        choices = [{"label": a, "text": b} for a, b in zip(labels, texts, strict=False)]
    if not isinstance(choices, list) or not all(map(_is_choice, choices)):
        return refuse(record, "wrong_keys")
    options = {choice["label"]: choice["text"] for choice in choices}
    key = data.get("answerKey")
    if not isinstance(key, str) or key not in options:
        return refuse(record, "no_answer", broken=False)
    if not isinstance(question, str) or not question.strip():
        return refuse(record, "no_question")
    shown = "\n".join(f"{label}. {text}" for label, text in options.items())
    return asked(record, f"{question.strip()}\n{shown}", REQUEST, f"{key}. {options[key]}")


def _is_choice(choice: object) -> bool:
    return isinstance(choice, dict) and all(
        isinstance(choice.get(key), str) and choice[key].strip() for key in ("label", "text")
    )
