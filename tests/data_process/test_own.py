"""One's own files: every layout becomes the same rows, small sets have both parts, nothing is lost
in silence."""

import json
import zipfile
from pathlib import Path

import pandas
import pytest
import yaml

from babyllama.config import REPO
from babyllama.errors import DataError
from babyllama.rows import read_rows
from babyllama.token_file import TokenFile
from data_process import own
from data_process.own import prepare

PAIRS = [(f"第{n}个问题是什么？", f"这是第{n}个回答，请记住它。") for n in range(12)]
HEADS = {  # the keys of a question and its answer
    "alpaca": ("instruction", "output"), "qa": ("question", "answer"), "zh": ("问题", "答案"),
    "prompt": ("prompt", "response"),
}  # fmt: skip


def json_lines(keys: tuple[str, str]) -> str:
    rows = (dict(zip(keys, pair, strict=True)) for pair in PAIRS)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def messages() -> str:
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    return json.dumps(rows, ensure_ascii=False)


def table(delimiter: str, keys: tuple[str, str] = ("问题", "答案")) -> str:
    return "\n".join(delimiter.join(row) for row in [keys, *PAIRS])


def write_xlsx(path: Path, rows: list[tuple[str, ...]]) -> None:
    """A workbook as Excel writes it: texts in a table of their own, empty cells left out."""
    texts = [text for row in rows for text in row]
    cells = iter(range(len(texts)))
    lines = "".join(
        f'<row r="{n}">'
        + "".join(f'<c r="{at}{n}" t="s"><v>{next(cells)}</v></c>' for at in "AB"[: len(row)])
        + "</row>"
        for n, row in enumerate(rows, 1)
    )  # fmt: skip
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        sheet = f"<worksheet {space}><sheetData>{lines}</sheetData></worksheet>"
        archive.writestr("xl/worksheets/sheet1.xml", sheet)


def write_docx(path: Path, paragraphs: list[str]) -> None:
    space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        document = f"<w:document {space}><w:body>{body}</w:body></w:document>"
        archive.writestr("word/document.xml", document)


@pytest.fixture
def made(tmp_path, tokenizer, monkeypatch):
    """Prepares a file or folder below tmp_path; its report, and all rows by part."""
    monkeypatch.setattr(own, "REPO", tmp_path)

    def call(place: Path, purpose: str = "dialogue", answer: bool = True):
        asked = []

        def ask(question: str) -> bool:
            asked.append(question)
            return answer

        found = prepare(place, purpose, tokenizer, ask)
        folder = Path(found.place)
        folder = folder if folder.is_absolute() else REPO / folder
        rows = {part: list(read_rows(folder / f"{part}-00000.jsonl")) for part in ("train", "val")}
        for part, some in rows.items():  # what trains is what was written
            assert TokenFile(folder / f"{part}-00000", tokenizer.fingerprint).n_docs == len(some)
        return found, rows, asked

    return call


def pairs_of(rows: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    return sorted(
        tuple(message["content"] for message in row["messages"])
        for part in rows.values() for row in part
    )  # fmt: skip


FILES = {
    **{f"{name}.jsonl": json_lines(keys) for name, keys in HEADS.items()},
    "messages.json": messages(),
    "comma.csv": table(","),
    "semicolon.csv": table(";"),
    "tab.tsv": table("\t"),
    "labels.txt": "\n".join(f"问：{q}\n答：{a}" for q, a in PAIRS),
    "blocks.txt": "\n\n".join(f"User: {q}\nAssistant: {a}" for q, a in PAIRS),
    "unknown.csv": table(",", ("甲方", "乙方")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_layout_of_dialogues_gives_the_same_rows(tmp_path, made, name):
    (tmp_path / name).write_text(FILES[name], "utf-8")
    found, rows, asked = made(tmp_path / name)
    assert pairs_of(rows) == sorted(PAIRS)
    assert (len(rows["train"]), len(rows["val"])) == (11, 1)
    assert not found.left_out and bool(asked) == (name == "unknown.csv")
    assert "人类：" in found.example and "【这是第" in found.example


def test_a_workbook_is_read_as_the_table_that_it_is(tmp_path, made):
    write_xlsx(tmp_path / "问答.xlsx", [("问题", "答案"), *PAIRS])
    found, rows, _ = made(tmp_path / "问答.xlsx")
    assert pairs_of(rows) == sorted(PAIRS) and found.name == "问答"


def test_the_row_numbers_of_pandas_are_no_text(tmp_path, made):
    pandas.DataFrame(PAIRS, columns=["问题", "答案"]).to_csv(tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text("utf-8").startswith(",问题,答案\n0,")
    found, rows, asked = made(tmp_path / "a.csv")
    assert pairs_of(rows) == sorted(PAIRS) and not asked and not found.left_out


@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030", "utf-16"])
def test_files_of_windows_programs_are_read(tmp_path, made, encoding):
    (tmp_path / "a.csv").write_text(table(","), encoding)
    assert pairs_of(made(tmp_path / "a.csv")[1]) == sorted(PAIRS)


def test_two_columns_the_wrong_way_round_are_turned(tmp_path, made):
    (tmp_path / "a.csv").write_text(FILES["unknown.csv"], "utf-8")
    _, rows, asked = made(tmp_path / "a.csv", answer=False)
    assert pairs_of(rows) == sorted((a, q) for q, a in PAIRS) and "甲方" in asked[0]


def test_titles_are_rows_of_text_and_summary(tmp_path, made):
    texts = [{"title": f"标题{n}", "content": f"这是第{n}篇文章的正文，" * 3} for n in range(8)]
    (tmp_path / "t.json").write_text(json.dumps(texts, ensure_ascii=False), "utf-8")
    found, rows, _ = made(tmp_path / "t.json")
    assert found.kind == "summary" and "→【标题" in found.example
    assert {row["summary"] for part in rows.values() for row in part} == {t["title"] for t in texts}


@pytest.mark.parametrize("n", [2, 3, 12, 40, 1000])
def test_a_set_of_any_size_has_rows_to_check_with(tmp_path, made, n):
    rows = [{"question": f"问题 {i} 吗？", "answer": f"回答 {i}。"} for i in range(n)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    _, parts, _ = made(tmp_path / "a.json")
    assert len(parts["val"]) == max(1, round(n / 20)) and len(parts["train"]) == n - len(
        parts["val"]
    )


def test_one_row_alone_is_refused(tmp_path, made):
    (tmp_path / "a.json").write_text('[{"question": "一？", "answer": "一。"}]', "utf-8")
    with pytest.raises(DataError, match="two rows at least"):
        made(tmp_path / "a.json")


def test_rows_stay_in_their_part_when_others_come(tmp_path, made):
    (tmp_path / "a.jsonl").write_text(json_lines(("q", "a")), "utf-8")
    before, _, _ = made(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(
        json_lines(("q", "a")) + '{"q": "新的？", "a": "新的。"}\n', "utf-8"
    )
    after, second, _ = made(tmp_path / "a.jsonl")
    assert before.place != after.place  # a run that reads the first set can be continued
    assert len(second["train"]) == 12 and len(second["val"]) == 1


def test_parts_that_the_files_name_are_kept_and_a_test_part_is_left_alone(tmp_path, made):
    for part, some in (("train", PAIRS[:6]), ("dev", PAIRS[6:8]), ("test", PAIRS[8:])):
        rows = [{"question": q, "answer": a} for q, a in some]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / f"set/{part}.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    found, rows, _ = made(tmp_path / "set")
    assert (len(rows["train"]), len(rows["val"]), found.left_out) == (6, 2, {"test_part": 4})


def test_a_file_called_test_is_asked_about(tmp_path, made):
    (tmp_path / "test.jsonl").write_text(json_lines(("question", "answer")), "utf-8")
    _, rows, asked = made(tmp_path / "test.jsonl")
    assert "test.jsonl" in asked[0] and pairs_of(rows) == sorted(PAIRS)
    (tmp_path / "test.txt").write_text("\n".join(LINES), "utf-8")
    assert made(tmp_path / "test.txt", "text")[1]["train"]
    (tmp_path / "test.jsonl").write_text(json_lines(("prompt", "response")), "utf-8")
    with pytest.raises(DataError, match="left alone"):
        made(tmp_path / "test.jsonl", answer=False)


def test_what_cannot_train_is_counted_by_reason(tmp_path, made):
    text = json_lines(("question", "answer")) + json.dumps({"question": "空", "answer": " "}) + "\n"
    (tmp_path / "a.jsonl").write_text(text + text.splitlines()[0] + "\n{broken\n", "utf-8")
    found, rows, _ = made(tmp_path / "a.jsonl")
    assert pairs_of(rows) == sorted(PAIRS)
    assert sum(found.left_out.values()) == 3 and found.left_out["duplicate"] == 1
    assert any("duplicate 1" in line for line in found.lines())


def test_one_system_text_for_all_rows_is_left_out_and_different_ones_are_kept(tmp_path, made):
    def rows(system):
        return [
            {"system": system(n), "instruction": q, "output": a} for n, (q, a) in enumerate(PAIRS)
        ]

    for name, system, n_messages in (
        ("a", lambda n: "你是助手", 2),
        ("b", lambda n: f"资料{n}", 3),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(rows(system), ensure_ascii=False), "utf-8")
        found, parts, _ = made(path)
        assert {len(row["messages"]) for part in parts.values() for row in part} == {n_messages}
        assert ("system text" in found.layout) == (n_messages == 2)


LINES = [f"十月{n % 30}日，晴。今天去了第{n}个地方，看见许多人，也写了一些字。" for n in range(200)]


def write_diary(tmp_path: Path, kind: str) -> Path:
    if kind == "docx":
        write_docx(tmp_path / "diary.docx", LINES)
    elif kind == "folder":
        (tmp_path / "diary").mkdir()
        for n in range(4):
            (tmp_path / f"diary/{n}.txt").write_text(
                "\n".join(LINES[n * 50 : n * 50 + 50]), "gb18030"
            )
        return tmp_path / "diary"
    elif kind == "jsonl":
        rows = (json.dumps({"text": line}, ensure_ascii=False) for line in LINES)
        (tmp_path / "diary.jsonl").write_text("\n".join(rows), "utf-8")
    else:
        (tmp_path / f"diary.{kind}").write_text("\n".join(LINES), "utf-8")
    return tmp_path / f"diary.{kind}"


@pytest.mark.parametrize("kind", ["txt", "md", "docx", "jsonl", "folder"])
def test_every_kind_of_text_keeps_each_line_once(tmp_path, made, kind):
    _, rows, _ = made(write_diary(tmp_path, kind), "text")
    lines = [line for part in rows.values() for row in part for line in row["text"].split("\n")]
    assert sorted(lines) == sorted(LINES) and rows["val"]
    assert len(rows["val"]) <= 0.06 * sum(map(len, rows.values())) + 1


def test_data_for_the_other_script_names_its_command(tmp_path, made):
    (tmp_path / "diary.txt").write_text("\n".join(LINES), "utf-8")
    (tmp_path / "talk.jsonl").write_text(json_lines(("instruction", "output")), "utf-8")
    with pytest.raises(DataError, match=r"python pretrain\.py --text \S*diary\.txt"):
        made(tmp_path / "diary.txt")
    with pytest.raises(DataError, match=r"python sft\.py --rows \S*talk\.jsonl"):
        made(tmp_path / "talk.jsonl", "text")


def test_a_missing_file_is_answered_with_the_one_that_was_meant(tmp_path, made):
    (tmp_path / "my.jsonl").write_text(json_lines(("q", "a")), "utf-8")
    with pytest.raises(DataError, match=r"did you mean my\.jsonl"):
        made(tmp_path / "my.josnl")


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"x": 1, "y": 2, "z": 3}\n', "x, y, z"),
        ("a.bin", b"\x89PNG\r\n\x1a\n" + bytes(100), "another kind"),
        ("a.xlsx", b"PK\x03\x04 cut", "cut or damaged"),
        ("a.csv", b"a,,b\n1,2,3\n", "first row names the columns"),
        ("a.json", b'{"data": []}', "no entry"),
    ],
)
def test_files_that_are_something_else_are_named(tmp_path, made, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        made(tmp_path / name)


@pytest.mark.parametrize("n", [2, 12, 50, 500, 20_000, 10**6])
@pytest.mark.parametrize("kind", ["chat", "text"])
def test_settings_end_their_warm_up_and_see_every_row(tmp_path, monkeypatch, tokenizer, n, kind):
    monkeypatch.setattr(own, "REPO", tmp_path)
    (tmp_path / "data").mkdir()
    counts = {"rows": n, "tokens": 30 * n}
    found = own.OwnData("a", "data", kind, "", {"train": counts, "val": counts}, {}, "", [])

    class Shape:
        n_parameters, max_seq_len = 14_000_000, 512

    path = own.write_settings(found, tmp_path / "release", Shape(), Path("x.model"), None)
    settings = yaml.safe_load(path.read_text("utf-8"))
    train, optim = settings["train"], settings["optim"]
    rows = n if kind == "chat" else max(1, 30 * n // settings["data"]["max_seq_len"])
    assert train["max_steps"] * train["batch_size"] >= 0.9 * rows
    assert optim["warmup_steps"] <= 0.1 * train["max_steps"] and 0 < optim["lr"] <= 1e-3
    assert train["eval_every"] <= train["max_steps"] and train["log_every"] <= train["max_steps"]


def test_another_set_or_base_takes_another_name_and_the_same_one_is_continued(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(own, "REPO", tmp_path)
    found = own.OwnData("my", "data/own/my-1", "chat", "", {}, {}, "", [])
    assert own._free_name(found, "release") == "my"
    (tmp_path / "out/my").mkdir(parents=True)
    config = "base: release\ndata:\n  sources:\n  - name: data/own/my-1\n"
    (tmp_path / "out/my/config.yaml").write_text(config)
    assert own._free_name(found, "release") == "my"
    assert own._free_name(found, "out/wiki") == "my-2"
    found.place = "data/own/my-2"
    assert own._free_name(found, "release") == "my-2"
