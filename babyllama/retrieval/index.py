"""A full-text index over text rows on the disk: BM25 over pairs of characters, and over words.

Searching is tantivy's (Lucene's design in Rust); what a term is, and how much of a question a
passage holds, is ours. `build` writes a directory of tantivy's files with index.json beside them:
version, corpus, SHA-256 of the rows, counts, size of each file. Safe for many readers and threads.

A document is the canonical `text` of a row: its title as first line, if it has one, and its
paragraphs, one a line (data_process/datasets/wiki.py writes them so). A passage is a paragraph, or
several short ones together, or a part of a long one; it keeps the number of the paragraph it begins
in. BM25: Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework".
"""

import bisect
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tantivy

from babyllama.config import atomic_dir
from babyllama.errors import DataError
from babyllama.language.letters import simplify
from babyllama.rows import read_rows, row_kind

# A sentence with the quotes and brackets that close it, or a line.
_SENTENCE = re.compile(r".+?(?:[。！？!?…；]+[”’」』）)\"]*|\.(?=\s)|\n+|$)", re.DOTALL)
_SOLID = re.compile(r"\S")

LONGEST = 400  # characters of a passage: about half of a small model's context
_LONGEST_TITLE = 80


@dataclass(frozen=True)
class Passage:
    """A piece of a document of the index.

    paragraph: number of the paragraph that it begins in, from 1
    row: id of the row that it is from
    score: BM25 against the question, for comparing passages of one search; 0 where none was asked
    coverage: share of the question's weight that stands in the passage, 0 to 1
    n_rare: the same weight counted in terms that stand in one passage alone
    """

    title: str
    paragraph: int
    text: str
    row: str = ""
    score: float = 0.0
    coverage: float = 0.0
    n_rare: float = 0.0

    @property
    def citation(self) -> str:
        name = f"《{self.title}》" if self.title else self.row
        return f"{name}第 {self.paragraph} 段"


def passages(row: dict, longest: int = LONGEST) -> Iterator[Passage]:
    """The passages of a canonical text row, in order, at most `longest` characters each."""
    title, paragraphs = split_title(row["text"])
    held, first = "", 0
    for number, paragraph in enumerate(paragraphs, 1):
        for part in _parts(paragraph, longest):
            if held and len(held) + 1 + len(part) > longest:
                yield Passage(title, first, held, row["id"])
                held = ""
            first = first if held else number
            held = f"{held}\n{part}" if held else part
    if held:
        yield Passage(title, first, held, row["id"])


def split_title(text: str) -> tuple[str, list[str]]:
    """The title ("" if the first line is none) and the paragraphs that are not blank."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and len(lines[0]) <= _LONGEST_TITLE and lines[0][-1] not in "。！？!?；：…，":
        return lines[0], lines[1:]
    return "", lines


def _parts(paragraph: str, longest: int) -> Iterator[str]:
    """A paragraph in runs of whole sentences; a sentence that is longer is cut inside."""
    end = 0
    while begin := _SOLID.search(paragraph, end):
        start = begin.start()
        # A character more than fits shows whether a sentence ends with the last one.
        part = trim(paragraph[start : start + longest + 1], longest)
        yield part
        end = start + len(part)


def sentences(text: str) -> list[str]:
    """The sentences of a text; together they are the text."""
    return [match[0] for match in _SENTENCE.finditer(text)]


def trim(text: str, limit: int, size: Callable[[str], int] = len) -> str:
    """The longest beginning of `text` in whole sentences with size(beginning) <= limit.

    Where not even the first sentence fits, it is cut inside.

    size: characters unless told; grows with the text
    """
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    return _longest(text, ends, limit, size) or _longest(text, range(len(text)), limit, size)


def _longest(text: str, ends: list[int] | range, limit: int, size: Callable[[str], int]) -> str:
    n_fit = bisect.bisect_right(ends, limit, key=lambda end: size(text[:end].rstrip()))
    return text[: ends[n_fit - 1]].rstrip() if n_fit else ""


VERSION = 2
MOST_TERMS = 64  # of a question, the rarest ones: the commonest add least
_HEAP = 64 << 20  # bytes that a build sorts in memory

# Chinese, Japanese and Korean characters: all above U+2E80 but marks, private use and full width.
_CHARACTERS = (
    r"\u2e80-\u2fff\u3005-\u3007\u3021-\u302f\u3031-\u303c\u303e\u3040-\u30fa\u30fc-\ud7ff"
    r"\uf900-\ufe0f\ufe70-\ufeff\uff66-\uffdc\U00010000-\U0010ffff"
)
_TERM = re.compile(rf"[{_CHARACTERS}]+|[^\W_\u2e80-\U0010ffff]+")
# Rare in an encyclopedia, so that they would weigh more than what is asked for.
QUESTION_WORDS = re.compile(
    r"请问|[什甚]么(?:时候|时间|地方)?|哪[一几]?[些个里位年种座部]|多少|怎么样?|怎样|如何|为何|是谁|谁是|[吗呢？?]"
    r"|\b(?:what|who|when|where|which|how|the|is|was|of)\b"
)


def normal(text: str) -> str:
    """Text as it is compared: simplified characters, full and half width alike, small letters."""
    return unicodedata.normalize("NFKC", simplify(text)).lower()


def terms(text: str) -> list[str]:
    """Every term of a normal text: words of letters and digits, and pairs of other characters.

    Each character of a run begins one pair, the last of a run stands alone: so the terms that begin
    with a character stand for that character.
    """
    found: list[str] = []
    for match in _TERM.finditer(text):
        run = match[0]
        found += [run[:64]] if run[0] < "\u2e80" else [run[i : i + 2] for i in range(len(run))]
    return found


def asked(question: str) -> tuple[list[str], list[str]]:
    """The terms of a question, and the characters in it that stand alone."""
    runs = [match[0] for match in _TERM.finditer(QUESTION_WORDS.sub(" ", normal(question)))]
    found = [term for run in runs for term in terms(run) if not is_character(term)]
    return list(dict.fromkeys(found)), list(dict.fromkeys(filter(is_character, runs)))


def is_character(term: str) -> bool:
    return len(term) == 1 and term >= "\u2e80"


def title_names(title: str) -> set[str]:
    """What a document is found by: its title with and without an addition in brackets."""
    names = {title, re.sub(r"[ _]*[(（][^()（）]*[)）]$", "", title)}
    return {normal(name).strip() for name in names if name.strip()}


def excerpt(text: str, question: str, limit: int, size: Callable[[str], int] = len) -> str:
    """The sentences of a text that hold most of a question, in their order, with size(them) <=
    limit; the whole text where it fits.

    A sentence gains by its neighbours, which say what its pronouns stand for. Of sentences that
    hold as much the first are taken, so where none holds any it is the beginning.
    """
    if size(text) <= limit:
        return text
    parts, wanted = sentences(text), set().union(*asked(question))
    held = [wanted.intersection(terms(normal(part))) for part in parts]
    counts = Counter(term for found in held for term in found)
    own = [sum(1 / counts[term] for term in found) for found in held]
    scores = [a + b / 2 + c / 4 for a, b, c in zip(own, [0, *own], [*own[1:], 0], strict=False)]
    limit = max(0, limit)
    kept, left = [], limit
    for number in sorted(range(len(parts)), key=lambda n: -scores[n]):
        if (n := size(parts[number])) <= left:
            kept.append(number)
            left -= n
    # Tokens of sentences apart are seldom fewer than those of all together.
    while size(found := "".join(parts[number] for number in sorted(kept)).rstrip()) > limit:
        kept.pop()
    return found or trim(text, limit, size)


def build(files: Iterable[Path], out: Path, corpus: str, longest: int = LONGEST) -> dict:
    """Make the index of text rows in `out`, whole or not at all; returns what index.json says.

    An index that was made from the same rows is left alone ("unchanged" is true then); one of the
    same corpus is replaced.

    raises: DataError if the rows are no text rows, or `out` is something else
    """
    files = list(files)
    key = _key(files, longest)
    if out.exists():
        found = read_info(out, any_version=True)
        if found["corpus"] != corpus:
            raise DataError(
                f"{out}: wanted no index there, or one of {corpus!r}; found the index of "
                f"{found['corpus']!r}; name another directory or delete this one"
            )
        same = found["version"] == VERSION and found["rows"] == key
        if same and sizes_of(out) == found["sizes"]:
            return found | {"unchanged": True}
    with atomic_dir(out) as place:
        counts = _write(files, place, longest)
        info = {"version": VERSION, "corpus": corpus, "rows": key, **counts}
        info["sizes"] = sizes_of(place)
        text = json.dumps(info, ensure_ascii=False, indent=1)
        (place / "index.json").write_text(text, "utf-8")
        for path in place.iterdir():  # tantivy makes some for their owner alone
            path.chmod((place / "index.json").stat().st_mode)
    return info


def _write(files: list[Path], place: Path, longest: int) -> dict:
    """Write tantivy's files; returns the counts of rows and passages."""
    writer = tantivy.Index(_schema(), path=str(place)).writer(_HEAP, num_threads=1)
    n = {"n_rows": 0, "n_passages": 0}
    for path in files:
        for row in read_rows(path):
            if row_kind(row) != "text":
                raise DataError(f"{path}: wanted text rows for an index, found {row['id']!r}, a "
                                f"{row_kind(row)} row; name a set of texts")  # fmt: skip
            n["n_rows"] += 1
            for passage in passages(row, longest):
                writer.add_document(_document(passage, n["n_passages"]))
                n["n_passages"] += 1
    if not n["n_passages"]:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: wanted text, found none")
    writer.commit()
    writer.wait_merging_threads()
    return n


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("terms", tokenizer_name="whitespace", index_option="freq")
    builder.add_text_field("title", tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("number", fast=True)
    builder.add_bytes_field("passage", stored=True)
    return builder.build()


def _document(passage: Passage, number: int) -> tantivy.Document:
    document = tantivy.Document()
    document.add_text("terms", " ".join(terms(normal(f"{passage.title}\n{passage.text}"))))
    for name in title_names(passage.title):
        document.add_text("title", name)
    document.add_unsigned("number", number)
    content = [passage.row, passage.title, passage.paragraph, passage.text]
    document.add_bytes("passage", json.dumps(content, ensure_ascii=False).encode())
    return document


def _key(files: list[Path], longest: int) -> str:
    """Stands for the bytes of the rows and for how they are cut."""
    digest = hashlib.sha256(f"{VERSION} {longest}".encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise DataError(f"{path}: wanted text rows, found no such file") from None
    return digest.hexdigest()


def sizes_of(place: Path) -> dict[str, int]:
    """The size of each file of an index but index.json and tantivy's locks."""
    files = (path for path in sorted(place.iterdir()) if path.suffix != ".lock")
    return {path.name: path.stat().st_size for path in files if path.name != "index.json"}


def read_info(place: Path, any_version: bool = False) -> dict:
    """What index.json says.

    raises: DataError if there is none, or it is of another version
    """
    advice = "make it with python -m data_process.run wiki --index"
    try:
        info = json.loads((place / "index.json").read_text("utf-8"))
        version, _corpus = info["version"], info["corpus"]
    except FileNotFoundError:
        raise DataError(f"{place}: wanted an index, found no index.json in it; {advice}") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{place / 'index.json'}: wanted the settings of an index, found "
                        f"{type(error).__name__}; {advice}") from None  # fmt: skip
    if version != VERSION and not any_version:
        raise DataError(f"{place}: wanted an index of version {VERSION}, found version "
                        f"{version!r}; {advice} again")  # fmt: skip
    return info
