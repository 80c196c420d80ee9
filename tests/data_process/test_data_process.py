"""From raw files to clean rows and token files: what is kept, where it goes, and the same bytes."""

import json
import os
import pickle
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from babyllama.config import REPO
from babyllama.errors import ConfigError, DataError
from babyllama.rows import check_row, read_rows, row_kind
from babyllama.token_file import TokenFile
from data_process.clean import fix, han_share, reason_to_drop, ways
from data_process.dedup import fingerprint
from data_process.pipeline import make_clean
from data_process.raw import Skip, records
from data_process.registry import GROUPS, catalog, data_sets
from data_process.run import ProcessConfig, check, chosen, main
from data_process.stages import Cleaning, Finishing, WriteConfig, by_hash, part_of_row, write_shards
from data_process.vocabulary import train_vocabulary
from tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "raw"
CSL = REPO / ".." / "shared" / "data" / "csl"
HAN = (
    "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主年动同工也能下过子说产种面"
    "而方后多定行学法所民得经十三之进着等部度家电力里如水化高自二理起小物现实加量都两体制机当使点从业本去把"
    "性好应开它合还因由其些然前外天政四日那社义事平形相全表间样与关各重新线内数正心反你明看原又么利比或但质"
    "气第向道命此变条只没结解问意建月公无系军很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活"
)


def config(reader: str, out: Path, **settings: object) -> ProcessConfig:
    """Settings for a fixture; its few rows hold more damage than one in a hundred."""
    raw = {} if reader in GROUPS else {"raw": FIXTURES / reader}
    return ProcessConfig(dataset=reader, out=out, **({"max_bad": 1.0} | raw | settings))


def made(reader: str, out: Path, **settings: object) -> dict:
    """counts.json of a fixture's set."""
    return make(config(reader, out, **settings))[0]


def make(cfg: ProcessConfig) -> tuple[dict, bool]:
    """counts.json of the one set that the settings name, and whether it stood before."""
    (found,) = make_clean(chosen(cfg), cfg)
    return found


def rows_of(directory: Path, split: str = "*") -> list[dict]:
    return [row for path in sorted(directory.glob(f"{split}-*.jsonl")) for row in read_rows(path)]


def dropped(counts: dict) -> dict[str, int]:
    return {reason: found["rows"] for reason, found in counts["dropped"].items()}


def bytes_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory that a later step reads."""
    paths = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


def documents(n_rows: int, seed: int = 0) -> str:
    """Made-up documents, JSON lines."""
    chance = random.Random(seed)
    texts = ("".join(chance.choices(HAN, k=chance.randint(30, 90))) for _ in range(n_rows))
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    texts = [json.loads(line)["text"] for line in documents(300).split("\n")[:-1]]
    texts.append(" 一 二  三\n" * 50)
    train_vocabulary(texts, path, 700)
    return path


@pytest.fixture
def raw(tmp_path) -> Path:
    path = tmp_path / "raw" / "documents.jsonl"
    path.parent.mkdir()
    path.write_text(documents(200), encoding="utf-8")
    return path


# Every reader.


@pytest.mark.parametrize("entry", catalog())
def test_every_data_set_states_what_it_is_and_passes_damage_on(entry):
    (data_set,) = data_sets(entry)
    assert data_set.kind in ("text", "chat", "summary", "vqa")
    assert data_set.about and data_set.license and data_set.source.home
    source = data_set.source
    assert source.huggingface or source.modelscope or source.urls or source.manual
    assert data_set.rules in ways()
    assert all(path.is_file() for path in data_set.key()[1:])
    damage = Skip("broken_json", "x.json:1", '{"text": ')
    assert data_set.reads_dir or list(data_set.read([damage])) == [damage]


@pytest.mark.parametrize("reader", ["csl", "text", "conversations", "instruction", "smalltalk"])
def test_a_fixture_becomes_canonical_rows_and_every_other_row_is_counted(reader, tmp_path):
    counts = made(reader, tmp_path)
    rows = rows_of(tmp_path / "clean" / reader)
    assert rows and len({row["id"] for row in rows}) == len(rows) == counts["rows_out"]
    assert {row_kind(row) for row in rows} == {counts["kind"]}
    assert counts["rows_in"] == counts["rows_out"] + sum(dropped(counts).values())
    assert all(found["examples"] for found in counts["dropped"].values())


def test_csl_keeps_quotes_columns_and_official_splits(tmp_path):
    counts = made("csl", tmp_path)
    train, val, test = (rows_of(tmp_path / "clean/csl", part) for part in ("train", "val", "test"))
    assert {row["summary"] for row in val} == {"山区公路弯道视距分析", "湖底地形的等高线绘制"}
    # The English abstract would fall to a rule, were it not in the publisher's test part.
    assert len(test) == 2 + 1
    titles = [row["summary"] for row in train]
    assert "低温混凝土的抗压强度" not in titles, "this headline stands in the test part"
    texts = "".join(row["text"] for row in train + val)
    assert texts.count('"') == 1 + 1 + 2
    assert "温室番茄的节水灌溉试验" in titles and "\ue004" not in texts
    assert dropped(counts) == {"duplicate": 1, "other_task": 1}


def test_conversations_drop_what_cannot_be_a_dialogue(tmp_path):
    counts = made("conversations", tmp_path)
    rows = {row["id"]: row["messages"] for row in rows_of(tmp_path / "clean/conversations")}
    texts = {key: [m["content"] for m in messages] for key, messages in rows.items()}
    assert texts == {
        "conversations/0": ["推荐一种水果。", "苹果，清脆可口。"],
        "conversations/1": ["一加一等于几？", "等于二。"],
        "conversations/5": ["晚饭吃什么？", "番茄炒蛋。"],
    }
    assert dropped(counts) == dict.fromkeys(
        ("tools", "bad_turns", "role_label_inside", "other_identity", "refusal", "unknown_role"), 1
    )


def test_instructions_are_joined_with_their_input_and_follow_their_history(tmp_path):
    made("instruction", tmp_path)
    rows = sorted(rows_of(tmp_path / "clean/instruction"), key=lambda row: row["id"])
    first = [row["messages"][0]["content"] for row in rows]
    assert first[0] == "把下面的句子改得更礼貌。\n把门关上。"
    assert first[1] == "给出两条早睡的建议。"
    assert first[2] == "对联：春风得意"
    assert [m["role"] for m in rows[3]["messages"]] == ["user", "assistant"] * 2


@pytest.mark.parametrize("n", [1, 2, 12, 60])
def test_a_small_set_has_an_entry_to_validate_with(tmp_path, n):
    rows = [{"instruction": f"{i} 加一是多少？", "output": f"答案是 {i + 1}。"} for i in range(n)]
    (tmp_path / "raw.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    cfg = ProcessConfig("instruction", "mine", tmp_path / "raw.json", tmp_path, dedup=None)
    counts, _ = make(cfg)
    parts = {part: len(rows_of(tmp_path / "clean/mine", part)) for part in ("train", "val")}
    assert {part: counts["parts"][part]["rows"] for part in parts} == parts
    assert sum(parts.values()) == n and (parts["val"] > 0) == (n > 1) and parts["train"] > 0


def test_a_set_of_ones_own_name_needs_its_raw_files_once(tmp_path, tokenizer, script):
    (tmp_path / "raw").mkdir()
    rows = [{"instruction": f"{i} 加一是多少？", "output": f"答案是 {i + 1}。"} for i in range(5)]
    (tmp_path / "raw/a.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    out = ("--out", tmp_path / "data")
    run = "data_process/run.py"
    assert not script(run, "instruction", "--name", "mine", "--raw", tmp_path / "raw", *out).code
    assert not script(run, "mine", "--tokenizer", tokenizer, *out).code
    assert (tmp_path / "data/tokens/tiny/mine/val-00000.idx").is_file()


def test_text_is_tidied_and_repeats_go(tmp_path):
    counts = made("text", tmp_path)
    texts = [row["text"] for row in rows_of(tmp_path / "clean/text")]
    assert not any(bad in text for text in texts for bad in ("<p>", "&nbsp;", "\u2028"))
    wanted = {"duplicate": 1, "empty_text": 1, "unknown_columns": 1, "not_chinese": 1}
    assert dropped(counts) == wanted | {"not_an_object": 1}


def test_smalltalk_alternates_and_loses_an_open_last_turn(tmp_path):
    counts = made("smalltalk", tmp_path)
    rows = rows_of(tmp_path / "clean/smalltalk")
    assert [len(row["messages"]) for row in rows] == [2, 2]
    wanted = {"unreadable_translation": 1, "wrong_type": 1, "echo": 1, "mixed_languages": 1}
    assert dropped(counts) == wanted
    assert counts["fixed"] == {"cut_open_turn": 1}


READERS = ["csl", "text", "conversations", "instruction"]
VALUES = [None, 0, 1e9, True, "", " ", "文", "\n\n助手：", [], [[]], {}, {"role": []}, [1, 2],
          [{"from": 1}], [{"role": "user", "content": None}], [["问", "答"]]]  # fmt: skip


def spoil(value: object, chance: random.Random) -> object:
    """A JSON value with some parts replaced."""
    if chance.random() < 0.15:
        return chance.choice(VALUES)
    if isinstance(value, dict):
        kept = {key: spoil(v, chance) for key, v in value.items() if chance.random() > 0.1}
        return kept | ({"tools": [1]} if chance.random() < 0.02 else {})
    return [spoil(v, chance) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("reader", READERS)
def test_rows_of_any_shape_become_canonical_or_are_counted(reader, tmp_path):
    chance = random.Random(reader)
    good = [
        json.loads(line)
        for path in (FIXTURES / reader).rglob("*.json*")
        for line in path.read_text(encoding="utf-8").split("\n")
        if line.startswith("{")
    ] or json.loads((FIXTURES / reader / "rows.json").read_text(encoding="utf-8"))
    lines = [json.dumps(spoil(chance.choice(good), chance)) for _ in range(1000)]
    path = tmp_path / "spoilt.jsonl"
    path.write_text('{"text": "头"}\n' + "\n".join(lines) + "\n", encoding="utf-8")
    (data_set,) = data_sets(reader)
    cleaning = Cleaning(data_set)
    finishing = Finishing(WriteConfig(data_set, 0, ()))
    clean = (row for row, _ in cleaning.rows(data_set.read(records(path, "utf-8-sig"))))
    kept = [row for _, row in finishing.rows(clean)]
    assert all(check_row(row) is None for row in kept)
    tallies = (cleaning.read, cleaning.clean, finishing.stages["write"])
    n_dropped = sum(found["rows"] for tally in tallies for found in tally.dropped.values())
    assert len(kept) + n_dropped == cleaning.read.sums["rows_in"] == 1001


# Cleaning.


def article(**changes: str) -> dict:
    text = "".join(random.Random(1).choices(HAN, k=150)) + "水库今日开闸放水，下游居民已经转移。"
    return {"id": "x/0", "text": text, "summary": "水库开闸放水 下游居民转移"} | changes


def test_a_plain_article_passes_unchanged():
    assert fix(article(), "headline") == (article(), [])
    assert reason_to_drop(article(), "headline") is None


@pytest.mark.parametrize(
    "title",
    ["水库开闸放水_某某汽车_某某网", "水库开闸放水 - 某某新闻", "水库开闸放水|水库|放水_某某网",
     "【快讯】水库开闸放水", "提醒丨水库开闸放水", "水库开闸放水-某某论坛"],
)  # fmt: skip
def test_site_names_and_labels_leave_the_headline(title):
    row, _ = fix(article(summary=title), "headline")
    assert row["summary"] == ("水库开闸放水" if "论坛" not in title else title)


@pytest.mark.parametrize("head", ["点击上方蓝字关注我们！", "原标题：水库开闸放水\n", "核心提示："])
@pytest.mark.parametrize("tail", ["返回某某\n责任编辑：李四", "（编辑：王五）", " 来源：某某发布"])
def test_calls_and_credits_leave_both_ends_of_a_body(head, tail):
    body = article()["text"]
    row, _ = fix(article(text=head + body + tail), "headline")
    assert body in row["text"] and len(row["text"]) <= len(body) + len("返回某某")


def test_a_body_does_not_begin_with_its_own_headline():
    plain = article()
    row, _ = fix(article(text=f"{plain['summary']}\n{plain['text']}"), "headline")
    assert row["text"] == plain["text"]


DIRT = {
    "short_body": {"text": "水库开闸放水，下游居民转移，请看图。"},
    "garbled": {"text": article()["text"] + "?????啊???啊???啊"},
    "repetition": {"text": article()["text"] + "\n同样的一行文字\n" * 7},
    "little_han": {"text": article()["text"] + "1,2;3" * 60},
    "gambling": {"summary": "水库开闸放水 某某娱乐城投注"},
    "advert": {"summary": "水库开闸放水设备厂家批发"},
    "forum": {"summary": "水库开闸放水 下游居民转移吗_某某贴吧"},
    "promotion": {
        "text": article()["text"] + "长按二维码，关注我们，记得点赞转发，谢谢，然后回家。" * 13
    },
    "short_title": {"summary": "放水"},
    "title_cut_off": {"summary": "水库开闸放水 下游居民..."},
    "clickbait": {"summary": "水库开闸放水！下游居民转移！"},
    "title_not_in_text": {"summary": "秋季运动会圆满闭幕"},
    "not_chinese": {"text": "The gates of the dam were opened today. " * 20},
}


@pytest.mark.parametrize("reason", DIRT)
def test_each_kind_of_dirt_is_dropped_by_its_own_rule(reason):
    row, _ = fix(article(**DIRT[reason]), "headline")
    assert reason_to_drop(row, "headline") == reason


def test_headline_rules_are_those_of_articles_and_more():
    assert set(ways()["article"]["rules"]) < set(ways()["headline"]["rules"])
    article, headline = (ways()[kind]["fixes"] for kind in ("article", "headline"))
    assert article == headline, "or copies of an article would differ in two sets"


def test_han_share_counts_what_is_not_space():
    assert han_share("汉 字\nab") == 0.5
    assert han_share(" \n") == 0.0


# Duplicates and splits.


def test_duplicates_differ_in_space_punctuation_and_case_only():
    assert fingerprint("ABc，一\n二。") == fingerprint("abC 一,二") != fingerprint("abc一三")
    assert fingerprint("……") != fingerprint("！")


def test_the_split_depends_on_the_id_alone_and_has_the_shares_asked_for():
    shares = {"val": 0.02, "test": 0.05}
    splits = [by_hash(f"x/{n}", shares) for n in range(20_000)]
    assert abs(splits.count("val") / 20_000 - 0.02) < 0.005
    assert abs(splits.count("test") / 20_000 - 0.05) < 0.005
    assert [by_hash(f"x/{n}", shares) for n in range(19_999, -1, -1)] == splits[::-1]


def test_official_splits_are_kept_and_validation_comes_from_train_only_if_there_is_none():
    half, most = {"val": 0.5}, {"val": 0.5, "test": 0.5}
    with_val, without = ("train", "val"), ("train", "test")
    rows = [f"x/{n}" for n in range(50)]
    assert part_of_row("x/0", "val", half, with_val) == "val"
    assert {part_of_row(row, "train", half, with_val) for row in rows} == {"train"}
    assert part_of_row("x/0", "test", most, without) == "test"
    assert {part_of_row(row, "train", most, without) for row in rows} == {"train", "val"}


# The whole run.


def test_one_and_two_workers_write_the_same_bytes_and_a_second_run_nothing(
    raw, tokenizer, tmp_path, capsys
):
    cfg = ProcessConfig("text", raw=raw.parent, out=tmp_path / "one", tokenizer=tokenizer)
    main(cfg)
    main(replace(cfg, out=tmp_path / "two", engine="processes", workers=2))
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*.*")}
    capsys.readouterr()
    main(cfg)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "nothing has changed" in capsys.readouterr().out


def test_a_changed_file_or_setting_makes_the_set_again(raw, tmp_path):
    cfg = ProcessConfig("text", raw=raw.parent, out=tmp_path)
    assert make(cfg)[1] is False
    assert make(cfg)[1] is True
    assert make(replace(cfg, max_bad=0.02))[1] is False
    raw.write_text(documents(100), encoding="utf-8")
    counts, stood = make(cfg)
    assert not stood and counts["rows_in"] == 100
    (tmp_path / "clean/text/train-00000.jsonl").unlink()
    assert make(cfg)[1] is False


def test_token_files_hold_the_rows_with_their_roles(tokenizer, tmp_path):
    model = Tokenizer(tokenizer)
    for reader in ("text", "csl", "conversations"):
        main(config(reader, tmp_path, tokenizer=tokenizer))
        rows = rows_of(tmp_path / "clean" / reader, "train")
        stem = tmp_path / "tokens/tiny" / reader / "train-00000"
        file = TokenFile(stem, model.fingerprint)
        assert (file.n_docs, file.kind) == (len(rows), row_kind(rows[0]))
        for n, row in enumerate(rows):
            if reader == "text":
                assert np.split(file.ids, file.ends)[n].tolist() == model.encode(
                    row["text"], eos=True
                )
                continue
            found = [(role, model.decode(ids.tolist())) for role, ids in file.pieces(n)]
            turns = [(m["role"], m["content"]) for m in row.get("messages", [])]
            wanted = turns or [("text", row["text"]), ("summary", row["summary"])]
            assert found[: len(wanted)] == wanted


def test_shards_are_cut_at_their_size_and_lose_nothing(tmp_path):
    rows = [json.loads(line) for line in documents(50).split("\n")[:-1]]
    rows = [{"id": f"x/{n}", **row} for n, row in enumerate(rows)]
    names = write_shards(tmp_path / "x", ((row, len(row["text"])) for row in rows), 500)
    assert len(names) > 3
    assert rows_of(tmp_path, "x") == rows


def test_token_files_of_shards_that_are_gone_go_too(raw, tokenizer, tmp_path):
    main(ProcessConfig("text", raw=raw.parent, out=tmp_path, tokenizer=tokenizer))
    stale = tmp_path / "tokens/tiny/text/train-00007.bin"
    stale.write_bytes(b"old")
    main(ProcessConfig("text", raw=raw.parent, out=tmp_path, tokenizer=tokenizer))
    assert not stale.exists()


def test_changed_rows_are_turned_into_ids_again(raw, tokenizer, tmp_path):
    cfg = ProcessConfig("text", raw=raw.parent, out=tmp_path, tokenizer=tokenizer)
    main(cfg)
    raw.write_text(documents(60, seed=1), encoding="utf-8")
    main(cfg)
    rows = rows_of(tmp_path / "clean/text", "train")
    file = TokenFile(tmp_path / "tokens/tiny/text/train-00000")
    assert file.ids[: file.ends[0]].tolist() == Tokenizer(tokenizer).encode(
        rows[0]["text"], eos=True
    )
    assert file.n_docs == len(rows)


def test_what_a_killed_run_left_behind_does_not_enter_the_set(raw, tmp_path):
    stale = tmp_path / "clean/tmp-text/train-00009.jsonl"
    stale.parent.mkdir(parents=True)
    stale.write_text('{"id": "text/0", "text": "旧"}\n', encoding="utf-8")
    made("text", tmp_path, raw=raw)
    assert not list((tmp_path / "clean").rglob(stale.name))


# Kills itself at the n-th opening, renaming or removal of a file under the output directory.
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from data_process.run import ProcessConfig, main
raw, out, tokenizer, left = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
def hook(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(out):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
main(ProcessConfig("text", raw=Path(raw), out=Path(out), tokenizer=Path(tokenizer)))
print("events", 10**6 - left)
"""


def test_a_killed_run_is_continued_to_the_same_bytes(raw, tokenizer, tmp_path):
    def run(out: str, kill_at: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", KILLED_RUN, raw.parent, tmp_path / out, tokenizer]
        return subprocess.run(
            [*map(str, command), str(kill_at)], cwd=REPO, capture_output=True, text=True
        )

    whole = run("whole", 10**6)
    n_events = int(whole.stdout.split()[-1])
    wanted = bytes_of(tmp_path / "whole")
    cfg = ProcessConfig("text", raw=raw.parent, tokenizer=tokenizer)
    for number in range(1, 9):
        out = f"killed-{number}"
        assert run(out, n_events * number // 9).returncode == -9
        main(replace(cfg, out=tmp_path / out))
        assert bytes_of(tmp_path / out) == wanted


@pytest.mark.parametrize("left", ["old", "old and new"])
def test_a_kill_between_the_two_renames_loses_neither_set(left, raw, tmp_path):
    cfg = ProcessConfig("text", raw=raw.parent, out=tmp_path)
    make(cfg)
    target, old = tmp_path / "clean/text", tmp_path / "clean/old-text"
    if left == "old":
        target.rename(old)
    else:
        old.mkdir()
    assert make(cfg)[1] is True
    assert target.exists() and not old.exists()


# Mistakes.


def test_too_much_damage_stops_with_places_and_leaves_the_earlier_set(raw, tmp_path):
    cfg = ProcessConfig("text", raw=raw.parent, out=tmp_path)
    make(cfg)
    before = bytes_of(tmp_path / "clean")
    with open(raw, "a", encoding="utf-8") as file:
        file.write('{"text": "断\n{"text": {"一": 2}}\n{"text": ""}\n' * 5)
    with pytest.raises(DataError, match=r"found 5 of 215: documents\.jsonl:201 broken_json"):
        make(cfg)
    assert bytes_of(tmp_path / "clean") == before
    counts, _ = make(replace(cfg, max_bad=0.1))
    assert dropped(counts) == {"broken_json": 5, "wrong_type": 5, "empty_text": 5}
    why = counts["dropped"]["wrong_type"]["why"]
    assert why == "documents.jsonl:202: column 'text': an object; wanted text"


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": " "}\n', "only words\n"])
def test_a_set_without_rows_is_refused_and_leaves_nothing(content, tmp_path):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="wanted rows for text"):
        make(ProcessConfig("text", raw=raw, out=tmp_path / "out", max_bad=1.0))
    assert not (tmp_path / "out" / "clean").exists()


def test_a_missing_directory_says_where_the_data_come_from(tmp_path):
    with pytest.raises(DataError, match=r"ydli-ai/CSL.*--raw"):
        main(ProcessConfig("csl", raw=tmp_path / "nothing", out=tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"workers": 0},
        {"max_bad": 1.5},
        {"dedup": 1.1},
        {"dedup": -0.5},
        {"encoding": "utf-9"},
        {"encoding": "base64"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        check(ProcessConfig("text", **settings))


@pytest.mark.parametrize(("reader", "name"), [("no_such", None), ("text", "../x"), ("sample", "x")])
def test_unknown_sets_and_names_that_are_paths_are_refused(reader, name):
    with pytest.raises(ConfigError):
        data_sets(reader, name)


# Real data.


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample")
    main(ProcessConfig("sample", out=out))
    return out / "clean"


def test_the_sample_keeps_about_as_many_rows_as_planned(sample):
    counts = {
        s: json.loads((sample / s / "counts.json").read_text("utf-8")) for s in GROUPS["sample"]
    }
    kept = {name: found["rows_out"] / found["rows_in"] for name, found in counts.items()}
    assert 0.65 < kept["inews"] < 0.85
    assert 0.45 < kept["inews_title"] < 0.65
    assert 0.55 < kept["smalltalk"] < 0.75
    assert 150 < counts["inews_title"]["parts"]["test"]["rows"] < 250
    assert counts["smalltalk"]["parts"]["val"]["rows"] > 5


def test_no_held_out_headline_or_body_stands_in_the_training_text(sample):
    articles = {row["id"]: row["text"] for row in rows_of(sample / "inews", "train")}
    held_out = rows_of(sample / "inews_title", "test") + rows_of(sample / "inews_title", "val")
    assert not articles.keys() & {row["id"] for row in held_out}
    first_lines = {fingerprint(text.split("\n", 1)[0]) for text in articles.values()}
    bodies = {fingerprint(text.split("\n", 1)[1]) for text in articles.values()}
    assert not any(fingerprint(row["summary"]) in first_lines for row in held_out)
    assert not any(fingerprint(row["text"]) in bodies for row in held_out)


def test_pairs_and_documents_are_the_same_articles_in_the_same_parts(sample):
    for part in ("train", "val", "test"):
        documents = {row["id"]: row["text"] for row in rows_of(sample / "inews", part)}
        for row in rows_of(sample / "inews_title", part):
            assert documents[row["id"]] == f"{row['summary']}\n{row['text']}"


@pytest.mark.skipif(not CSL.is_dir(), reason="the published CSL files are not here")
def test_published_csl_files_keep_every_held_out_pair(tmp_path):
    counts = made("csl", tmp_path, raw=CSL, max_bad=0.01)
    assert counts["parts"]["val"]["rows"] == 1_000 + 250
    assert counts["parts"]["train"]["rows"] > 2_950
    quotes = sum(row["text"].count('"') + row["summary"].count('"')
                 for row in rows_of(tmp_path / "clean/csl", "val"))  # fmt: skip
    assert quotes >= 437


def test_a_pickle_of_another_shape_is_refused(tmp_path):
    for value in (17, [], (["a"], ["b", "c"], [0]), {"titles": []}):
        (tmp_path / "train.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(DataError, match="another layout"):
            list(data_sets("inews")[0].read(tmp_path, "utf-8-sig"))


def test_items_of_a_wrong_type_in_the_package_are_counted(tmp_path):
    for part in ("train", "dev", "test"):
        value = (["题目", 5], ["正\\n文", "正文"], [0, 1])
        (tmp_path / f"{part}.pkl").write_bytes(pickle.dumps(value))
    found = list(data_sets("inews")[0].read(tmp_path, "utf-8-sig"))
    assert [isinstance(item, Skip) for item in found] == [False, True] * 3
    assert found[0] == {"id": 0, "text": "正\n文", "summary": "题目"}
    assert os.fspath(tmp_path) not in str(found)
