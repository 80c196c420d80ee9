"""The stages together: division into jobs, what goes between, several sets, engines, manifests."""

import gzip
import itertools
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from babyllama.errors import ConfigError
from babyllama.rows import read_rows
from data_process import raw
from data_process.pipeline import ProcessConfig, RawSet, SetConfig, make_clean
from data_process.registry import data_sets
from data_process.run import main
from data_process.stages import by_hash

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"


def text_of(chance: random.Random, n_chars: int = 60) -> str:
    return "".join(chance.choices(HAN, k=n_chars)) + "。"


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def text_set(place: Path, name: str = "text") -> RawSet:
    return RawSet(data_sets("text", name)[0], place)


def rows_of(out: Path, name: str, split: str = "*") -> list[dict]:
    paths = sorted((out / "clean" / name).glob(f"{split}-*.jsonl"))
    return [row for path in paths for row in read_rows(path)]


@pytest.fixture
def texts() -> list[str]:
    chance = random.Random(0)
    return [text_of(chance) for _ in range(300)]


# Division into jobs.


@pytest.mark.parametrize("job_bytes", [1, 700, 5_000, 10**9])
def test_jobs_cover_every_file_once_and_end_with_whole_lines(job_bytes, texts, tmp_path):
    for name in ("a", "b", "c"):
        write_lines(tmp_path / f"{name}.jsonl", texts[: 100 if name == "b" else 3])
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 500))
    jobs = raw.divide(raw.whole_files(tmp_path), "utf-8-sig", job_bytes=job_bytes)
    found: dict[Path, bytes] = {}
    for part in (part for job in jobs for part in job):
        content = part.path.read_bytes()[part.start : part.end]
        assert content.endswith(b"\n") or part.path.suffix == ".gz"
        found[part.path] = found.get(part.path, b"") + content
    assert found == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_the_division_into_jobs_changes_neither_ids_nor_texts(texts, tmp_path, monkeypatch):
    place = write_lines(tmp_path / "raw.jsonl", texts)
    found = []
    for job_bytes in (10**9, 4_000):
        monkeypatch.setattr(raw, "JOB_BYTES", job_bytes)
        cfg = ProcessConfig(out=tmp_path / str(job_bytes))
        make_clean([text_set(place)], cfg)
        rows = rows_of(cfg.out, "text")
        found.append({row["id"]: row["text"] for row in rows})
    assert found[0] == found[1] and found[0]["text/299"] == texts[299]
    assert len(list((tmp_path / "4000/work/text/clean").glob("*.jsonl"))) > 10


# Between reading and writing.


def test_near_copies_go_and_never_stand_on_both_sides_of_a_split(texts, tmp_path):
    edited = [text[:30] + "改" + text[31:] for text in texts[:100]]
    place = write_lines(tmp_path / "raw.jsonl", [*texts, *edited, *texts[:50]])
    ((counts, _),) = make_clean([text_set(place)], ProcessConfig(out=tmp_path))
    dropped = counts["stages"]["dedup"]["dropped"]
    assert dropped["duplicate"]["rows"] == 50
    assert dropped["near_duplicate"]["rows"] >= 99
    assert all("text/" in example for example in dropped["near_duplicate"]["examples"])
    assert {row["text"] for row in rows_of(tmp_path, "text")} >= set(texts)


def test_without_dedup_every_copy_stays(texts, tmp_path):
    place = write_lines(tmp_path / "raw.jsonl", texts * 2)
    ((counts, _),) = make_clean([text_set(place)], ProcessConfig(out=tmp_path, dedup=None))
    assert counts["rows_out"] == 600 and "dedup" not in counts["stages"]


@pytest.mark.parametrize("across", [False, True])
def test_repeats_are_looked_for_within_sets_or_across(across, texts, tmp_path):
    one = write_lines(tmp_path / "one.jsonl", texts[:200])
    two = write_lines(tmp_path / "two.jsonl", texts[100:])
    cfg = ProcessConfig(out=tmp_path / "out", dedup_across=across)
    counts = [c for c, _ in make_clean([text_set(one, "one"), text_set(two, "two")], cfg)]
    assert [c["rows_out"] for c in counts] == [200, 100 if across else 200]


def test_rows_that_share_text_with_an_evaluation_file_go_and_are_listed(texts, tmp_path):
    place = write_lines(tmp_path / "raw.jsonl", texts)
    evaluation = write_lines(tmp_path / "evaluation.jsonl", [t[5:50] for t in texts[40:60]])
    cfg = ProcessConfig(out=tmp_path / "out", evaluation=(evaluation,))
    ((counts, _),) = make_clean([text_set(place)], cfg)
    assert set(counts["leaks"]) <= {f"text/{n}" for n in range(40, 60)}
    # One window in eight is looked at, and two must match.
    assert len(counts["leaks"]) >= 18
    kept = "".join(row["text"] for row in rows_of(cfg.out, "text"))
    assert not any(texts[int(leak.split("/")[1])] in kept for leak in counts["leaks"])


def test_held_out_rows_of_one_set_leave_the_other_sets_of_the_run(texts, tmp_path):
    """A paper of CSL's test part leaves every other task and the pretraining text."""
    summaries = "".join(f"to title\t{text}\t{text[:20]}\n" for text in texts[:20])
    test = tmp_path / "csl/test.tsv"
    test.parent.mkdir()
    test.write_text(summaries, encoding="utf-8")
    train = "".join(f"to title\t{text}\t{text[:20]}\n" for text in texts[200:])
    (tmp_path / "csl/train.tsv").write_text(train, encoding="utf-8")
    place = write_lines(tmp_path / "raw.jsonl", texts)
    sets = [RawSet(data_sets("csl")[0], tmp_path / "csl"), text_set(place)]
    csl, text = (counts for counts, _ in make_clean(sets, ProcessConfig(out=tmp_path / "out")))
    assert csl["parts"]["test"]["rows"] == 20
    assert len(set(text["leaks"]) & {f"text/{n}" for n in range(20)}) >= 18
    assert not {leak for leak in text["leaks"] if int(leak.split("/")[1]) >= 20}


def test_rows_that_a_publisher_holds_out_all_stay_and_their_copies_in_train_go(texts, tmp_path):
    for name, lines in (("test", [0, 0, 1]), ("dev", [1, 2]), ("train", [0, 2, 3, 4])):
        rows = "".join(f"to title\t{texts[n]}\t{texts[n][:20]}\n" for n in lines)
        (tmp_path / f"{name}.tsv").write_text(rows, encoding="utf-8")
    raw_set = RawSet(data_sets("csl")[0], tmp_path)
    ((counts, _),) = make_clean([raw_set], ProcessConfig(out=tmp_path / "out"))
    assert [counts["parts"][name]["rows"] for name in ("train", "val", "test")] == [2, 2, 3]


def test_rules_are_switched_off_by_name(texts, tmp_path):
    place = write_lines(tmp_path / "raw.jsonl", [*texts[:5], "短", "short English text only here"])
    cfg = ProcessConfig(out=tmp_path / "a")
    assert make_clean([text_set(place)], cfg)[0][0]["rows_out"] == 5
    skip = ("not_chinese", "short_text")
    cfg = replace(cfg, out=tmp_path / "b", skip_rules=skip)
    assert make_clean([text_set(place)], cfg)[0][0]["rows_out"] == 7
    with pytest.raises(ConfigError, match=r"no_such_rule.*short_text"):
        main(ProcessConfig("text", raw=place, out=tmp_path, skip_rules=("no_such_rule",)))


def test_traditional_texts_become_simplified(tmp_path):
    text = "這個國家對於經濟發展與學術研究都應該給予長遠的規劃，並且將問題公開討論。"
    place = write_lines(tmp_path / "raw.jsonl", [text])
    make_clean([text_set(place)], ProcessConfig(out=tmp_path))
    assert rows_of(tmp_path, "text")[0]["text"].startswith("这个国家对于经济发展与学术研究")


def test_rows_of_one_entry_stay_on_one_side_of_a_split():
    shares = {"val": 0.5}
    assert len({by_hash(f"x/3-{n}", shares) for n in range(50)} | {by_hash("x/3", shares)}) == 1
    assert len({by_hash(f"x-1/{n}", shares) for n in range(50)}) == 2


# Manifests, keys, mixtures.


def test_every_stage_says_what_came_in_and_went_out(texts, tmp_path):
    place = write_lines(tmp_path / "raw.jsonl", [*texts, *texts[:10], "短"])
    ((counts, _),) = make_clean([text_set(place)], ProcessConfig(out=tmp_path))
    stages = list(counts["stages"].values())
    for stage in stages:
        n_dropped = sum(found["rows"] for found in stage["dropped"].values())
        assert stage["rows_in"] == stage["rows_out"] + n_dropped
    for before, after in itertools.pairwise(stages):
        assert before["rows_out"] == after["rows_in"]
    assert list(counts["inputs"]) == ["raw.jsonl"] and len(counts["inputs"]["raw.jsonl"]) == 64


def watched(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.glob("*.jsonl")}


def test_a_changed_setting_redoes_only_what_it_touches(texts, tmp_path):
    place = write_lines(tmp_path / "raw.jsonl", texts)
    cfg = ProcessConfig(out=tmp_path)
    make_clean([text_set(place)], cfg)
    before = watched(tmp_path / "work/text/clean")
    ((_, stood),) = make_clean([text_set(place)], replace(cfg, dedup=None))
    assert not stood and watched(tmp_path / "work/text/clean") == before
    make_clean([text_set(place)], replace(cfg, skip_rules=("short_text",)))
    assert watched(tmp_path / "work/text/clean") != before


def test_a_mixture_lists_its_sets_with_their_weights(texts, tmp_path, tokenizer, script: Callable):
    write_lines(tmp_path / "raw/a.jsonl", texts[:100])
    write_lines(tmp_path / "raw/b.jsonl", texts[100:])
    sets = (SetConfig("text", "a", Path("a.jsonl")), SetConfig("text", "b", Path("b.jsonl"), 0.5))
    cfg = ProcessConfig(
        raw=tmp_path / "raw", out=tmp_path / "out", sets=sets, mixture="mix",
        tokenizer=tokenizer.path,
    )  # fmt: skip
    main(cfg)
    mixture = tmp_path / "out/mixtures/mix.yaml"
    done = script("pretrain.py", "--config", mixture, "--model.max_seq_len", 32, "--dry-run")
    assert done.code == 0, done.err
    with pytest.raises(ConfigError, match="twice"):
        main(replace(cfg, sets=(sets[0], sets[0])))
