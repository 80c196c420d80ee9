"""What a benchmark's rows become, whatever their layout: one row, one question.

ask, context   the question, and the text it is about ("" if there is none)
options        the texts to choose from; letters: their names; gold: numbers of the right ones
answers        the texts that count as right, where nothing is to be chosen
subject        part of the benchmark that the row belongs to
Beside these a row keeps its publisher's columns, by which the harness' own prompts ask for it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from babyllama.errors import DataError
from bench.files import lines

LETTERS = "ABCDEFGHIJ"
File = tuple[str, str]  # name and text
Reader = Callable[[Iterable[File]], Iterator[dict | str]]


def row(
    ask: str,
    *,
    context: str = "",
    options: Iterable[str] = (),
    gold: Iterable[int] = (),
    answers: Iterable[str] = (),
    letters: Iterable[str] = (),
    subject: str = "",
    **columns: object,
) -> dict | str:
    """A row, or the reason why there is none."""
    options, gold, answers = list(options), list(gold), [str(a).strip() for a in answers]
    letters = list(letters) or list(LETTERS[: len(options)])
    if not ask.strip():
        return "no question"
    if letters and (len(letters) < 2 or not gold or not all(0 <= g < len(letters) for g in gold)):
        return "no right option"
    if any(not option.strip() for option in options):
        return "empty option"
    if not letters and not any(answers):
        return "no answer"
    made = {"ask": ask.strip(), "context": context.strip(), "options": options}
    made |= {"letters": letters, "gold": gold, "answers": answers, "subject": subject}
    return columns | made


def read_rows(read: Reader, files: Iterable[File], left_out: Counter[str]) -> list[dict]:
    """The rows of some files; entries that make no row are counted by reason.

    raises: DataError that names the file whose layout is another one
    """
    found = []
    for file in files:
        try:
            for item in read([file]):
                if isinstance(item, str):
                    left_out[item] += 1
                else:
                    found.append(item)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{file[0]}: wanted the published layout of this benchmark, found "
                f"{type(error).__name__} {error}; "
                f"bench/choices.py and open_answers.py list the layouts"
            ) from None
    return found


def json_lines(files: Iterable[File]) -> Iterator[tuple[str, dict]]:
    """(name of the file, object) of every line, or of every element of a JSON list."""
    for name, text in files:
        if text.lstrip()[:1] == "[":
            yield from ((name, item) for item in json.loads(text))
        else:
            yield from ((name, json.loads(line)) for line in lines(text) if line.strip())
