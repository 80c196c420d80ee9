"""Questions with passages: readers for the benchmarks of retrieval. Nothing is trained on these."""

import json
import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from babyllama.errors import DataError
from babyllama.retrieval.retriever import Retriever


@dataclass(frozen=True)
class Question:
    """A question about a passage.

    answers: any of them is right
    """

    source: str
    passage: str
    text: str
    answers: tuple[str, ...]


def read_questions(path: Path) -> list[Question]:
    """The questions of a file of CMRC 2018, of SQuAD's layout (XQuAD), or of C3.

    raises: DataError if the file is none of these
    """
    try:
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        return list(_questions(path.name.split(".")[0], json.loads(data)))
    except FileNotFoundError:
        raise DataError(f"{path}: wanted questions with passages, found no such file") from None
    except (ValueError, KeyError, TypeError, IndexError, lzma.LZMAError) as error:
        raise DataError(
            f"{path}: wanted questions in the layout of CMRC 2018, SQuAD or C3, found "
            f"{type(error).__name__} {error}; name another file"
        ) from None


def _questions(source: str, data: list | dict) -> Iterator[Question]:
    if isinstance(data, dict):
        for paragraph in (p for article in data["data"] for p in article["paragraphs"]):
            for qa in paragraph["qas"]:
                answers = tuple(answer["text"] for answer in qa["answers"])
                yield Question(source, paragraph["context"], qa["question"], answers)
        return
    for item in data:
        if isinstance(item, list):
            for qa in item[1]:
                yield Question(source, "\n".join(item[0]), qa["question"], (qa["answer"],))
        else:
            for qa in item["qas"]:
                answers = tuple(map(_written, qa["answers"]))
                yield Question(source, item["context_text"], qa["query_text"], answers)


def _written(answer: str | float) -> str:
    """CMRC has years and the like as numbers."""
    is_whole = isinstance(answer, float) and answer.is_integer()
    return str(int(answer)) if is_whole else str(answer)


def squeeze(text: str) -> str:
    """What is compared of a text: its letters and digits."""
    return "".join(character for character in text.lower() if character.isalnum())


def find_rows(questions: list[Question], retriever: Retriever) -> dict[str, str]:
    """For each of the questions' passages that stands whole in the index its row there.

    Nearly the same words in the same order are enough: readers and cleaning change marks.
    """
    texts: dict[str, list[str]] = {}
    for number in range(len(retriever.index)):
        passage = retriever.index.passage(number)
        texts.setdefault(passage.row, []).append(passage.text)
    rows, by_piece = {row: squeeze("".join(parts)) for row, parts in texts.items()}, {}
    for row, text in rows.items():
        for start in range(len(text) - 11):
            by_piece.setdefault(text[start : start + 12], row)
    found = {}
    for passage in dict.fromkeys(question.passage for question in questions):
        text = squeeze(passage)
        pieces = [text[start : start + 12] for start in range(0, max(len(text) - 11, 1), 12)]
        row = next((by_piece[piece] for piece in pieces if piece in by_piece), None)
        if row and sum(piece in rows[row] for piece in pieces) >= 0.8 * len(pieces):
            found[passage] = row
    return found
