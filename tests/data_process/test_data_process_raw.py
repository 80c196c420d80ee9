"""Raw files are opened by their bytes; damage costs a line, never the run."""

import gzip
import io
import json
import lzma
import pickle
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

from babyllama.errors import DataError
from data_process.columns import known
from data_process.datasets.packages import read_pickle
from data_process.raw import Record, Skip, records, sorted_files, split_of
from data_process.registry import package_dir

FIXTURES = Path(__file__).parents[1] / "fixtures" / "raw"
ROWS = [{"text": f"第{n}行：天气晴，风向东\u2028\x0b。"} for n in range(40)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def read(path: Path, encoding: str = "utf-8-sig") -> list[Record | Skip]:
    return list(records(path, encoding, columns=known()))


def data_of(path: Path, encoding: str = "utf-8-sig") -> list:
    return [item.data for item in read(path, encoding) if isinstance(item, Record)]


def reasons(path: Path) -> list[str]:
    return [item.reason for item in read(path) if isinstance(item, Skip)]


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("__MACOSX/x.json", "junk")
        archive.writestr("inner/rows.json", data)
    return buffer.getvalue()


LAYOUTS = {
    "lines": LINES.encode(),
    "no last newline": LINES.rstrip("\n").encode(),
    "crlf": LINES.replace("\n", "\r\n").encode(),
    "bom": b"\xef\xbb\xbf" + LINES.encode(),
    "list": json.dumps(ROWS).encode(),
    "list over lines": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "wrapped": json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "gzip": gzip.compress(LINES.encode()),
    "xz": lzma.compress(LINES.encode()),
    "zip": zipped(LINES.encode()),
    "gzip in zip": zipped(gzip.compress(json.dumps(ROWS).encode())),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found_in_the_bytes_whatever_the_name(layout, tmp_path):
    assert data_of(write(tmp_path / "rows.bin", LAYOUTS[layout])) == ROWS


@pytest.mark.parametrize("n_rows", [1, 3, 40])
@pytest.mark.parametrize(("encoding", "likely"), [("gb18030", "gb18030"), ("utf-16", "utf-16"),
                                                  ("utf-16-le", "utf-16")])  # fmt: skip
def test_another_encoding_is_named_and_accepted_on_request(n_rows, encoding, likely, tmp_path):
    text = "\n".join(LINES.split("\n")[:n_rows])
    path = write(tmp_path / "rows.jsonl", text.encode(encoding))
    with pytest.raises(DataError, match=rf"rows\.jsonl.*--encoding {likely}"):
        read(path)
    assert data_of(path, encoding) == ROWS[:n_rows]


BAD_LINES = {
    "broken_json": ['{"text": "断', "", "{]"],
    "not_an_object": ['"x"', "17", "null"],
    "lone_surrogate": ['{"text": "\\ud83d"}', '{"a": [{"b": "x\\udc00"}]}'],
    "too_deep": ['{"a": ' * 100_000, "[" * 100_000],
}


@pytest.mark.parametrize(("reason", "line"), [(r, x) for r in BAD_LINES for x in BAD_LINES[r] if x])
def test_a_bad_line_costs_itself_alone(reason, line, tmp_path):
    path = write(tmp_path / "rows.jsonl", LINES + line + "\n" + LINES)
    assert data_of(path) == ROWS + ROWS
    (skip,) = [item for item in read(path) if isinstance(item, Skip)]
    assert (skip.reason, skip.where, skip.broken) == (reason, "rows.jsonl:41", True)


def test_a_huge_integer_costs_one_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", LINES + '{"n": ' + "9" * 5000 + "}\n" + LINES)
    assert data_of(path) == ROWS + ROWS
    assert reasons(path) == ["broken_json"]


def test_a_download_cut_inside_a_character_costs_the_last_line(tmp_path):
    whole = LINES.encode()
    path = write(tmp_path / "rows.jsonl", whole[: whole.rindex("晴".encode()) + 2])
    assert data_of(path) == ROWS[:-1]
    assert reasons(path) == ["bad_bytes"]


def test_a_cut_list_keeps_what_stands_before_the_cut(tmp_path):
    whole = json.dumps(ROWS, ensure_ascii=False).encode()
    path = write(tmp_path / "rows.json", whole[:-30])
    assert data_of(path) == ROWS[:-1]
    assert len(reasons(path)) == 1


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zipped])
def test_a_cut_archive_is_named(pack, tmp_path):
    noise = random.Random(0).randbytes(20_000).hex()
    packed = pack(json.dumps({"text": noise}).encode())
    with pytest.raises(DataError, match=r"rows\.gz.*download it again"):
        read(write(tmp_path / "rows.gz", packed[: len(packed) // 2]))


def test_damaged_parquet_is_named(tmp_path):
    with pytest.raises(DataError, match=r"rows\.parquet.*parquet"):
        read(write(tmp_path / "rows.parquet", b"PAR1\x00\x00PAR1"))


def test_other_text_comes_line_by_line_and_keeps_quotes_and_tabs(tmp_path):
    lines = ['to title\t"一个引号\t题目', "[转载]题目\t正文", "a\x0bb\x1cc\x85d\re"]
    assert data_of(write(tmp_path / "x.tsv", "\n".join(lines) + "\n")) == lines


def test_a_markdown_file_is_one_document_whatever_it_begins_with(tmp_path):
    write(tmp_path / "a" / "law.md", "# 题\n\n第一条\n第二条\n")
    write(tmp_path / "b.md", '{"text": "不是 JSON 行"}\n')
    write(tmp_path / "README.md", "说明")
    write(tmp_path / "empty.md", " \n")
    write(tmp_path / "bad.md", "第一条".encode() * 50 + b"\xff")
    found = read(tmp_path)
    assert [item.data["path"] for item in found if isinstance(item, Record)] == ["a/law.md", "b.md"]
    assert found[0].data["text"] == "# 题\n\n第一条\n第二条\n"
    assert [item.reason for item in found if isinstance(item, Skip)] == ["bad_bytes"]


def test_files_are_walked_held_out_parts_first_and_numbered_on(tmp_path):
    for name in ("train.json", "b/dev.json", "test_2k.json", "README.md", ".hidden", "LICENSE",
                 "dataset_infos.json"):  # fmt: skip
        write(tmp_path / name, '{"text": "一"}\n{"text": "二"}\n')
    found = read(tmp_path)
    assert [item.n for item in found] == list(range(6))
    assert [item.split for item in found] == ["test"] * 2 + ["val"] * 2 + ["train"] * 2


def test_an_empty_directory_says_so(tmp_path):
    with pytest.raises(DataError, match="wanted data files, found none"):
        sorted_files(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [("csl_title_dev.json", "val"), ("train_3k.jsonl.xz", "train"), ("valid_1k.jsonl", "val"),
     ("TEST.tsv", "test"), ("contest.json", None), ("latest.json", None)],
)  # fmt: skip
def test_the_split_is_a_whole_word_of_the_file_name(name, split):
    assert split_of(name) == split


class Evil:
    def __reduce__(self):
        return (print, ("this must not run",))


@pytest.mark.parametrize("value", [Evil(), [Evil()], Path("x"), {1, 2, Ellipsis}])
def test_a_pickle_with_a_global_is_refused(value, tmp_path, capsys):
    path = write(tmp_path / "train.pkl", pickle.dumps(value))
    with pytest.raises(DataError, match="could run code"):
        read_pickle(path)
    assert capsys.readouterr().out == ""


def test_a_damaged_pickle_is_a_data_error_and_a_plain_one_is_read(tmp_path):
    value = (["题目"], ["正文"], [1])
    data = pickle.dumps(value)
    assert read_pickle(write(tmp_path / "x.pkl", data)) == value
    for cut in range(len(data)):
        with pytest.raises(DataError):
            read_pickle(write(tmp_path / "x.pkl", data[:cut]))


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(DataError, match=r"pip install no-such-package==1\.0"):
        package_dir("no-such-package==1.0", "no_such_package", "")


def mutate(line: bytes, chance: random.Random) -> bytes:
    """A line with one to three random edits of its bytes."""
    line = bytearray(line)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(line) + 1)
        edit = chance.randrange(4)
        if edit == 0:
            line[at : at + 1] = chance.randbytes(1)
        elif edit == 1:
            del line[at : at + chance.randint(1, 8)]
        elif edit == 2:
            line[at:at] = chance.choice([b"\\ud800", b"{", b"[", b'"', b"\\", b"\xff", b"\0", b"9"])
        else:
            del line[at:]
    return bytes(line).replace(b"\n", b" ")


def check_mutated_lines(n_lines: int, tmp_path: Path) -> None:
    chance = random.Random(n_lines)
    good = LINES.encode().split(b"\n")[:-1]
    mixed = [good[0]]
    for n in range(n_lines):
        mixed += [mutate(good[n % 40], chance), good[(n + 1) % 40]]
    found = data_of(write(tmp_path / "rows.jsonl", b"\n".join(mixed)))
    rest = iter(found)
    wanted = [ROWS[0]] + [ROWS[(n + 1) % 40] for n in range(n_lines)]
    assert all(row in rest for row in wanted), "a good line was lost"


def test_mutated_lines_never_cost_a_good_one(tmp_path):
    check_mutated_lines(2_000, tmp_path)


@pytest.mark.slow
def test_many_mutated_lines_never_cost_a_good_one(tmp_path):
    check_mutated_lines(200_000, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mutated_file_is_read_or_refused(layout, tmp_path):
    chance = random.Random(layout)
    for _ in range(25):
        path = write(tmp_path / "rows.bin", mutate(LAYOUTS[layout], chance))
        with suppress(DataError):
            assert all(isinstance(item, Record | Skip) for item in read(path))
