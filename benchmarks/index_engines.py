"""Full-text engines side by side: ours, SQLite's FTS5 and bm25s, on the same passages.

    python -m data_process.run wiki --raw data/raw/wiki --index
    python -m benchmarks.index_engines --questions '[cmrc2018_dev.json, xquad.zh.json]'
    python -m benchmarks.index_engines … --copies '[1, 8, 24]' --engines '[ours]'     several sizes

Time to build, bytes on the disk (the passages' text, which all keep, aside), time of a question,
and how often the passage that a question is about is the first or among the first five. For
growth the corpus is repeated with its sentences dealt out anew, so that a term stays as frequent
as it was. bm25s: where it is installed. The last line is JSON.
"""

import json
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, parse, run
from babyllama.errors import ConfigError
from babyllama.retrieval.build import build
from babyllama.retrieval.index import QUESTION_WORDS, Index, Passage, normal, sentences, terms
from babyllama.retrieval.retriever import INDEX, Retriever
from babyllama.rows import write_rows
from benchmarks.questions import Question, find_rows, read_questions

Search = Callable[[str, int], list[int]]


@dataclass(frozen=True)
class EnginesConfig:
    """What to compare.

    Args:
        index: its passages are indexed anew by each engine
        questions: files with questions about passages
        copies: sizes: how often the corpus is repeated
        limit: questions that are asked, drawn at random
        engines: which take part; none: all
    """

    index: Path = INDEX
    questions: tuple[Path, ...] = ()
    copies: tuple[int, ...] = ()
    limit: int = 1000
    engines: tuple[str, ...] = ()


def words(text: str) -> list[str]:
    """The terms of a text as words of hexadecimal digits, for engines that want words."""
    return [f"{code:x}" for code in terms(normal(text))[0].tolist()]


def ours(passages: list[Passage], place: Path) -> tuple[Search, float, int]:
    rows = [
        {"id": f"p/{n}", "text": f"{p.title or '-'}\n{' '.join(p.text.split())}"}
        for n, p in enumerate(passages)
    ]
    write_rows(place / "rows.jsonl", rows)
    start = time.perf_counter()
    info = build([place / "rows.jsonl"], place / "index", "benchmark", longest=10**6)
    seconds, index = time.perf_counter() - start, Index(place / "index")
    size = sum(n for name, n in info["sizes"].items() if name not in ("passages.jsonl",))
    return lambda q, k: [int(p.row[2:]) for p in index.search(q, k)], seconds, size


def fts5(passages: list[Passage], place: Path) -> tuple[Search, float, int]:
    """SQLite's index over the same terms."""
    base = sqlite3.connect(place / "fts.db")
    base.execute("create virtual table found using fts5(words, content='', tokenize='ascii')")
    start = time.perf_counter()
    with base:
        base.executemany(
            "insert into found(rowid, words) values (?, ?)",
            ((n, " ".join(words(f"{p.title}\n{p.text}"))) for n, p in enumerate(passages)),
        )
    base.execute("insert into found(found) values ('optimize')")
    seconds = time.perf_counter() - start

    def search(question: str, k: int) -> list[int]:
        wanted = dict.fromkeys(words(QUESTION_WORDS.sub(" ", normal(question))))
        asked = " OR ".join(f'"{word}"' for word in wanted)
        query = "select rowid from found where found match ? order by rank limit ?"
        return [row for (row,) in base.execute(query, (asked, k))] if asked else []

    return search, seconds, (place / "fts.db").stat().st_size


def fts5_trigram(passages: list[Passage], place: Path) -> tuple[Search, float, int]:
    """SQLite's own terms of three characters; a shorter word cannot be found."""
    base = sqlite3.connect(place / "fts.db")
    base.execute("create virtual table found using fts5(text, content='', tokenize='trigram')")
    start = time.perf_counter()
    with base:
        base.executemany(
            "insert into found(rowid, text) values (?, ?)",
            ((n, normal(f"{p.title}\n{p.text}")) for n, p in enumerate(passages)),
        )
    base.execute("insert into found(found) values ('optimize')")
    seconds = time.perf_counter() - start

    def search(question: str, k: int) -> list[int]:
        pieces = [w for w in QUESTION_WORDS.sub(" ", normal(question)).split() if len(w) > 2]
        wanted = dict.fromkeys(w[i : i + 3] for w in pieces for i in range(len(w) - 2))
        asked = " OR ".join('"' + word.replace('"', '""') + '"' for word in wanted)
        query = "select rowid from found where found match ? order by rank limit ?"
        return [row for (row,) in base.execute(query, (asked, k))] if asked else []

    return search, seconds, (place / "fts.db").stat().st_size


def bm25s(passages: list[Passage], place: Path) -> tuple[Search, float, int]:
    import bm25s as library

    start = time.perf_counter()
    retriever = library.BM25(k1=1.2, b=0.75)
    retriever.index([words(f"{p.title}\n{p.text}") for p in passages], show_progress=False)
    retriever.save(place / "bm25s")
    seconds = time.perf_counter() - start
    retriever = library.BM25.load(place / "bm25s", mmap=True)

    def search(question: str, k: int) -> list[int]:
        wanted = list(dict.fromkeys(words(QUESTION_WORDS.sub(" ", normal(question)))))
        found = retriever.retrieve([wanted], k=min(k, len(passages)), show_progress=False)
        return found.documents[0].tolist()

    return search, seconds, sum(path.stat().st_size for path in (place / "bm25s").iterdir())


ENGINES = {
    "ours": ours,
    "FTS5, our terms": fts5,
    "FTS5, trigram": fts5_trigram,
    "bm25s": bm25s,
}


def grown(passages: list[Passage], copies: int) -> list[Passage]:
    """The corpus so many times, each sentence in a passage drawn at random but for the first."""
    chance, held = random.Random(0), list(passages)
    pieces = [piece for passage in passages for piece in sentences(passage.text)]
    for _ in range(copies - 1):
        chance.shuffle(pieces)
        at = iter(pieces)
        for passage in passages:
            n_pieces = len(sentences(passage.text))
            held.append(Passage(passage.title, 1, "".join(next(at) for _ in range(n_pieces))))
    return held


def measure(
    name: str, passages: list[Passage], asked: list[Question], rows: dict[str, str]
) -> dict:
    """One engine on one corpus, as a line of the table."""
    with tempfile.TemporaryDirectory() as place:
        search, seconds, size = ENGINES[name](passages, Path(place))
        search(asked[0].text, 5)  # opens what is opened late
        times, first, among = [], 0, 0
        for question in asked:
            start = time.perf_counter()
            found = search(question.text, 5)
            times.append(1e3 * (time.perf_counter() - start))
            hits = [passages[n].row == rows[question.passage] for n in found]
            first += hits[:1] == [True]
            among += any(hits)
    return {
        "engine": name,
        "passages": len(passages),
        "chars": sum(len(p.text) for p in passages),
        "build_s": round(seconds, 1),
        "mb": round(size / 1e6, 1),
        "median_ms": round(statistics.median(times), 2),
        "p95_ms": round(statistics.quantiles(times, n=20)[-1], 2),
        "recall@1": round(first / len(asked), 4),
        "recall@5": round(among / len(asked), 4),
    }


def main(cfg: EnginesConfig) -> None:
    retriever = Retriever.open(cfg.index)
    passages = [retriever.index.passage(n) for n in range(len(retriever.index))]
    questions = [q for path in cfg.questions for q in read_questions(from_repo(path))]
    rows = find_rows(questions, retriever)
    known = [question for question in questions if question.passage in rows]
    print(f"{retriever.describe()}; {len(known):,} of {len(questions):,} questions are about it")
    asked = random.Random(0).sample(known, min(cfg.limit, len(known)))
    names = cfg.engines or tuple(ENGINES)
    if unknown := sorted(set(names) - set(ENGINES)):
        raise ConfigError(f"--engines wants some of {', '.join(ENGINES)}; found {unknown}")
    lines = []
    for copies in cfg.copies or (1,):
        corpus = grown(passages, copies)
        for name in names:
            try:
                lines.append(measure(name, corpus, asked, rows))
            except ImportError as error:
                print(f"{name}: left out, {error.name} is not installed")
                continue
            print("  ".join(f"{key} {value}" for key, value in lines[-1].items()), flush=True)
    print(json.dumps({"questions": len(asked), "engines": lines}, ensure_ascii=False))


if __name__ == "__main__":
    run(main, parse(EnginesConfig, __doc__))
