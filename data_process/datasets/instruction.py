"""One question, one answer: Alpaca's and BELLE's {instruction, input, output} and relatives."""

from collections.abc import Iterator
from pathlib import Path

from data_process.raw import Record, Skip, as_row, records

KIND = "chat"
SOURCE = 'your own files of {"instruction": …, "input": …, "output": …} (Alpaca, BELLE, Firefly)'
LICENSE = "that of the files"

# Keys of the question's parts, key of the answer; the first answer present decides.
PAIRS = ((("instruction", "input"), "output"), (("instruction", "input"), "target"),
         (("prompt",), "response"))  # fmt: skip


def read(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One dialogue an object, with earlier turns where it has a history."""
    for record in records(raw_dir, encoding):
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    if not isinstance(record.data, dict):
        return Skip("not_json", record.where, record.data)
    found = next((pair for pair in PAIRS if pair[1] in record.data), None)
    if not found:
        return Skip("wrong_keys", record.where, str(record.data))
    parts = [record.data.get(key) or "" for key in found[0]]
    history, system = record.data.get("history") or [], record.data.get("system") or ""
    if not isinstance(history, list) or not all(_is_pair(turn) for turn in history):
        return Skip("wrong_type", record.where, str(record.data))
    answer = record.data[found[1]]
    if not all(isinstance(text, str) for text in (*parts, answer, system)):
        return Skip("wrong_type", record.where, str(record.data))
    question = "\n".join(part.strip() for part in parts if part.strip())
    messages = [{"role": "system", "content": system}] if system.strip() else []
    for user, assistant in [*history, (question, answer)]:
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": assistant})
    return as_row(record, messages=messages)


def _is_pair(turn: object) -> bool:
    return isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
