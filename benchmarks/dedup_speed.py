"""How fast and how well near-duplicates are found, beside three public libraries.

    python -m benchmarks.dedup_speed
    python -m benchmarks.dedup_speed --data abstracts.jsonl.xz --rows 20000
    pip install rensa datasketch "datatrove[processing]"    (in an environment of its own)

The documents are the built-in web news cut into pieces of 500 characters, or the long strings of a
file; behind them stand their copies: some exact, some with 1 to 2 % of the characters changed, and
many with a share of their text replaced so that their similarity lies between 0.7 and 1.
Similarity is counted here with Python's own sets. All times are processor seconds of one thread,
best of three. Ours reads rows from disk, takes exact marks too and writes signatures; the peers
have the texts in memory. "found" of ours are rows dropped, of the peers candidates that share a
band with their original, unchecked. The last line is one JSON object.
"""

import importlib.util
import json
import random
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from time import process_time
from typing import Any

from babyllama.config import from_repo, parse, run
from babyllama.errors import DataError
from data_process.datasets import inews
from data_process.decontaminate import strings
from data_process.dedup import DedupConfig, bare, find_duplicates, pairs, sign_shard
from data_process.registry import package_dir

REPEATS = 3
BINS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of benchmarks.dedup_speed.

    Args:
        data: file with texts, of any layout; its strings of 200 characters or more are taken
        rows: originals, at most
        copies: edited copies, at most; a tenth of it are exact, a fifth lightly edited
        length: characters of a document, at most
    """

    data: Path | None = None
    rows: int = 8000
    copies: int = 2000
    length: int = 500


@dataclass(frozen=True)
class Corpus:
    """Originals, then their copies.

    origin: copy -> original, both as numbers in `texts`
    kind: copy -> "exact", "light" or "edited"
    """

    texts: list[str]
    origin: dict[int, int]
    kind: dict[int, str]


def documents(cfg: SpeedConfig) -> Iterator[str]:
    """Real Chinese text, 200 characters or more a piece."""
    if cfg.data:
        texts = strings(from_repo(cfg.data), Counter())
    else:
        rows = inews.read_dir(package_dir(*inews.PACKAGE), "utf-8")
        texts = (row["text"] for row in rows if isinstance(row, dict))
    for text in texts:
        for begin in range(0, len(text), cfg.length):
            piece = text[begin : begin + cfg.length]
            if len(piece) >= 200:
                yield piece


def edited(text: str, share: float, chance: random.Random, letters: str) -> str:
    """A text in which a share of the characters, one by one, are others, gone or new."""
    found = []
    for letter in text:
        what = chance.random() / share if share else 1
        if what >= 1:
            found.append(letter)
        elif what < 0.6:
            found.append(chance.choice(letters))
        elif what < 0.8:
            found.append(letter + chance.choice(letters))
    return "".join(found)


def planted(cfg: SpeedConfig) -> Corpus:
    """The originals and their copies."""
    chance = random.Random(0)
    texts = list(dict.fromkeys(documents(cfg)))
    if not texts:
        raise DataError("wanted texts of 200 characters or more, found none; choose another --data")
    chance.shuffle(texts)
    texts = texts[: cfg.rows]
    letters, origin, kind = "".join(texts)[:5000], {}, {}
    for number in range(min(cfg.copies, len(texts))):
        name = ("exact", "light", "light")[number % 10] if number % 10 < 3 else "edited"
        most = {"exact": 0.0, "light": 0.02, "edited": 0.04}[name]
        share = chance.uniform(most / 2 if name == "light" else 0, most)
        origin[len(texts)], kind[len(texts)] = number, name
        texts.append(edited(texts[number], share, chance, letters))
    return Corpus(texts, origin, kind)


def pieces_of(text: str) -> set[str]:
    text = bare(text)
    return {text[n : n + 5] for n in range(len(text) - 4)}


def similarity(left: str, right: str) -> float:
    a, b = pieces_of(left), pieces_of(right)
    return len(a & b) / len(a | b)


def best_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(REPEATS):
        start = process_time()
        result = function()
        best = min(best, process_time() - start)
    return best, result


def measure_ours(corpus: Corpus, work: Path, cfg: DedupConfig) -> dict[str, Any]:
    """Signing, finding, and who was found."""
    shard, stem = work / "rows.jsonl", work / "rows"
    with open(shard, "w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(corpus.texts):
            file.write(json.dumps({"id": f"x/{number}", "text": text}, ensure_ascii=False) + "\n")
    sign, _ = best_seconds(lambda: sign_shard(shard, stem, cfg))
    find, counts = best_seconds(lambda: find_duplicates([(shard, stem)], work / "drops", cfg))
    found = {
        int(gone["id"][2:]): (reason, int(kept["id"][2:]))
        for reason, gone, kept in pairs([(shard, stem)], work / "drops")
    }
    wrong = [
        number
        for number, (reason, kept) in found.items()
        if reason == "near_duplicate"
        and similarity(corpus.texts[number], corpus.texts[kept]) < cfg.threshold
    ]
    return {
        "sign_docs_per_s": round(len(corpus.texts) / sign),
        "find_docs_per_s": round(len(corpus.texts) / find),
        "counts": counts,
        "wrong": len(wrong),
        "found": set(found),
    }


def datasketch_pairs(corpus: Corpus) -> tuple[float, set[int]]:
    """128 permutations, and the bands that the library chooses for 0.8."""
    from datasketch import MinHash, MinHashLSH

    def sign() -> list[Any]:
        sets = ([piece.encode() for piece in pieces_of(text)] for text in corpus.texts)
        return list(MinHash.generator(sets, num_perm=128))

    seconds, signatures = best_seconds(sign)
    index = MinHashLSH(threshold=0.8, num_perm=128)
    for number, signature in enumerate(signatures):
        index.insert(number, signature)
    found = {
        copy for copy, first in corpus.origin.items() if first in index.query(signatures[copy])
    }
    return seconds, found


def rensa_pairs(corpus: Corpus) -> tuple[float, set[int]]:
    """128 permutations in 16 bands, as its README has it."""
    from rensa import RMinHash, RMinHashLSH

    def sign() -> list[Any]:
        return RMinHash.from_token_sets([pieces_of(text) for text in corpus.texts], 128, 42)

    seconds, signatures = best_seconds(sign)
    index = RMinHashLSH(threshold=0.8, num_perm=128, num_bands=16)
    for number, signature in enumerate(signatures):
        index.insert(number, signature)
    found = {
        copy for copy, first in corpus.origin.items() if first in index.query(signatures[copy])
    }
    return seconds, found


def datatrove_pairs(corpus: Corpus) -> tuple[float, set[int]]:
    """14 bands of 8, its own hashing of 5-grams; a character is a word."""
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Characters(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return list(bare(text))

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(n, n + 1) for n in range(len(text))]

    with tempfile.TemporaryDirectory() as directory:
        step = MinhashDedupSignature(directory, MinhashConfig(n_grams=5), Characters())

        def sign() -> list[Any]:
            return [step.get_signature(step.get_shingles(text)) for text in corpus.texts]

        seconds, signatures = best_seconds(sign)
    found = {
        copy
        for copy, first in corpus.origin.items()
        if any(map(list.__eq__, signatures[copy], signatures[first]))
    }
    return seconds, found


PEERS = {"datasketch": datasketch_pairs, "rensa": rensa_pairs, "datatrove": datatrove_pairs}


def shares(found: set[int], groups: dict[str, list[int]]) -> dict[str, str]:
    """Of each group of copies, how many were found."""
    return {
        name: f"{sum(copy in found for copy in members)}/{len(members)}"
        for name, members in groups.items()
    }


def groups_of(corpus: Corpus) -> dict[str, list[int]]:
    """The copies by similarity to their original, and those made in one way."""
    groups: dict[str, list[int]] = defaultdict(list)
    for copy, first in corpus.origin.items():
        value = similarity(corpus.texts[copy], corpus.texts[first])
        for low, high in pairwise(BINS):
            if low <= value < high:
                groups[f"{low:.2f}-{high:.2f}"].append(copy)
        if value >= 0.8:
            groups["0.80 or more"].append(copy)
            if corpus.kind[copy] == "light":
                groups["light, 0.80 or more"].append(copy)
        if corpus.kind[copy] != "edited":
            groups[corpus.kind[copy]].append(copy)
    return dict(sorted(groups.items()))


def main(cfg: SpeedConfig) -> None:
    """Plant the copies, look for them with everything that is installed, print one JSON line."""
    corpus = planted(cfg)
    groups = groups_of(corpus)
    n_chars = sum(map(len, corpus.texts))
    print(f"{len(corpus.texts):,} documents of {n_chars / len(corpus.texts):.0f} characters")
    with tempfile.TemporaryDirectory() as directory:
        ours = measure_ours(corpus, Path(directory), DedupConfig())
        # With a lower threshold the bands' recall below it shows too.
        loose = measure_ours(corpus, Path(directory), replace(DedupConfig(), threshold=0.7))
    ours["recall"] = shares(ours.pop("found"), groups)
    ours["recall_at_0.7"] = shares(loose["found"], groups)
    results: dict[str, Any] = {"ours": ours}
    for name, measure in PEERS.items():
        if importlib.util.find_spec(name):
            seconds, found = measure(corpus)
            rate = round(len(corpus.texts) / seconds)
            results[name] = {"sign_docs_per_s": rate, "recall": shares(found, groups)}
        else:
            print(f"{name} is not installed: left out")
    for name, result in results.items():
        print(f"{name}: {result['sign_docs_per_s']:,} documents/s signed; found {result['recall']}")
    print(json.dumps({"documents": len(corpus.texts), "characters": n_chars, **results}))


if __name__ == "__main__":
    run(main, parse(SpeedConfig, doc=__doc__))
