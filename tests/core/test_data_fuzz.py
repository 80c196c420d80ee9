"""Damaged input of every kind: a file ends in counted drops or in one clear error, never else."""

# ruff: noqa: E501

import bz2
import gzip
import io
import json
import lzma
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import data_process.raw
from babyllama.config import REPO
from babyllama.errors import DataError
from data_process.pipeline import ProcessConfig, RawSet, make_clean
from data_process.registry import data_sets

READERS = ("text", "mnbvc", "wiki", "csl", "lcsts", "conversations", "belle", "redgpt", "naturalconv",
           "pclue", "deepctrl", "lccc", "c3", "squad", "llama_chinese", "lines")  # fmt: skip
TURNS = [
    {"from": "human", "value": "秋天叶子为什么变黄？"},
    {"from": "gpt", "value": "叶绿素少了。"},
]
ROWS = [
    {"text": "银杏是一种古老的树种，秋天叶子变黄，果实称为白果，现在广泛栽培。"},
    {"completion": "银杏是银杏科的落叶乔木，原产于中国，现在广泛栽培于各地。", "source": "x"},
    {"abst": "本文研究了银杏叶片变黄的过程，并分析了它与温度的关系。", "title": "银杏变黄的研究", "id": 1},
    {"问": "银杏什么时候变黄？", "答": "秋天，气温下降以后，叶绿素分解。", "来源": "x", "元数据": {"问题明细": ""}},
    {"段落": [{"行号": 0, "是否重复": False, "内容": "本市今日新增两条公交线路，明天开始试运行。"}]},
    {"conversations": TURNS},
    {"instruction": "给出两条建议。", "input": "", "output": "早睡早起，多喝水。", "history": [["问", "答"]]},
    {"reference": "银杏是树。", "dialogue": "Human: 银杏是什么？\nAssistant: 银杏是一种树。"},
    {"dialog_id": "0_1", "document_id": 0, "content": ["你好。", "你好，看球了吗？", "看了。", "不错。"]},
    {"input": "这句话的感情是：今天真好。答案：", "target": "积极", "answer_choices": ["积极", "消极"]},
]  # fmt: skip


def as_lines(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_zip(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside/rows.json", data)
    return buffer.getvalue()


def as_tar(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../../rows.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


FORMS: tuple[Callable[[list], bytes], ...] = (
    as_lines,
    lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    lambda rows: json.dumps({"data": rows}, indent=1, ensure_ascii=False).encode(),
    lambda rows: "".join(f"to title\t{row.get('text', '摘要')}\t题目\n" for row in rows).encode(),
    lambda rows: ("<doc id=0>\n    <summary>\n题目\n    </summary>\n    <short_text>\n正文在此\n"
                  "    </short_text>\n</doc>\n" * len(rows)).encode(),
    lambda rows: ("text\n" + "".join(f'"<s>Human: {n}\n</s><s>Assistant: 答\n</s>"\n'
                                     for n in range(len(rows)))).encode(),
)  # fmt: skip
PACKS = (bytes, bytes, bytes, gzip.compress, lzma.compress, bz2.compress, as_zip, as_tar)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data) + 1)]


def flip(data: bytes, chance: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.randint(1, 30)):
        spoilt[chance.randrange(len(spoilt))] = chance.randrange(256)
    return bytes(spoilt)


def insert(data: bytes, chance: random.Random) -> bytes:
    junk = chance.choice(
        [b"\0" * chance.randint(1, 3000), b"\\ud83d", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000,
         b'{"text": "a", "text": {"text": 1}}\n', chance.randbytes(500), b"\xef\xbb\xbf",
         "\u2028\x0b\r\x85".encode(), b'"', b"]", b"}\n{", b"<page><title>" * 50, b"<doc ", b"\x1a"]
    )  # fmt: skip
    at = chance.randrange(len(data) + 1)
    return data[:at] + junk + data[at:]


def shuffle(data: bytes, chance: random.Random) -> bytes:
    parts = data.split(b"\n")
    chance.shuffle(parts)
    return chance.choice([b"\n", b"\r\n", b"", b","]).join(parts)


def recode(data: bytes, chance: random.Random) -> bytes:
    text = data.decode("utf-8", "replace")
    return text.encode(chance.choice(["gb18030", "utf-16", "utf-32", "big5"]), "ignore")


def replace(data: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        [b"", b"\n" * 100, chance.randbytes(3000), data * 20, b"null", b"\xff" * 99]
    )


DAMAGE = (cut, flip, insert, insert, insert, shuffle, recode, replace)


def check(number: int, directory: Path) -> str:
    """Make a set from a damaged file; how it ended."""
    chance = random.Random(number)
    data = chance.choice(FORMS)([chance.choice(ROWS) for _ in range(chance.randint(1, 30))])
    pack = chance.choice(PACKS)
    if chance.random() < 0.7:
        data = pack(chance.choice(DAMAGE)(data, chance))
    else:
        data = chance.choice(DAMAGE)(pack(data), chance)
    raw = directory / chance.choice(
        ["train.json", "dialog_release.json", "rows.txt", "x", "test.gz"]
    )
    raw.write_bytes(data)
    data_set = data_sets(chance.choice(READERS), "fuzz")[0]
    cfg = ProcessConfig(out=directory / "out", max_bad=1.0)
    try:
        ((counts, _),) = make_clean([RawSet(data_set, raw, official=True)], cfg)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
        return "refused"
    finally:
        raw.unlink()
    n_dropped = sum(found["rows"] for found in counts["dropped"].values())
    assert counts["rows_in"] == counts["rows_out"] + n_dropped
    return "made"


@pytest.fixture
def small_jobs(monkeypatch):
    """Files of a few lines are cut too."""
    monkeypatch.setattr(data_process.raw, "JOB_BYTES", 1000)


@pytest.mark.parametrize("start", [0, 75])
def test_damaged_files_end_in_counted_drops_or_one_clear_line(start, tmp_path, small_jobs):
    ends = [check(number, tmp_path) for number in range(start, start + 75)]
    assert ends.count("made") > 10 and ends.count("refused") > 10


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_five_thousand_damaged_files(tmp_path, small_jobs):
    ends = [check(number, tmp_path) for number in range(5_000)]
    assert ends.count("made") > 500 and ends.count("refused") > 500


# Files that are small on the disk and large in memory, in a process that may not grow.

GOOD = as_lines([{"text": "银杏是一种古老的树种，秋天叶子变黄，果实称为白果。"}])
MADE = """
import sys
from pathlib import Path
from data_process.pipeline import ProcessConfig, RawSet, make_clean
from data_process.registry import data_sets
raw, out = map(Path, sys.argv[1:])
cfg = ProcessConfig(out=out, max_bad=1.0)
((counts, _),) = make_clean([RawSet(data_sets("text")[0], raw)], cfg)
peak = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
print(counts["rows_in"], counts["rows_out"], peak.split()[1])  # ru_maxrss begins with pytest's own
"""


def long_line(n_bytes: int) -> bytes:
    return GOOD + b'{"text": "' + b"a" * n_bytes + b'"}\n' + GOOD.replace("白果".encode(), b"x")


def bomb(n_bytes: int) -> bytes:
    return gzip.compress(long_line(n_bytes))


def unclosed_list(n_bytes: int) -> bytes:
    return b"[" + GOOD.strip() + b', {"text": "' + b"a" * n_bytes


def deep(n_bytes: int) -> bytes:
    return GOOD + b'{"a": [' * (n_bytes // 7) + b"\n" + GOOD


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("make", [long_line, bomb, unclosed_list, deep])
def test_a_hundred_megabytes_in_one_line_stay_below_a_gigabyte(make, tmp_path):
    raw = tmp_path / "raw.json"
    raw.write_bytes(make(100_000_000))
    command = [sys.executable, "-c", MADE, raw, tmp_path / "out"]
    done = subprocess.run([*map(str, command)], cwd=REPO, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    n_in, n_out, peak_kb = map(int, done.stdout.split())
    assert n_in in (2, 3) and n_out >= 1
    assert peak_kb < 2**20
