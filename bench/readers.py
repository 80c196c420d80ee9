"""Layouts of benchmarks: from the files of a publisher to rows.

Most layouts are tables, whose columns a task file turns into rows (`table`); a function stands
here for each that is not. A row is one question, whatever the layout:

ask, context   the question, and the text it is about ("" if there is none)
options        the texts to choose from; letters: their names; gold: numbers of the right ones
answers        the texts that count as right, where nothing is to be chosen
subject        part of the benchmark that the row belongs to: its file, where it is divided that way
Beside these a row keeps the columns by which the harness' own prompts ask for it.

Files are as their publisher packed them: plain, .xz, .gz, in a tar or a zip; a parquet file is seen
as JSON lines, a row each. A folder is seen through its archives: `mmlu/mmlu.tar.xz` and an unpacked
`mmlu/dev/…` both hold "dev/anatomy_dev.csv". Names are compared from the end, so an outer folder
more does no harm.
"""

import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePosixPath

from jinja2 import Environment, StrictUndefined, UndefinedError

from babyllama.config import shown
from babyllama.errors import ConfigError, DataError

DAMAGED = (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError, zipfile.BadZipFile,
           UnicodeDecodeError)  # fmt: skip


def find(folder: Path, patterns: Sequence[str]) -> list[tuple[str, str]]:
    """(name, text) of the files that the first pattern with any match names, by name.

    raises: DataError if a file is damaged or no UTF-8 text; [] if nothing matches
    """
    for pattern in patterns:
        found = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            try:
                for name, data in _entries(path.relative_to(folder).as_posix(), path, pattern):
                    found.append((name, data.decode("utf-8-sig")))
            except DAMAGED as error:
                raise DataError(
                    f"{shown(path)}: wanted whole files with UTF-8 text, found {error}; get it "
                    f"again"
                ) from None
        if found:
            return sorted(found)
    return []


def _entries(name: str, path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """The files of that name in a file: itself, or what is packed in it."""

    def is_wanted(name: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")

    if name.endswith((".tar", ".tar.xz", ".tar.gz", ".tgz")):
        with tarfile.open(path) as archive:
            for member in archive:
                if is_wanted(member.name) and (file := archive.extractfile(member)):
                    yield member.name, file.read()
    elif name.endswith(".zip"):
        with zipfile.ZipFile(path) as packed:
            yield from ((n, packed.read(n)) for n in packed.namelist() if is_wanted(n))
    elif name.endswith((".xz", ".gz")):
        if is_wanted(name[:-3]):
            read = lzma.decompress if name.endswith(".xz") else gzip.decompress
            yield name[:-3], read(path.read_bytes())
    elif is_wanted(name):
        yield name, _json_lines(path) if name.endswith(".parquet") else path.read_bytes()


def _json_lines(path: Path) -> bytes:
    """The rows of a parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise ConfigError(
            f"wanted pyarrow to read {shown(path)}, found it not installed; "
            f"pip install -c constraints.txt -r requirements/bench.txt"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(" ".join(str(error).split())[:200]) from None
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


LETTERS = "ABCDEFGHIJ"
Reader = Callable[[str, str], Iterator[dict | str]]  # of a file's name and text


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
    made: dict[str, object] = {"ask": ask.strip(), "context": context.strip(), "options": options}
    made |= {"letters": letters, "gold": gold, "answers": answers, "subject": subject}
    return columns | made


def read_rows(read: Reader, files: Iterable[tuple[str, str]], left_out: Counter[str]) -> list[dict]:
    """The rows of some files; entries that make no row are counted by reason.

    raises: DataError that names the file whose layout is another one
    """
    found = []
    for name, text in files:
        try:
            for item in read(name, text):
                if isinstance(item, str):
                    left_out[item] += 1
                else:
                    found.append(item)
        except (ValueError, LookupError, TypeError, AttributeError, UndefinedError) as error:
            raise DataError(
                f"{name}: wanted the published layout of this benchmark, found "
                f"{type(error).__name__} {error}; configs/bench and bench/readers.py have the "
                f"layouts"
            ) from None
    return found


def entries(name: str, text: str, head: Sequence[str] | None, under: str) -> Iterator[dict]:
    """The entries of a file: lines of a table, or JSON objects, one after the other or in lists.

    head: names of the columns of a table whose first line does not name them
    under: the key of an object that holds the entries
    """
    if name.endswith((".csv", ".tsv")):
        how: dict = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if name.endswith(".tsv") else {}
        # Only a line feed ends a line, for texts hold U+2028 and the like.
        for cells in csv.DictReader(io.StringIO(text, newline="\n"), head, **how):
            yield {key: value for key, value in cells.items() if key}
        return
    place, text = 0, text.strip()
    while place < len(text):
        found, place = json.JSONDecoder().raw_decode(text, place)
        place += len(text) - place - len(text[place:].lstrip())
        if isinstance(found, dict):
            found = found.get(under, [found])
        yield from found


def table(
    name: str, text: str, columns: dict, head: Sequence[str] | None = None, under: str = ""
) -> Iterator[dict | str]:
    """The rows of a file whose columns a task file names.

    columns: what a row has as expressions of the publisher's columns in Jinja's language, or null
        for a column as it is. They come in order and may use those before; `file` is the file's
        name, `data` the whole entry. skip: says why an entry makes no row, if it makes none.
    """
    stem = re.sub(r"_(dev|val|test)$", "", PurePosixPath(name).stem)
    for data in entries(name, text, head, under):
        yield _row(data, data | {"file": stem, "data": data}, columns)


def _row(data: dict, known: dict, columns: dict) -> dict | str:
    made = {}
    for key, expression in columns.items():
        known[key] = data[key] if expression is None else _compiled(expression)(known)
        if key != "skip":
            made[key] = known[key]
        elif known[key]:
            return known[key]
    return row(**made)


_JINJA = Environment(undefined=StrictUndefined)


@cache
def _compiled(expression: str) -> Callable[[dict], object]:
    return _JINJA.compile_expression(expression, undefined_to_none=False)


def boxed(solution: str) -> str | None:
    r"""What stands in the last \boxed{…} or \boxed x; None if there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[start:].lstrip("\\").removeprefix("boxed").removeprefix("fbox")
    if not rest.startswith("{"):
        return rest.split("$")[0].strip()
    depth = 0
    for end, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:end]
    return None


_JINJA.globals["LETTERS"] = LETTERS
_JINJA.filters |= {
    "boxed": boxed,
    "findall": lambda text, pattern: re.findall(pattern, text),
    "without": lambda text, pattern: re.sub(pattern, "", text),
    "place": LETTERS.index,
}


def gaokao(name: str, text: str) -> Iterator[dict | str]:
    """GAOKAO-Bench's objective questions; the options stand in the question.

    An entry with several questions gives a row for each.
    """
    subject = PurePosixPath(name).stem.split("_", 1)[1]
    letters = LETTERS[: 7 if "Cloze" in name else 4]  # five of seven sentences fill five gaps
    for entry in json.loads(text)["example"]:
        for number, label in enumerate(entry["answer"], 1):
            known = [letters.index(x) for x in label if x in letters]
            which = f"\n（第 {number} 小题）" if len(entry["answer"]) > 1 else ""
            ask = entry["question"].strip() + which
            yield row(ask, letters=letters, gold=known, subject=subject)


def c3(name: str, text: str) -> Iterator[dict | str]:
    """[[line, …], [{question, choice, answer}], id]; the answer is the text of a choice."""
    subject = "dialogue" if "-d-" in name else "mixed"
    for passage, questions, _ in json.loads(text):
        for each in questions:
            gold = [n for n, choice in enumerate(each["choice"]) if choice == each["answer"]]
            yield row(each["question"], context="\n".join(passage), options=each["choice"],
                      gold=gold, subject=subject)  # fmt: skip


def cmrc2018(name: str, text: str) -> Iterator[dict | str]:
    """data/ ({context_text, qas[query_text, answers]}) and squad-style-data/."""
    data = json.loads(text)
    for entry in data["data"] if isinstance(data, dict) else data:
        for paragraph in entry.get("paragraphs", [entry]):
            context = paragraph["context_text" if "context_text" in paragraph else "context"]
            for qa in paragraph["qas"]:
                texts = [a["text"] if isinstance(a, dict) else a for a in qa["answers"]]
                ask = qa["query_text" if "query_text" in qa else "question"]
                yield row(ask, context=context, answers=dict.fromkeys(texts))


def quac(name: str, text: str) -> Iterator[dict | str]:
    """A dialogue about a text; earlier turns with their true answers stand before the question.

    "CANNOTANSWER" is what the publisher writes where the text does not say.
    """
    for article in json.loads(text)["data"]:
        for paragraph in article["paragraphs"]:
            context = paragraph["context"].removesuffix("CANNOTANSWER")
            before = ""
            for qa in paragraph["qas"]:
                known = [a["text"] for a in qa.get("answers") or [qa["orig_answer"]]]
                known = ["无法回答" if a == "CANNOTANSWER" else a for a in known]
                yield row(qa["question"], context=context, answers=dict.fromkeys(known),
                          subject=article["title"], before=before)  # fmt: skip
                before += f"问：{qa['question']}\n答：{known[0]}\n"
