"""Your own rows about pictures, and the parts that all readers of such rows share.

    {"image": "a.jpg", "messages": [{"role": "user", "content": "…"}, …]}     or "conversations"
    {"image": "a.jpg", "qa": [{"question": "…", "answer": "…"}, …]}           each pair one row

Only the rows are read: files of JSON, also compressed, below the directory. The pictures stay where
they are; python -m vqa.pack looks for them. A file whose name says test or dev is that part.
"""

from collections.abc import Iterator
from pathlib import Path

from babyllama.config import shown
from babyllama.errors import DataError
from data_process.datasets.conversations import LISTS, conversation, dialogue, in_turns, refuse
from data_process.raw import Part, Record, Skip, data_files, records
from data_process.registry import Source

KIND = "vqa"
SOURCE = Source(
    home='your own files of {"image": …, "messages" | "conversations" | "qa": […]}',
    manual="nothing to fetch: put your own files there",
)
LICENSE = "that of the files"

ROWS = (".json", ".jsonl", ".json.xz", ".jsonl.xz", ".json.gz", ".jsonl.gz")
PLACEHOLDER = "<image>"


def read_dir(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """One row a dialogue, or a question with its answer."""
    for record in records(row_files(raw_dir), encoding):
        if isinstance(record, Skip):
            yield record
        else:
            yield from rows_of(record)


def row_files(raw_dir: Path, endings: tuple[str, ...] = ROWS) -> list[Part]:
    """The files of rows below a directory; pictures beside them are left alone.

    raises: DataError if there are none
    """
    paths = [path for path in data_files(raw_dir) if path.name.endswith(endings)]
    if not paths:
        raise DataError(f"{shown(raw_dir)}: wanted {', '.join(endings)} files, found none")
    return [Part(path, path.name) for path in paths]


def rows_of(record: Record) -> Iterator[dict | Skip]:
    """The rows of one object."""
    if not isinstance(record.data, dict) or not isinstance(record.data.get("qa"), list):
        yield about_picture(record)
        return
    for number, pair in enumerate(record.data["qa"]):
        if not isinstance(pair, dict):
            yield refuse(record, "wrong_type")
            continue
        turns = in_turns((pair.get("question"), pair.get("answer")))
        row = with_image(record, dialogue(record, turns))
        yield row if isinstance(row, Skip) else row | {"id": f"{record.n}-{number}"}


def about_picture(record: Record) -> dict | Skip:
    """The row of an object with a picture and a list of turns."""
    if not isinstance(record.data, dict) or not any(key in record.data for key in LISTS):
        return refuse(record, "wrong_keys")
    return with_image(record, conversation(record))


def with_image(record: Record, row: dict | Skip) -> dict | Skip:
    """A dialogue with its record's picture; "<image>" and the line break beside it go.

    Refused are rows of no picture, of several, and those that name the picture anywhere but in the
    first question.
    """
    if isinstance(row, Skip):
        return row
    named = record.data.get("image")
    names = named if isinstance(named, list) else str(named or "").split(",")
    names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    if len(names) != 1:
        return refuse(record, "several_pictures" if names else "no_picture", broken=False)
    messages = [dict(message) for message in row["messages"]]
    question = next(m for m in messages if m["role"] == "user")
    text = question["content"]
    for mark in (f"{PLACEHOLDER}\n", f"\n{PLACEHOLDER}", PLACEHOLDER):
        text = text.replace(mark, "", 1) if PLACEHOLDER in text else text
    question["content"] = text
    if not text.strip():
        return refuse(record, "empty_turn", broken=False)
    if any(PLACEHOLDER in message["content"] for message in messages):
        return refuse(record, "several_pictures", broken=False)
    return row | {"image": names[0], "messages": messages}
