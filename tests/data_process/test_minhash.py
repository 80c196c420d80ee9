"""Copies of rows: all exact ones go, near ones go by their similarity, and nothing else goes."""

import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.errors import DataError
from data_process.dedup import (
    BANDS,
    BASE,
    BATCH_BYTES,
    PIECE,
    TILE,
    Corpus,
    FindConfig,
    band_keys,
    drops_path,
    find_duplicates,
    fingerprint,
    jaccard,
    load_drops,
    marks_of,
    minima,
    parts,
    pieces,
    rolling_hash,
    sides,
    sign_shard,
    signature_paths,
)

SURE = (12, 1)  # two rows of similarity 0.8 miss each other in 0.2^12
HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))


def text_row(number: int, text: str) -> dict:
    return {"id": f"x/{number}", "text": text}


def chat_row(number: int, asked: str, answered: str, system: str = "") -> dict:
    turns = [("system", system)] if system else []
    turns += [("user", asked), ("assistant", answered)]
    return {"id": f"x/{number}", "messages": [{"role": r, "content": c} for r, c in turns]}


def write(path: Path, rows: list[dict]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


def signed(directory: Path, rows: list[dict], bands: tuple, n_shards: int = 1) -> list:
    """Rows as signed shards of about one size."""
    directory.mkdir(parents=True, exist_ok=True)
    bounds = [len(rows) * n // n_shards for n in range(n_shards + 1)]
    shards = []
    for n, (begin, end) in enumerate(pairwise(bounds)):
        shards.append((write(directory / f"{n}.jsonl", rows[begin:end]), directory / f"s{n}"))
        sign_shard(*shards[-1], bands)
    return shards


def pairs(shards: list, target: Path) -> Iterator[tuple[str, dict, dict]]:
    """(reason, row that goes, row that stays) for all that find_duplicates dropped."""
    corpus = Corpus(shards)
    for number in range(len(shards)):
        for row, (reason, remark) in load_drops(drops_path(target, number)).items():
            kept, its_shard = map(int, re.findall(r"\d+", remark))
            yield (
                reason,
                corpus.row(corpus.starts[number] + row),
                corpus.row(corpus.starts[its_shard] + kept),
            )


def find(shards: list, target: Path) -> dict:
    return find_duplicates(target, target, FindConfig(tuple(shards), 0.8))


def dropped(
    directory: Path, rows: list[dict], bands: tuple = SURE, n_shards: int = 1
) -> dict[int, str]:
    """number of the row -> reason"""
    shards = signed(directory, rows, bands, n_shards)
    find(shards, directory / "drops")
    return {int(gone["id"][2:]): why for why, gone, _ in pairs(shards, directory / "drops")}


def random_texts(n: int, length: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(HAN, k=length)) for _ in range(n)]


def replaced(text: str, *places: int) -> str:
    """A text with other characters at some places."""
    letters = list(text)
    for place in places:
        letters[place] = "龘"
    return "".join(letters)


def set_of(text: str) -> set[str]:
    """The definition of pieces, by Python's own means."""
    return {text[n : n + PIECE] for n in range(len(text) - PIECE + 1)} or {text}


def similar(left: dict, right: dict, threshold: float = 0.8) -> bool:
    sets = [list(map(set_of, sides(row))) for row in (left, right)]
    return len(sets[0]) == len(sets[1]) and all(
        len(a & b) / len(a | b) >= threshold for a, b in zip(*sets, strict=True)
    )


def slow_drops(rows: list[dict]) -> dict[int, str]:
    """The definition: each row beside every row that stayed before it."""
    stayed, found = [], {}
    for number, row in enumerate(rows):
        marks = {fingerprint(part) for part in parts(row) if part}
        if any(marks & {fingerprint(part) for part in parts(other)} for other in stayed):
            found[number] = "duplicate"
        elif len("".join(sides(row))) >= PIECE and any(similar(row, other) for other in stayed):
            found[number] = "near_duplicate"
        else:
            stayed.append(row)
    return found


# Hashes.


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("width", [1, 2, 5, 7, 13])
def test_the_rolling_hash_is_a_polynomial_of_each_window(width, dtype):
    codes = np.random.default_rng(0).integers(0, 0x110000, 30).astype(dtype)
    n_values = 2 ** (8 * codes.itemsize)
    wanted = [
        sum(int(c) * BASE ** (width - 1 - k) for k, c in enumerate(codes[n : n + width])) % n_values
        for n in range(30 - width + 1)
    ]
    assert rolling_hash(codes, width).tolist() == wanted


@given(st.text("天地玄a😀", max_size=30), st.text("天地玄a😀", max_size=30))
def test_similarity_is_that_of_the_sets_of_pieces(left, right):
    a, b = set_of(left), set_of(right)
    assert jaccard(pieces(left), pieces(right)) == len(a & b) / len(a | b)


def test_a_text_has_the_same_minima_alone_in_company_and_across_tiles():
    texts = [*random_texts(5, 40), "五个字的文", random_texts(1, TILE + 500)[0], "最后一个字"]
    together = minima(texts, 20)
    for number, text in enumerate(texts):
        assert (minima([text], 20)[:, 0] == together[:, number]).all()
    long = texts[6]
    halves = minima([long[:1000], long[1000 - PIECE + 1 :]], 20)
    assert (halves.min(axis=1) == together[:, 6]).all()


def copies_of_300_characters() -> dict[str, tuple[str, str]]:
    (text,), table = random_texts(1, 300), HAN[:400]
    changed = {f"{n} changed": (text, replaced(text, *range(5, 300, 300 // n))) for n in (1, 4, 12)}
    # Neighbours in a table of characters differ by one: the worst case for weak hashes.
    return changed | {"a table": (table, table[:300])}


@pytest.mark.parametrize("case", copies_of_300_characters())
def test_two_texts_agree_in_as_many_minima_as_they_are_similar(case):
    pair = copies_of_300_characters()[case]
    wanted = jaccard(*map(pieces, pair))
    left, right = minima(list(pair), 4000).T
    assert abs((left == right).mean() - wanted) < 4 * (wanted * (1 - wanted) / 4000) ** 0.5


def test_the_keys_of_a_short_text_are_none_and_of_others_as_the_formula_says():
    bands = (50, 3)
    assert not band_keys(["四个汉字"], bands).any()
    originals = random_texts(60, 200)
    copies = [replaced(text, *range(5, 200, 40)) for text in originals]
    value = np.mean([jaccard(*map(pieces, pair)) for pair in zip(originals, copies, strict=True)])
    same = (band_keys(originals, bands) == band_keys(copies, bands)).mean()
    assert abs(same - value**3) < 0.04


# Signatures.


def test_a_signature_leads_back_to_each_row_and_its_marks(tmp_path):
    rows = [text_row(n, text) for n, text in enumerate(random_texts(7, BATCH_BYTES // 8))]
    rows[3:5] = [{"id": "x/3", "text": "正文在这里", "summary": "标题"}, chat_row(4, "问", "答")]
    shard = write(tmp_path / "a.jsonl", rows)
    counts = sign_shard(shard, tmp_path / "a", BANDS)
    assert counts["rows"] == 7
    assert {path.name for path in tmp_path.glob("*.npy")} == set(counts["files"])
    keys, lines = map(np.load, signature_paths(tmp_path / "a"))
    data = shard.read_bytes()
    assert [json.loads(data[a:b]) for a, b in pairwise(lines.tolist())] == rows
    assert keys[:2].T.tolist() == [marks_of(row) for row in rows]
    texts = ["".join(sides(row)) for row in rows]
    assert (keys[2:] == band_keys(texts, BANDS)).all()


@pytest.mark.parametrize("line", ['{"id": "x/1"', '"a"', '{"id": "x/1", "text": 5}', "", "{}"])
def test_a_line_that_is_no_row_is_named(line, tmp_path):
    shard = tmp_path / "a.jsonl"
    shard.write_text('{"id": "x/0", "text": "一"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: wanted a canonical row"):
        sign_shard(shard, tmp_path / "a", BANDS)


# Who goes.


@st.composite
def families(draw: st.DrawFn) -> list[dict]:
    """Rows of all kinds, most of them made from a few texts by small changes."""
    seeds = [*random_texts(3, 40, seed=draw(st.integers(0, 5))), "短", "很短的", "ab cd", ""]

    def text() -> str:
        seed = draw(st.sampled_from(seeds))
        places = draw(st.lists(st.integers(0, 39), max_size=2)) if len(seed) == 40 else []
        seed = replaced(seed, *places) + draw(st.sampled_from(["", "", "。", " 尾巴"]))
        return seed[draw(st.integers(0, 2)) :] or "空"

    rows = []
    for number in range(draw(st.integers(0, 14))):
        kind = draw(st.sampled_from(["text", "summary", "chat"]))
        if kind == "chat":
            rows.append(chat_row(number, text(), text(), draw(st.sampled_from(["", seeds[0]]))))
        else:
            rows.append(text_row(number, text()))
            if kind == "summary":
                rows[-1]["summary"] = draw(st.sampled_from(["标题一", "标题二", "标题三"]))
    return rows


@settings(max_examples=40, deadline=None)
@given(rows=families(), n_shards=st.integers(1, 3))
def test_the_rows_that_go_are_those_of_the_definition(tmp_path_factory, rows, n_shards):
    wanted = slow_drops(rows)
    directory = tmp_path_factory.mktemp("fuzz")
    assert dropped(directory, rows, n_shards=n_shards) == wanted
    kept = [row for number, row in enumerate(rows) if number not in wanted]
    assert dropped(directory / "again", kept) == {}


@pytest.fixture(scope="module")
def planted() -> list[dict]:
    """1,000 originals, 100 exact copies but for dots and space, 200 with 1 % changed; shuffled."""
    chance = random.Random(0)
    texts = random_texts(1000, 200)
    texts += [f" {text[:100]}\n，{text[100:]}。" for text in texts[:100]]
    texts += [replaced(text, *chance.sample(range(200), 2)) for text in texts[100:300]]
    chance.shuffle(texts)
    return [text_row(number, text) for number, text in enumerate(texts)]


def test_planted_copies_are_found_and_originals_stay(planted, tmp_path):
    shards = signed(tmp_path, planted, BANDS)
    counts = find(shards, tmp_path / "drops")
    assert counts["rows"] == 1300 and counts["not_compared"] == 0
    assert counts["duplicate"] == 100
    assert counts["near_duplicate"] >= 0.99 * 200
    gone = set()
    for reason, row, partner in pairs(shards, tmp_path / "drops"):
        assert int(partner["id"][2:]) < int(row["id"][2:]), "the first copy stays"
        assert similar(row, partner) or reason == "duplicate"
        gone.add(row["id"])
        assert partner["id"] not in gone
    assert len(gone) == counts["duplicate"] + counts["near_duplicate"]


@pytest.mark.parametrize("n_shards", [2, 7])
def test_the_number_of_shards_changes_nothing(planted, n_shards, tmp_path):
    one = dropped(tmp_path / "one", planted, BANDS)
    assert dropped(tmp_path / "many", planted, BANDS, n_shards) == one


def test_the_rows_that_stayed_hold_no_copies(planted, tmp_path):
    gone = dropped(tmp_path, planted, BANDS)
    kept = [row for number, row in enumerate(planted) if number not in gone]
    assert dropped(tmp_path / "again", kept, BANDS) == {}


def test_boilerplate_costs_no_more_than_a_few_comparisons_a_row(tmp_path):
    (boilerplate,) = random_texts(1, 60)
    rows = [text_row(n, boilerplate + text) for n, text in enumerate(random_texts(150, 25, seed=1))]
    first, last = replaced(rows[0]["text"], 70), replaced(rows[149]["text"], 70)
    rows += [text_row(150, first), text_row(151, last)]
    shards = signed(tmp_path, rows, SURE)
    counts = find(shards, tmp_path / "drops")
    assert counts["near_duplicate"] == 2 and counts["not_compared"] > 0
    assert counts["compared"] < 40 * len(rows), "of the 75 that each shares a key with"
    assert set(load_drops(drops_path(tmp_path / "drops", 0))) == {150, 151}
    assert dropped(tmp_path / "again", rows[:150]) == {}


def test_a_dialogue_goes_only_if_question_and_answer_are_both_similar(tmp_path):
    passage, answer, other = random_texts(3, 60)
    rows = [
        chat_row(0, passage, answer),
        chat_row(1, passage, other),
        chat_row(2, other, answer),
        chat_row(3, replaced(passage, 30), replaced(answer, 30)),
        chat_row(4, passage, answer + "。", system="资料：别的"),
        text_row(5, passage + answer),
    ]
    assert dropped(tmp_path, rows) == {3: "near_duplicate", 4: "near_duplicate"}


def test_a_repeated_headline_or_short_text_counts_only_if_it_is_exact(tmp_path):
    long = random_texts(4, 60)
    rows = [{"id": f"x/{n}", "text": text, "summary": "同一标题"} for n, text in enumerate(long)]
    rows[1]["summary"] = "另一标题"
    rows += [text_row(4, "好的啊"), text_row(5, "好的呢"), text_row(6, "好 的啊！")]
    assert dropped(tmp_path, rows) == dict.fromkeys((2, 3, 6), "duplicate")
    shards = signed(tmp_path, rows[4:], SURE)
    assert find(shards, tmp_path / "drops")["compared"] == 0


def test_held_out_rows_go_as_exact_copies_only_and_others_are_compared_with_them(tmp_path):
    (text,) = random_texts(1, 60)
    rows = [text_row(n, replaced(text, 12 * n)) for n in range(3)] + [text_row(3, text + "。")]
    rows += [text_row(4, replaced(text, 12, 59)), text_row(5, replaced(text, 12) + "！")]
    for number in (0, 1, 5):
        rows[number]["split"] = "test"
    wanted = {2: "near_duplicate", 3: "near_duplicate", 4: "near_duplicate", 5: "duplicate"}
    assert dropped(tmp_path, rows) == wanted


def test_empty_shards_do_no_harm(tmp_path):
    assert dropped(tmp_path, [text_row(0, "甲")] * 2, n_shards=5) == {0: "duplicate"}
    assert dropped(tmp_path / "none", []) == {}
