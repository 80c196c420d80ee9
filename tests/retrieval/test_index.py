"""The full-text index: what it finds, what it refuses, and that a build is whole or not there."""

import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from babyllama.errors import ConfigError, DataError
from babyllama.retrieval.index import (
    asked,
    build,
    normal,
    passages,
    split_title,
    terms,
    trim,
)
from babyllama.retrieval.retriever import Retriever
from babyllama.rows import write_rows
from data_process import run as data_run

REPO = Path(__file__).parents[2]
ARTICLES = {
    "银杏": ["银杏是落叶乔木，寿命可达三千年。", "银杏的叶子像扇子，秋天变黄。"],
    "镍": ["镍是一种有铁磁性的金属元素。", "镍的使用可追溯至公元前3500年，用于铸币。"],
    "苹果 (水果)": ["苹果是蔷薇科的果实。"],
    "苹果 (公司)": ["苹果公司在1976年成立，产品有iPhone。"],
}


def write_articles(path: Path, articles: dict[str, list[str]] = ARTICLES) -> Path:
    rows = [
        {"id": f"wiki/{n}", "text": "\n".join([title, *paragraphs])}
        for n, (title, paragraphs) in enumerate(articles.items())
    ]
    write_rows(path, rows)
    return path


def chance_articles(n: int, seed: int = 0) -> dict[str, list[str]]:
    """Articles of characters drawn from few, so that terms meet often."""
    chance = random.Random(seed)

    def text(most: int) -> str:
        return "".join(chance.choices("甲乙丙丁戊己庚辛。，a1 ", k=chance.randint(2, most)))

    return {
        f"{n}号": ["头" + text(60) + "尾" for _ in range(chance.randint(1, 4))] for n in range(n)
    }


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    place = tmp_path_factory.mktemp("index")
    build([write_articles(place / "rows.jsonl")], place / "wiki", "wiki", longest=25)
    return Retriever(place / "wiki")


@pytest.mark.parametrize(
    "question, title, paragraph",
    [
        ("银杏的叶子什么时候变黄？", "银杏", 2),
        ("哪种金属有铁磁性", "镍", 1),
        ("镍", "镍", 1),  # one character alone is found, though pairs are indexed
        ("ＩＰＨＯＮＥ", "苹果 (公司)", 1),  # full width, capitals
        ("3500", "镍", 2),
        ("苹果的果实", "苹果 (水果)", 1),
    ],
)
def test_the_best_passage_is_the_one_that_is_asked_for(index, question, title, paragraph):
    best = index.search(question, 3)[0]
    assert (best.title, best.paragraph) == (title, paragraph)
    assert 0 < best.coverage <= 1 and best.score > 0
    assert best.citation == f"《{title}》第 {paragraph} 段"


def test_what_stands_nowhere_is_not_found(index):
    assert index.search("量子纠缠", 5) == index.search("", 5) == index.search("？！ \n", 5) == []


def test_documents_are_found_by_their_title_in_order(index):
    assert [(p.title, p.paragraph) for p in index.titled("银杏")] == [("银杏", 1), ("银杏", 2)]
    assert {p.title for p in index.titled("苹果")} == {"苹果 (水果)", "苹果 (公司)"}
    assert [p.title for p in index.titled("苹果 （水果）")] == ["苹果 (水果)"]
    assert index.titled("金属") == []


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_formula_over_a_dictionary(seed, tmp_path):
    rows = write_articles(tmp_path / "rows.jsonl", chance_articles(40, seed))
    build([rows], tmp_path / "wiki", "wiki", longest=15)
    index = Retriever(tmp_path / "wiki")
    bags = []
    for row in map(json.loads, rows.read_text("utf-8").splitlines()):
        for passage in passages(row, 15):
            bags.append(Counter(terms(normal(f"{passage.title}\n{passage.text}"))))
    mean = sum(map(Counter.total, bags)) / len(bags)

    def slow(wanted: list[str], bag: Counter) -> float:
        score, norm = 0.0, 1.2 * (0.25 + 0.75 * bag.total() / mean)
        for term in wanted:
            df = sum(term in other for other in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            score += 2.2 * idf * bag[term] / (bag[term] + norm)
        return score

    for question in ("甲乙丙", "戊己庚辛a1", "辛甲 丁戊"):
        wanted, alone = asked(question)
        assert not alone
        scores = sorted((slow(wanted, bag) for bag in bags), reverse=True)
        found = index.search(question, 5)
        assert len(found) == 5
        # tantivy keeps lengths of up to 40 terms exactly, longer ones in steps.
        for passage, score in zip(found, scores, strict=False):
            assert passage.score == pytest.approx(score, rel=1e-4)


def bytes_of(place: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(place.iterdir())}


def test_the_same_rows_are_not_indexed_again_and_others_replace_them(tmp_path):
    rows, place = write_articles(tmp_path / "rows.jsonl"), tmp_path / "wiki"
    first = build([rows], place, "wiki")
    assert "unchanged" not in first and build([rows], place, "wiki")["unchanged"]
    write_articles(rows, {"桃": ["桃是蔷薇科的果树。", "桃花在春天开。"]})
    assert "unchanged" not in build([rows], place, "wiki")
    assert Retriever(place).search("银杏", 1) == [] and Retriever(place).search("桃花", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "wiki"]


def test_every_file_is_as_readable_as_any_other_that_the_user_makes(tmp_path):
    rows, place = write_articles(tmp_path / "rows.jsonl"), tmp_path / "wiki"
    build([rows], place, "wiki")
    assert {path.stat().st_mode for path in place.iterdir()} == {rows.stat().st_mode}


def test_a_build_that_is_killed_leaves_the_old_index_and_the_next_one_cleans_up(tmp_path):
    rows, place = write_articles(tmp_path / "rows.jsonl"), tmp_path / "wiki"
    build([rows], place, "wiki")
    before = bytes_of(place)
    write_articles(rows, chance_articles(3000))
    code = "import sys; from pathlib import Path; from babyllama.retrieval.index import build\n"
    code += "build([Path(sys.argv[1])], Path(sys.argv[2]), 'wiki')"
    child = subprocess.Popen([sys.executable, "-c", code, str(rows), str(place)], cwd=REPO)
    while child.poll() is None and not list(tmp_path.glob("tmp-wiki/meta.json")):
        time.sleep(0.001)
    child.kill()
    child.wait()
    assert (tmp_path / "tmp-wiki").is_dir() and bytes_of(place) == before
    assert Retriever(place).search("银杏", 1)
    build([rows], place, "wiki")
    assert Retriever(place).info["n_passages"] >= 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "wiki"]


def damage(place: Path, how: str) -> None:
    info = json.loads((place / "index.json").read_text("utf-8"))
    if how == "version":
        (place / "index.json").write_text(json.dumps(info | {"version": 99}), "utf-8")
    elif how == "cut":
        (store,) = place.glob("*.store")
        store.write_bytes(store.read_bytes()[:-4])
    elif how == "lost":
        next(place.glob("*.idx")).unlink()
    elif how == "flipped":
        meta = (place / "meta.json").read_bytes()
        (place / "meta.json").write_bytes(meta.replace(b"{", b"[", 1))
    elif how == "no json":
        (place / "index.json").write_bytes(b"\xff[")
    else:
        shutil.rmtree(place)
        place.mkdir()


@pytest.mark.parametrize(
    "how, message",
    [
        ("version", "version 2, found version 99"),
        ("cut", r"\.store: wanted [\d,]+ bytes"),
        ("lost", r"\.idx.*damaged, make it again"),
        ("flipped", "wanted an index, found .*make it again"),
        ("no json", "wanted the settings of an index"),
        ("empty", "wanted an index, found no index.json"),
    ],
)
def test_what_is_no_whole_index_is_refused_in_one_line(tmp_path, how, message):
    rows, place = write_articles(tmp_path / "rows.jsonl"), tmp_path / "wiki"
    build([rows], place, "wiki")
    damage(place, how)
    with pytest.raises(DataError, match=message) as error:
        Retriever(place)
    assert "\n" not in str(error.value)


def test_the_index_of_another_corpus_is_not_replaced(tmp_path):
    rows, place = write_articles(tmp_path / "rows.jsonl"), tmp_path / "wiki"
    build([rows], place, "novels")
    with pytest.raises(DataError, match="found the index of 'novels'"):
        build([rows], place, "wiki")
    damage(place, "version")
    build([rows], place, "novels")  # an older version of its own is made anew
    assert Retriever(place).search("银杏", 1)


def test_rows_without_text_are_refused(tmp_path):
    messages = [{"role": "user", "content": "一"}, {"role": "assistant", "content": "二"}]
    write_rows(tmp_path / "chat.jsonl", [{"id": "c/1", "messages": messages}])
    with pytest.raises(DataError, match=r"wanted text rows for an index.*chat row"):
        build([tmp_path / "chat.jsonl"], tmp_path / "wiki", "wiki")
    with pytest.raises(DataError, match="no such file"):
        build([tmp_path / "none.jsonl"], tmp_path / "wiki", "wiki")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl"]


@given(st.text(max_size=300))
def test_any_question_is_answered(index, question):
    found = index.search(question, 3)
    assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    index.titled(question)


def test_a_word_of_16_kb_and_a_question_of_many_terms_are_answered(index):
    assert index.search("a" * 16384, 3) == []
    everything = "".join(map(chr, range(0x4E00, 0x9000))) + "\u202e银杏\x00👩‍👩‍👧"
    assert isinstance(index.search(everything, 3), list)


def test_where_a_question_is_cut_its_rarest_terms_stay(index, monkeypatch):
    whole = index.search("苹果公司的果实", 1)[0]
    monkeypatch.setattr("babyllama.retrieval.index.MOST_TERMS", 2)
    (cut,) = index.search("苹果公司的果实", 1)
    assert 0 < cut.score < whole.score
    assert index.search("苹果铁磁性", 1)[0].title == "镍"


def test_threads_find_the_same(index):
    questions = ["银杏的叶子", "镍", "苹果公司", "3500年"] * 50
    alone = [index.search(question, 3) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda question: index.search(question, 3), questions)) == alone


LINES = st.lists(st.text("甲乙丙。！a \u3000”", min_size=1, max_size=90), min_size=1, max_size=8)


@given(LINES, st.integers(5, 60))
def test_passages_hold_every_character_once_in_order_and_none_is_too_long(lines, longest):
    row = {"id": "x/1", "text": "题目\n" + "\n".join(lines)}
    found = list(passages(row, longest))
    assert all(0 < len(passage.text) <= longest for passage in found)
    text = "".join("".join(passage.text for passage in found).split())
    assert text == "".join("".join(split_title(row["text"])[1]).split())
    numbers = [passage.paragraph for passage in found]
    paragraphs = split_title(row["text"])[1]
    assert numbers == sorted(numbers)
    for passage in found:
        begin = passage.text.split("\n")[0].strip()
        assert begin in paragraphs[passage.paragraph - 1]


def test_a_first_line_is_a_title_only_where_it_looks_like_one():
    assert split_title("银杏\n银杏是乔木。") == ("银杏", ["银杏是乔木。"])
    assert split_title("银杏是乔木。\n叶子像扇子。")[0] == split_title("银杏")[0] == ""


def test_trim_keeps_whole_sentences():
    assert trim("一二三。四五六。", 6) == "一二三。" and trim("一二三。", 2) == "一二"


def test_the_data_command_makes_an_index_of_the_clean_rows(tmp_path, capsys):
    raw = tmp_path / "raw.json"
    long = (
        "银杏是落叶乔木，寿命可达三千年以上，叶子像一把小小的扇子，到了秋天会变成金黄色，非常好看。"
    )
    found = [{"completion": f"银杏{n}号：{long}{n}", "source": "wiki"} for n in range(5)]
    raw.write_text(json.dumps(found, ensure_ascii=False), "utf-8")
    cfg = data_run.ProcessConfig("wiki", raw=raw, out=tmp_path / "data", index=True, dedup=None)
    data_run.main(cfg)
    assert "index: " in capsys.readouterr().out
    clean = (tmp_path / "data/clean/wiki").glob("*-*.jsonl")
    n_rows = sum(len(path.read_text("utf-8").splitlines()) for path in clean)
    index = Retriever(tmp_path / "data/index/wiki")
    assert index.info["n_rows"] == n_rows > 0 and index.search("银杏的寿命", 1)
    data_run.main(cfg)
    assert "as it was" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--index wants sets of texts"):
        data_run.main(data_run.ProcessConfig("redgpt", raw=raw, out=tmp_path / "d", index=True))
