"""Rows that hold evaluation text: the windows, the two ways to look for them, lists and files."""

import csv
import json
import lzma
import random
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.config import REPO
from babyllama.errors import ConfigError, DataError
from data_process.decontaminate import (
    COMMON,
    WINDOW,
    ListConfig,
    Windows,
    flag_shard,
    hits,
    load_windows,
    main,
    make_windows,
    read_list,
    windows_of,
)
from data_process.dedup import BATCH_BYTES, drops_path, load_drops

HAN = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
KEPT_OUT = REPO / ".." / "shared" / "data" / "kept_out_ngrams.u64"


def random_texts(n: int, length: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(HAN, k=length)) for _ in range(n)]


def numbers_of(text: str) -> set[int]:
    """The definition, by Python's own means."""
    text = "".join(text.split()).lower()
    windows = {text[n : n + 13].encode() for n in range(len(text) - 12)}
    digests = (int.from_bytes(blake2b(w, digest_size=8).digest(), "little") for w in windows)
    return {number for number in digests if number % 8 == 0}


def with_windows(n: int, seed: int = 0) -> str:
    """A text that has just n kept windows."""
    return next(t for t in random_texts(10_000, 20, seed) if len(numbers_of(t)) == n)


def windows_in(*lists: list[str], known: bool = True) -> Windows:
    """Windows of some lists of texts; the texts known, or only the numbers."""
    found = [windows_of(texts) for texts in lists]
    rolling = np.concatenate([hashes for _, hashes, _ in found]) if known else None
    names = tuple(f"list {n}" for n in range(len(lists)))
    return Windows(names, tuple(numbers for numbers, _, _ in found), rolling)


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path


TEXT = st.text("天地玄黄宇宙 \n\tAaÉ😀", max_size=60)


# Windows.


@given(texts=st.lists(TEXT, max_size=6))
def test_the_numbers_are_those_of_the_definition(texts):
    wanted = set().union(*map(numbers_of, texts))
    assert windows_of(texts)[0].tolist() == sorted(wanted)


@settings(deadline=None)
@given(st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5), st.lists(TEXT, max_size=5))
def test_hits_are_counted_as_the_definition_says_with_and_without_the_texts(one, two, texts):
    # Some of the texts are made of evaluation text, as leaks are.
    texts = texts + [f"前言{text}后语" for text in one] + ["".join(two)]
    lists = [set().union(*map(numbers_of, evaluation)) for evaluation in (one, two)]
    wanted = [[len(numbers_of(text) & numbers) for numbers in lists] for text in texts]
    for known in (True, False):
        assert hits(texts, windows_in(one, two, known=known)).tolist() == wanted


def test_space_and_case_hide_nothing_and_one_window_counts_once():
    text = with_windows(1)[:-1] + "A"
    while len(numbers_of(text)) != 1:
        text = text[1:] + random.Random(len(text)).choice(HAN)
    windows = windows_in([text])
    shown = [text, f" {text[:5]}\n\u3000{text[5:]}".swapcase(), text * 3, text[:12], ""]
    assert hits(shown, windows)[:, 0].tolist() == [1, 1, 1, 0, 0]


def test_texts_do_not_run_into_each_other():
    (text,) = random_texts(1, 200)
    parts = [text[n : n + 12] for n in range(0, 200, 12)]
    for known in (True, False):
        assert not hits(parts, windows_in([text], known=known)).any()


def test_a_text_is_protected_by_two_windows_and_short_ones_are_counted():
    texts = [with_windows(0), with_windows(1), with_windows(2), "短" * 12, "短" * 12, " ", ""]
    numbers, hashes, note = windows_of(texts)
    assert (note["texts"], note["too_short"], note["protected"]) == (4, 1, 1)
    assert len(numbers) == len(hashes) == note["windows"] == 3


def test_wording_that_many_texts_share_is_left_out_but_not_a_text_that_repeats():
    (wording,), texts = random_texts(1, 60), random_texts(COMMON + 1, 60, seed=1)
    assert numbers_of(wording)
    framed = [wording + text for text in texts]
    numbers, _, note = windows_of(framed)
    assert not numbers_of(wording) & set(numbers.tolist())
    assert note["wording"] == len(numbers_of(wording))
    assert set().union(*map(numbers_of, texts)) <= set(numbers.tolist())
    assert windows_of(framed[:COMMON])[2]["wording"] == 0
    assert windows_of([wording] * 100)[2]["wording"] == 0


def test_saved_windows_are_the_same_windows(tmp_path):
    for known in (True, False):
        windows = windows_in(random_texts(5, 50), random_texts(5, 50, 1), known=known)
        windows.save(tmp_path / f"{known}.npz")
        again = load_windows(tmp_path / f"{known}.npz")
        assert again.names == windows.names and (again.rolling is None) == (not known)
        assert all(map(np.array_equal, again.lists, windows.lists))


# Rows.


@pytest.mark.parametrize("known", [True, False])
def test_the_rows_that_leak_are_flagged_whatever_shard_they_stand_in(known, tmp_path):
    evaluation, training = random_texts(30, 100), random_texts(300, 100, seed=1)
    windows_in(evaluation[:20], evaluation[20:], known=known).save(tmp_path / "w.npz")
    rows = [{"id": n, "text": text} for n, text in enumerate(training)]
    rows[7] = {"id": 7, "text": training[7] + evaluation[3]}
    rows[8] = {"id": 8, "text": training[8], "summary": evaluation[25][:80]}
    rows[9] = {"id": 9, "messages": [{"role": "user", "content": evaluation[4]}]}
    rows[10] = {"id": 10, "text": evaluation[5], "split": "test"}
    rows[250] = {"id": 250, "text": evaluation[6] + "x" * (BATCH_BYTES if known else 9)}
    rows[290] = {"id": 290, "text": evaluation[7]}
    rows[299] = {"id": 299, "text": with_windows(1, seed=2)}
    wanted = {7: "list 0", 8: "list 1", 9: "list 0", 250: "list 0", 290: "list 0"}
    for n_shards in (1, 3):
        found = {}
        for shard in range(n_shards):
            part = rows[300 * shard // n_shards : 300 * (shard + 1) // n_shards]
            source = write_rows(tmp_path / f"{shard}.jsonl", part)
            counts = flag_shard(source, tmp_path / f"f{shard}", tmp_path / "w.npz")
            flags = load_drops(drops_path(tmp_path / f"f{shard}"))
            assert counts == {"rows": len(part), "leaks": len(flags), "files": [f"f{shard}-00000.jsonl"]}  # fmt: skip  # noqa: E501
            found |= {300 * shard // n_shards + n: why for n, why in flags.items()}
        assert {n: remark.split(" of ")[1][:-1] for n, (_, remark) in found.items()} == wanted
        assert {reason for reason, _ in found.values()} == {"leak"}


def test_two_windows_of_one_list_are_a_leak_and_one_of_each_of_two_is_none(tmp_path):
    one, two, other = with_windows(1), with_windows(2, seed=1), with_windows(1, seed=2)
    windows_in([one, two], [other]).save(tmp_path / "w.npz")
    texts = [one, two, f"{one}，{other}", f"{one}，{two}"]
    source = write_rows(tmp_path / "a.jsonl", [{"id": n, "text": t} for n, t in enumerate(texts)])
    flag_shard(source, tmp_path / "a", tmp_path / "w.npz")
    assert list(load_drops(drops_path(tmp_path / "a"))) == [1, 3]


def test_a_line_that_is_no_row_is_named(tmp_path):
    windows_in(random_texts(3, 50)).save(tmp_path / "w.npz")
    for line in ("{", '"a"', '{"id": 1, "text": 5}'):
        (tmp_path / "a.jsonl").write_text('{"id": 0, "text": "一"}\n' + line, encoding="utf-8")
        with pytest.raises(DataError, match=r"a\.jsonl:2: wanted a canonical row"):
            flag_shard(tmp_path / "a.jsonl", tmp_path / "a", tmp_path / "w.npz")


# What must not be trained on.


def evaluation_files(directory: Path, texts: list[str]) -> list[Path]:
    """The same texts, two to an entry, in all kinds of files."""
    two = list(zip(texts[::2], texts[1::2], strict=True))
    rows = [{"id": n, "question": a, "choices": [{"label": "A", "text": b}]} for n, (a, b) in enumerate(two)]  # fmt: skip  # noqa: E501
    write_rows(directory / "a.jsonl", rows)
    (directory / "b.json").write_text(json.dumps({"data": rows}, indent=1), encoding="utf-8")
    (directory / "c.json").write_text(json.dumps([[[a], [b, 5]] for a, b in two]), encoding="utf-8")
    with open(directory / "d.csv", "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows(two)
    (directory / "e.tsv").write_text("\n".join(map("\t".join, two)), encoding="utf-8")
    (directory / "f.tsv.xz").write_bytes(lzma.compress((directory / "e.tsv").read_bytes()))
    return sorted(directory.iterdir())


def test_every_text_of_every_kind_of_file_is_protected(tmp_path):
    texts = random_texts(20, 60)
    texts[3] = texts[3][:30] + ',"' + texts[3][30:]
    wanted = windows_of(texts)[0].tolist()
    for path in evaluation_files(tmp_path, texts):
        windows = load_windows(make_windows([path], [], tmp_path / "w")[0])
        assert windows.lists[0].tolist() == wanted, path.name


def test_the_command_writes_a_list_that_finds_what_the_texts_find(tmp_path):
    evaluation, training = random_texts(20, 60), random_texts(20, 60, seed=1)
    training[3] += evaluation[5]
    files = evaluation_files(tmp_path, evaluation)
    out = tmp_path / "list.u64"
    command = [sys.executable, "-m", "data_process.decontaminate", *files, "--out", out]
    done = subprocess.run(list(map(str, command)), cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "texts" in done.stdout and "too_short" in done.stdout and "list.u64" in done.stdout
    assert out.read_bytes() == windows_of(evaluation)[0].astype("<u8").tobytes()
    both = [load_windows(make_windows([path], [], tmp_path / "w")[0]) for path in (files[0], out)]
    assert (hits(training, both[0]) == hits(training, both[1])).all()
    assert np.flatnonzero(hits(training, both[0])[:, 0] >= 2).tolist() == [3]


def test_lists_files_and_held_out_rows_are_searched_for_together(tmp_path):
    listed, filed, held, training = (random_texts(6, 60, seed) for seed in range(4))
    main(ListConfig((write_rows(tmp_path / "a.jsonl", [{"t": t} for t in listed]),), tmp_path / "a.u64"))  # fmt: skip  # noqa: E501
    evaluation = [tmp_path / "a.u64", write_rows(tmp_path / "b.jsonl", [{"t": t} for t in filed])]
    rows = [{"id": n, "text": text, "split": "test"} for n, text in enumerate(held)]
    rows += [{"id": n, "text": text} for n, text in enumerate(training)]
    shard = write_rows(tmp_path / "c.jsonl", rows)
    path, notes = make_windows(evaluation, [shard], tmp_path / "w")
    found = hits([*listed, *filed, *held, *training], load_windows(path)) >= 2
    assert found.sum(axis=0).tolist() == [6, 6, 6]
    assert (found.argmax(axis=1)[:18] == np.repeat([0, 1, 2], 6)).all() and not found[18:].any()
    assert [note["windows"] for note in notes.values()] == [len(n) for n in load_windows(path).lists]  # fmt: skip  # noqa: E501


def test_the_name_of_the_windows_stands_for_their_content(tmp_path):
    one = write_rows(tmp_path / "a.jsonl", [{"t": t} for t in random_texts(5, 60)])
    first = make_windows([one], [], tmp_path / "w")
    assert make_windows([one], [], tmp_path / "w") == first
    write_rows(one, [{"t": t} for t in random_texts(5, 60, seed=1)])
    assert make_windows([one], [], tmp_path / "w") != first
    nothing = write_rows(tmp_path / "b.jsonl", [{"id": 1, "text": "训练"}])
    assert make_windows([], [nothing], tmp_path / "w") is None


@pytest.mark.parametrize("numbers", [[], [16, 8], [8, 8], [8, 9]])
def test_a_file_that_is_no_list_is_refused(numbers, tmp_path):
    path = tmp_path / "a.u64"
    np.array(numbers, "<u8").tofile(path)
    with pytest.raises(DataError, match="wanted ascending 8-byte numbers"):
        read_list(path)
    path.write_bytes(bytes(12))
    with pytest.raises(DataError, match="wanted ascending 8-byte numbers"):
        read_list(path)


def test_a_command_that_cannot_work_is_refused(tmp_path):
    some = write_rows(tmp_path / "a.jsonl", [{"t": "短"}])
    with pytest.raises(ConfigError, match="found 0 files"):
        main(ListConfig((), tmp_path / "a.u64"))
    with pytest.raises(ConfigError, match=r"found 1 files and --out .*a\.txt"):
        main(ListConfig((some,), tmp_path / "a.txt"))
    with pytest.raises(ConfigError, match=r"found no .*b\.jsonl"):
        main(ListConfig((some, tmp_path / "b.jsonl"), tmp_path / "a.u64"))
    with pytest.raises(DataError, match="found none in 2 texts"):
        main(ListConfig((some,), tmp_path / "a.u64"))
    assert not (tmp_path / "a.u64").exists()


@pytest.mark.skipif(not KEPT_OUT.is_file(), reason="needs the try-out data")
def test_a_published_list_is_read_and_other_text_hits_it_rarely():
    numbers = read_list(KEPT_OUT)
    windows = Windows(("kept out",), (numbers,), None)
    path = KEPT_OUT.parent / "csl" / "benchmark" / "ts" / "dev.tsv"
    texts = [line.split("\t")[1] for line in path.read_text(encoding="utf-8").split("\n")[:300]]
    assert len(numbers) > 80_000 and all(len(text) > WINDOW for text in texts)
    assert 0 < (hits(texts, windows) >= 1).sum() < 0.05 * len(texts)
