"""Files as people really have them: what is read and named, and that nothing is lost unsaid."""

import bz2
import gzip
import io
import json
import lzma
import shlex
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from test_own import write_docx, write_xlsx

from babyllama.config import lock
from babyllama.errors import ConfigError, DataError
from babyllama.language.letters import plain
from babyllama.rows import read_rows
from data_process.clean import fix
from data_process.pipeline import make_clean
from data_process.raw import Skip, records
from data_process.run import ProcessConfig, chosen, main, remarks

N = 12
QUESTIONS = [f"请介绍一下第{n}种水果的特点和用途是什么？" for n in range(N)]
ANSWERS = [f"这是第{n}种水果，味道独特，可以生吃，也可以榨汁。" for n in range(N)]
PASSAGE = "这种水果产于南方的{}个省份，果皮是红色的，人们都很喜欢，常用来待客。"
GIVEN = [PASSAGE.format(n) for n in range(N)]


def write(path: Path, data: object) -> Path:
    """A file of JSON lines out of rows, or of the text or the bytes given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, list):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def make(reader: str, raw: Path, **settings: object) -> tuple[dict, dict[str, list[dict]]]:
    """counts.json of a set of one's own, and its rows by part."""
    out = raw.parent / "out"
    cfg = ProcessConfig(reader, name="mine", raw=raw, out=out, dedup=None, **settings)
    ((counts, _),) = make_clean(chosen(cfg), cfg)
    found = {
        part: [r for p in sorted(out.glob(f"clean/mine/{part}-*")) for r in read_rows(p)]
        for part in ("train", "val", "test")
    }
    return counts, found


def turns_of(parts: dict[str, list[dict]]) -> list[tuple[str, ...]]:
    rows = [row for part in parts.values() for row in part]
    return sorted(tuple(m["content"] for m in row["messages"]) for row in rows)


def dialogues(with_passage: bool = False) -> list[tuple[str, ...]]:
    """The turns wanted of rows with a question, perhaps a passage behind it, and an answer."""
    asked = [f"{q}\n{p}" if with_passage else q for q, p in zip(QUESTIONS, GIVEN, strict=True)]
    return sorted(zip(asked, ANSWERS, strict=True))


def rows(*columns: str) -> list[dict]:
    """Rows whose columns are a question, a passage ("" to leave it out) and an answer."""
    made = (dict(zip(columns, row, strict=True)) for row in zip(QUESTIONS, GIVEN, ANSWERS,
                                                                strict=True))  # fmt: skip
    return [{key: value for key, value in row.items() if key} for row in made]


# Columns.

PAIRS = ["instruction output", "instruction response", "query response", "question answer", "q a",
         "prompt completion", "problem target", "问题 答案", "指令 输出", "Question Answer",
         " 问 答 ", "prompt chosen", "用户 助手", "human assistant", "inputs targets",
         "question answers", "ask reply", "instruct output", "问句 答句"]  # fmt: skip


def test_answers_in_a_list_of_one_are_that_answer(tmp_path: Path) -> None:
    data = [{"question": q, "answers": [a]} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    _, found = make("instruction", write(tmp_path / "a.jsonl", data))
    assert turns_of(found) == dialogues()


@pytest.mark.parametrize("names", PAIRS)
def test_question_and_answer_are_known_by_any_usual_name(tmp_path: Path, names: str) -> None:
    question, answer = names.strip().split()
    raw = write(tmp_path / "a.jsonl", rows(question, "", answer))
    counts, found = make("instruction", raw)
    assert turns_of(found) == dialogues() and not counts["unused"]


TRIPLES = ["question input output", "instruction input output", "query context response",
           "问题 材料 答案", "instruction passage answer", "question background answer",
           "提问 上下文 回复"]  # fmt: skip


@pytest.mark.parametrize("names", TRIPLES)
def test_no_part_of_a_question_is_lost(tmp_path: Path, names: str) -> None:
    _, found = make("instruction", write(tmp_path / "a.jsonl", rows(*names.split())))
    assert turns_of(found) == dialogues(with_passage=True)


def test_two_questions_in_a_row_are_both_asked(tmp_path: Path) -> None:
    data = [row | {"instruction": "请回答。"} for row in rows("question", "", "output")]
    _, found = make("instruction", write(tmp_path / "a.jsonl", data))
    assert turns_of(found)[0][0] == f"请回答。\n{QUESTIONS[0]}"


def test_columns_without_a_use_are_named_and_counted_with_an_example(tmp_path: Path) -> None:
    data = [row | {"id": n, "source": "新浪网", "target": "别的"}
            for n, row in enumerate(rows("question", "", "output"))]  # fmt: skip
    raw = write(tmp_path / "a.jsonl", data)
    counts, found = make("instruction", raw)
    assert counts["unused"] == {
        "source": {"rows": N, "example": "新浪网", "role": "input"},
        "target": {"rows": N, "example": "别的", "role": "answer"},
    }
    told = "\n".join(remarks(counts))
    assert "not used: target (12 rows, such as '别的'; to take it instead: --columns.answer" in told
    _, other = make("instruction", raw, columns={"answer": "target"})
    assert turns_of(found) == dialogues()
    assert {answer for _, answer in turns_of(other)} == {"别的"}


@pytest.mark.parametrize("body", ["article", "text", "content", "abstract", "正文"])
def test_a_publisher_is_never_the_text(tmp_path: Path, body: str) -> None:
    data = [{body: given, "title": f"第{n}种水果", "source": "新浪网"}
            for n, given in enumerate(GIVEN)]  # fmt: skip
    counts, found = make("pairs", write(tmp_path / "a.jsonl", data))
    assert {row["text"] for part in found.values() for row in part} == set(GIVEN)
    assert counts["unused"]["source"]["rows"] == N


def test_a_source_beside_a_target_is_the_text(tmp_path: Path) -> None:
    data = [{"source": given, "target": f"第{n}种水果"} for n, given in enumerate(GIVEN)]
    _, found = make("pairs", write(tmp_path / "a.jsonl", data))
    assert {row["text"] for part in found.values() for row in part} == set(GIVEN)


def test_a_second_summary_can_be_chosen(tmp_path: Path) -> None:
    data = [{"id": "a", "text": given, "summary": f"第{n}种水果", "tldr": f"一句话说第{n}种水果",
             "keywords": ["水果"]} for n, given in enumerate(GIVEN)]  # fmt: skip
    raw = write(tmp_path / "a.jsonl", data)
    counts, found = make("pairs", raw, columns={"summary": "tldr"})
    assert all(row["summary"].startswith("一句话") for row in found["train"])
    assert found["train"][0]["meta"] == {"keywords": ["水果"]}
    assert set(counts["unused"]) == {"summary"}


UNKNOWN = {
    "instruction": {"开头": "一", "结尾": "二"}, "conversations": {"谈话": [1]},
    "text": {"段": "文字"}, "pairs": {"段": "文字", "名": "题"}, "passages": {"段": "文字"},
}  # fmt: skip


@pytest.mark.parametrize("reader", UNKNOWN)
def test_columns_that_are_not_known_are_named_with_those_that_are(
    tmp_path: Path, reader: str
) -> None:
    raw = write(tmp_path / "a.jsonl", [UNKNOWN[reader]] * 3)
    with pytest.raises(DataError) as error:
        make(reader, raw)
    said = str(error.value)
    assert "unknown_columns 3" in said and "a.jsonl:1" in said and "known" in said
    assert all(name in said for name in UNKNOWN[reader])
    assert "download" not in said


def test_what_is_not_understood_costs_itself_and_is_named(tmp_path: Path) -> None:
    data = [*rows("instruction", "", "output"), {"instruction": "一"}, {"instruction": 5,
            "output": {"text": "二"}}]  # fmt: skip
    counts, found = make("instruction", write(tmp_path / "a.jsonl", data))
    assert turns_of(found) == dialogues()
    assert counts["dropped"]["wrong_type"]["why"] == (
        "a.jsonl:14: column 'output': an object; wanted text"
    )
    assert "a.jsonl:13" in counts["dropped"]["unknown_columns"]["why"]


def test_a_question_that_is_not_known_can_be_taken_with_the_option_that_is_told(
    tmp_path: Path,
) -> None:
    raw = write(tmp_path / "a.jsonl", rows("我的 问题", "input", "output"))
    counts, _ = make("instruction", raw)
    option = "--columns.question '我的 问题'"
    assert any(f"to take it instead: {option})" in note for note in remarks(counts))
    name, value = shlex.split(option)
    _, found = make("instruction", raw, columns={name.rpartition(".")[2]: value})
    assert turns_of(found) == dialogues(with_passage=True)


@pytest.mark.parametrize("empty", ["NaN", "null", '""', "[]", '"无输入"', '" "', '"nan"', '"None"'])
def test_an_empty_cell_is_empty_however_it_is_written(tmp_path: Path, empty: str) -> None:
    lines = "".join(
        f'{{"instruction": "{q}", "input": {empty}, "output": "{a}"}}\n'
        for q, a in zip(QUESTIONS, ANSWERS, strict=True)
    )
    _, found = make("instruction", write(tmp_path / "a.jsonl", lines))
    assert turns_of(found) == dialogues()


def test_a_number_among_texts_is_text(tmp_path: Path) -> None:
    data = [{"instruction": "一加一等于几？", "output": value} for value in (2, 2.0, 2.5, -3)]
    _, found = make("instruction", write(tmp_path / "a.jsonl", data))
    assert sorted(answer for _, answer in turns_of(found)) == ["-3", "2", "2", "2.5"]


# Turns.

ROLES = ["user assistant", "human gpt", "user model", "用户 助手", "用户 模型", "client counselor",
         "usr sys", "speaker1 speaker2", "User Assistant", "p1 p2", "prompter assistant",
         "user bot", "患者 医生", "用户： 助手：", "<|user|> <|assistant|>", "学生 老师",
         "提问 回答"]  # fmt: skip


@pytest.mark.parametrize("names", ROLES)
@pytest.mark.parametrize("keys", ["from value", "role content", "speaker text"])
def test_speakers_are_known_by_any_usual_name(tmp_path: Path, names: str, keys: str) -> None:
    (who, what), sides = keys.split(), names.split()
    data = [{"conversations": [{who: sides[0], what: q}, {who: sides[1], what: a}]}
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)]  # fmt: skip
    _, found = make("conversations", write(tmp_path / "a.jsonl", data))
    assert turns_of(found) == dialogues()


def test_a_developer_is_the_system(tmp_path: Path) -> None:
    data = [{"messages": [{"role": "developer", "content": GIVEN[n]}, {"role": "user",
             "content": q}, {"role": "assistant", "content": ANSWERS[n]}]}
            for n, q in enumerate(QUESTIONS)]  # fmt: skip
    _, found = make("conversations", write(tmp_path / "a.jsonl", data))
    assert {row["messages"][0]["role"] for row in found["train"]} == {"system"}


def test_a_speaker_who_is_not_known_is_named_and_can_be_said(tmp_path: Path) -> None:
    data = [{"conversations": [{"from": "旅客", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)]  # fmt: skip
    raw = write(tmp_path / "a.jsonl", data)
    with pytest.raises(
        DataError, match=r"unknown_role 12: a\.jsonl:1: role '旅客'; known are user"
    ):
        make("conversations", raw)
    _, found = make("conversations", raw, roles={"旅客": "user"})
    assert turns_of(found) == dialogues()
    with pytest.raises(ConfigError, match=r"--roles\.旅客: wanted system, user, assistant"):
        main(ProcessConfig("conversations", raw=raw, out=tmp_path, roles={"旅客": "guest"}))


def test_turns_that_do_not_alternate_are_told_with_their_speakers(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "说"} for role in ("user", "system")]
    with pytest.raises(DataError, match=r"no_answer 1: a\.jsonl\[0\]: turns of user, system"):
        make("conversations", write(tmp_path / "a.jsonl", [{"messages": turns}]))


def parts_of(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


SHAPES: dict[str, Callable[[str, str], dict]] = {
    "parts": lambda q, a: {"messages": [{"role": "user", "content": parts_of(q[:5], q[5:])},
                                        {"role": "assistant", "content": parts_of(a)}]},
    "pairs": lambda q, a: {"conversation": [{"human": q, "assistant": a}]},
    "q and a": lambda q, a: {"turns": [{"q": q, "a": a}]},
    "lists": lambda q, a: {"history": [], "conversations": [[q, a]]},
    "plain": lambda q, a: {"conversation": [q, a]},
    "labels": lambda q, a: {"conversation": [f"p1: {q}", f"p2：{a}"]},
    "numbered": lambda q, a: {"chat": {"turn_1": {"Human": q, "bot": a}}},
    "in a text": lambda q, a: {"conversations": json.dumps([{"from": "human", "value": q},
                                                            {"from": "gpt", "value": a}])},
    "message": lambda q, a: {"messages": [{"message": q}, {"message": a, "attrs": []}]},
    "of Gemini": lambda q, a: {"contents": [{"role": "user", "parts": [{"text": q}]},
                                            {"role": "model", "parts": [{"text": a}]}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_turns_are_understood_in_any_shape(tmp_path: Path, shape: str) -> None:
    data = [SHAPES[shape](q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    _, found = make("conversations", write(tmp_path / "a.jsonl", data))
    assert turns_of(found) == dialogues()


def test_a_part_that_is_no_text_is_named(tmp_path: Path) -> None:
    content = [*parts_of("这是什么？"), {"type": "image_url", "image_url": {"url": "x"}}]
    data = [{"messages": [{"role": "user", "content": content},
                          {"role": "assistant", "content": "花"}]}]  # fmt: skip
    with pytest.raises(DataError, match=r"not_text 1: a\.jsonl\[0\]: .*image_url"):
        make("conversations", write(tmp_path / "a.jsonl", data))


def test_facts_and_reference_texts_are_what_a_dialogue_is_about(tmp_path: Path) -> None:
    facts = [
        ["王牌", "领域", "电影"],
        ["王牌", "导演", "范建浍"],
        ["王牌", "主演", "林志玲等多位演员"],
    ]
    turns = [
        {"role": "user", "content": "果皮什么颜色？"},
        {"role": "assistant", "content": "红。"},
    ]
    data = [
        {"knowledge": facts, "conversation": ["你喜欢看电影吗？", "喜欢，我常看。"]},
        {"reference": GIVEN[0], "messages": turns},
    ]
    _, found = make("conversations", write(tmp_path / "a.jsonl", data))
    system = sorted(row["messages"][0]["content"] for part in found.values() for row in part)
    assert system == sorted(
        ["王牌 领域 电影\n王牌 导演 范建浍\n王牌 主演 林志玲等多位演员", GIVEN[0]]
    )


QAS: dict[str, Callable[[str, str, str], dict]] = {
    "q, a": lambda p, q, a: {"title": "", "context": p, "qas": [{"q": q, "a": a}]},
    "one question": lambda p, q, a: {"context": p, "question": q, "answer": a},
    "of Hugging Face": lambda p, q, a: {"context": p, "question": q,
                                        "answers": {"text": [a], "answer_start": [0]}},
    "of SQuAD": lambda p, q, a: {"paragraphs": [{"context": p, "qas": [
        {"question": q, "answers": [{"text": a}]}]}]},
    "of CMRC": lambda p, q, a: {"context_text": p, "qas": [{"query_text": q, "answers": [a]}]},
}  # fmt: skip


@pytest.mark.parametrize("shape", QAS)
def test_questions_about_a_passage_are_understood_in_any_shape(tmp_path: Path, shape: str) -> None:
    triples = list(zip(GIVEN, QUESTIONS, ANSWERS, strict=True))
    raw = write(tmp_path / "a.jsonl", [QAS[shape](*triple) for triple in triples])
    _, found = make("passages", raw)
    assert turns_of(found) == sorted(triples)


# Formats.

ROWS = rows("instruction", "", "output")
JSON = {
    "lines": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "list": json.dumps(ROWS, ensure_ascii=False),
    "list, a row a line": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]",
    "objects over lines": "\n".join(json.dumps(row, indent=2, ensure_ascii=False) for row in ROWS),
    "objects behind each other": "".join(json.dumps(row) for row in ROWS),
    "by key": json.dumps({str(n): row for n, row in enumerate(ROWS)}),
    "by key over lines": json.dumps({f"row {n}": row for n, row in enumerate(ROWS)}, indent=1),
    "by column": json.dumps({key: {str(n): row[key] for n, row in enumerate(ROWS)}
                             for key in ROWS[0]}),
    "wrapped": json.dumps({"version": "1", "data": ROWS}),
    "records": json.dumps({"RECORDS": ROWS}, indent=1),
}  # fmt: skip


@pytest.mark.parametrize("layout", JSON)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_json_is_read_however_it_is_arranged(tmp_path: Path, layout: str, bom: str) -> None:
    counts, found = make("instruction", write(tmp_path / "a.json", bom + JSON[layout]))
    assert turns_of(found) == dialogues() and counts["rows_in"] == N


def test_a_list_of_each_part_gives_the_parts(tmp_path: Path) -> None:
    data = {"train": ROWS[:8], "dev": ROWS[8:10], "测试集": ROWS[10:]}
    raw = write(tmp_path / "a.json", json.dumps(data, ensure_ascii=False))
    counts, found = make("instruction", raw)
    found["train"] += counts["leaks"]  # too like rows that are held out
    assert {part: len(some) for part, some in found.items()} == {"train": 8, "val": 2, "test": 2}


def table(delimiter: str, quote: str = "", end: str = "\n") -> str:
    lines = [["instruction", "input", "output"], *(
        [q, "", a] for q, a in zip(QUESTIONS, ANSWERS, strict=True))]  # fmt: skip
    return end.join(delimiter.join(f"{quote}{cell}{quote}" for cell in line) for line in lines)


TABLES = {"a.csv": table(","), "b.csv": table(",", '"', "\r\n"), "c.tsv": table("\t"),
          "d.csv": table(";"), "e.txt": table(","), "f.tsv": table("\t", '"'),
          "g.csv": "sep=,\n" + table(","), "h.csv": table(", ", '"'),
          "i.csv": "\n".join(f"{n}," + line for n, line in enumerate(table(",").split("\n")))
          .removeprefix("0")}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_tables_are_known_by_their_first_line(tmp_path: Path, name: str, bom: str) -> None:
    _, found = make("instruction", write(tmp_path / name, bom + TABLES[name]))
    assert turns_of(found) == dialogues()


@pytest.mark.parametrize("reader", ["instruction", "conversations", "passages", "pairs", "text"])
def test_a_column_with_an_endless_name_makes_no_endless_message(
    tmp_path: Path, reader: str
) -> None:
    name = "x" * 1_000_000
    for data in ({name: 1}, {"conversations": [{name: "a"}]}, {"messages": [{"role": name}]},
                 {"messages": [{"role": name, "content": "a"}]}):  # fmt: skip
        with pytest.raises(DataError) as error:
            make(reader, write(tmp_path / "a.jsonl", [data]))
        assert len(str(error.value)) < 1500


def test_a_table_whose_columns_are_not_known_names_them(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.csv", "甲方,乙方\n一,二\n")
    with pytest.raises(DataError, match="columns 甲方, 乙方; known are question: instruction"):
        make("instruction", raw)


def test_a_row_with_too_many_cells_says_how_many_and_which_are_known(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.csv", "question,answer\n一,二,三\n")
    with pytest.raises(DataError, match=r"wrong_columns \(3 cells, wanted 2 \(question, answer\)"):
        make("instruction", raw)


def test_a_quotation_mark_that_is_never_closed_is_no_end_of_the_file(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.csv", table(",") + '\n"没有结尾,,答\n一,,二\n')
    with pytest.raises(DataError, match=r"a\.csv\[13\]: .*nowhere closed"):
        make("instruction", raw)


def test_workbooks_and_documents_are_read(tmp_path: Path) -> None:
    cells = [("instruction", "output"), *zip(QUESTIONS, ANSWERS, strict=True)]
    write_xlsx(tmp_path / "表格.xlsx", cells)
    _, found = make("instruction", tmp_path / "表格.xlsx")
    assert turns_of(found) == dialogues()
    write_docx(tmp_path / "文章.docx", GIVEN)
    lines = [record.data for record in records(tmp_path / "文章.docx", "utf-8-sig")]
    assert lines == GIVEN


FOREIGN = {
    "旧表.xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "an old Office file.*CSV UTF-8"),
    "书.data": (b"%PDF-1.7\n" + b"x" * 600, "a PDF"), "包.data": (b"Rar!\x1a\x07" * 99, "RAR"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c" * 99, "7z"), "a.zst": (b"\x28\xb5\x2f\xfd" * 99, "zstd"),
    "库.data": (b"SQLite format 3\0" * 99, "SQLite"),
    "文.txt": (rb"{\rtf1\ansi \'bd\'f1}", "rich text"),
    "页.txt": (b"<!DOCTYPE html>\n<p>", "web page"),
    "数.npy": (b"\x93NUMPY\x01\0v\0" + bytes(99), "no text; move the file away"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("reader", ["lines", "instruction"])
def test_a_file_of_another_kind_is_named_and_never_text(
    tmp_path: Path, name: str, reader: str
) -> None:
    data, said = FOREIGN[name]
    with pytest.raises(DataError, match=f"{name}.*{said}"):
        make(reader, write(tmp_path / name, data))


def test_an_archive_with_a_password_is_no_damage(tmp_path: Path) -> None:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a.txt", "一")
    data = bytearray(raw.getvalue())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + at] |= 1  # says that it is encrypted
    with pytest.raises(DataError, match="wants a password; unpack it first"):
        list(records(write(tmp_path / "a.zip", bytes(data)), "utf-8-sig"))


ENCODINGS = ["gb18030", "big5", "utf-16", "utf-16-le", "utf-16-be"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_encoding_that_is_told_is_the_one_that_reads(tmp_path: Path, encoding: str) -> None:
    text = "".join(f"第{n}天：我的天空一直是很大的，在山上有人不走了。\n" for n in range(20))
    raw = write(tmp_path / "a.txt", text.encode(encoding))
    with pytest.raises(DataError, match=f"likely {encoding}; run again with --encoding {encoding}"):
        make("lines", raw)
    assert [r.data for r in records(raw, encoding)] == text.splitlines()


RUBBISH = ["Thumbs.db", "desktop.ini", ".DS_Store", "__MACOSX/._a.json", "a.md5", "load.py",
           "README.md", "使用说明.txt", "图.jpg", "~$表格.xlsx", "sub/Thumbs.db",
           "sub/.DS_Store", "thumbs.db:encryptable", "Icon\r", "a.json~", "a.json.bak", "a.tmp",
           "md5sum.txt", "SHA256SUMS", "a.sha256sum", "readme_zh.md", "版权声明.txt", "a.yaml",
           "System Volume Information/a.dat"]  # fmt: skip


def test_what_cannot_be_data_is_left_alone_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "raw/a.json", ROWS)
    for name in RUBBISH:
        write(tmp_path / "raw" / name, b"\xd0\xcf\x11\xe0" + bytes(600))
    counts, found = make("instruction", tmp_path / "raw")
    assert turns_of(found) == dialogues() and len(counts["left_alone"]) == len(RUBBISH)
    assert any(note.startswith("left alone: ") for note in remarks(counts))


@pytest.mark.parametrize("kind", ["zip", "tar", "zip of Windows"])
def test_what_cannot_be_data_is_left_alone_in_archives_too(tmp_path: Path, kind: str) -> None:
    path, junk = tmp_path / f"a.{kind[:3]}", b"\xd0\xcf\x11\xe0" + bytes(600)
    files = {"数据/训练集.json": JSON["list"].encode(), "数据/测试集.json": JSON["list"].encode()}
    files |= {f"数据/{name}": junk for name in RUBBISH}
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    else:
        # Windows writes GBK names with backslashes, and no sign that says so.
        windows = {name: name.replace("/", "\\").encode("gbk") for name in files}
        plain = {name: chr(97 + n) * len(windows[name]) for n, name in enumerate(files)}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name if kind == "zip" else plain[name], data)
        if kind != "zip":
            whole = path.read_bytes()
            for name in files:
                whole = whole.replace(plain[name].encode(), windows[name])
            path.write_bytes(whole)
    found = list(records(path, "utf-8-sig"))
    assert not any(isinstance(item, Skip) for item in found) and len(found) == 2 * N
    assert {item.split for item in found} == {"train", "test"}


# Nothing ends early in silence.

TEXT = "".join(f"{n}：今天天气很好，我们去公园散步。\n" for n in range(300)).encode()
PACK = {"bz2": bz2.compress, "xz": lzma.compress, "gz": gzip.compress}


@pytest.mark.parametrize("kind", PACK)
def test_what_follows_a_stream_is_another_one_or_damage(tmp_path: Path, kind: str) -> None:
    one = PACK[kind](TEXT)
    assert len(list(records(write(tmp_path / "a", one * 3), "utf-8-sig"))) == 900
    for at in range(len(one), len(one) + 10):  # the head of the second stream, bit by bit
        for bit in range(0, 8, 3):
            data = bytearray(one * 3)
            data[at] ^= 1 << bit
            try:
                found = list(records(write(tmp_path / "a", bytes(data)), "utf-8-sig"))
            except DataError as error:
                assert "damaged" in str(error)
            else:  # a bit that decides no text: the time in gzip's head, the block size in bzip2's
                assert kind != "xz" and len(found) == 900


@pytest.mark.parametrize("kind", ["bz2", "xz"])
def test_the_place_of_damage_is_told_and_padding_is_none(tmp_path: Path, kind: str) -> None:
    one = PACK[kind](TEXT)
    with pytest.raises(DataError, match=f"begins at byte {len(one):,}"):
        list(records(write(tmp_path / "a", one + b"junk"), "utf-8-sig"))
    padded = one + bytes(8) + one + bytes(4)
    assert len(list(records(write(tmp_path / "a", padded), "utf-8-sig"))) == 600


def tarred() -> bytearray:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for n in range(3):
            info = tarfile.TarInfo(f"{n}.txt")
            info.size = len(TEXT)
            archive.addfile(info, io.BytesIO(TEXT))
    return bytearray(buffer.getvalue())


def test_a_damaged_header_ends_no_tar_in_silence(tmp_path: Path) -> None:
    data = tarred()
    assert len(list(records(write(tmp_path / "a.tar", bytes(data)), "utf-8-sig"))) == 900
    second = 512 + -(-len(TEXT) // 512) * 512
    for at in (second, second + 130, second + 150):
        broken = data.copy()
        broken[at] ^= 1
        with pytest.raises(DataError, match="cut or damaged after 300 entries"):
            list(records(write(tmp_path / "a.tar", bytes(broken)), "utf-8-sig"))
    with pytest.raises(DataError, match="cut or damaged"):
        list(records(write(tmp_path / "a.tar", bytes(data[:second])), "utf-8-sig"))


@pytest.mark.parametrize("kind", [b"x", b"L", b"K", b"g"])
def test_a_tar_header_that_claims_gigabytes_takes_no_memory(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("a")
    info.type, info.size = kind, 5 << 30
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    with pytest.raises(DataError, match=r"a header that claims 5,368,709,120 bytes"):
        list(records(write(tmp_path / "a.tar", data), "utf-8-sig"))


def test_a_broken_element_with_a_list_inside_is_no_end_of_the_list(tmp_path: Path) -> None:
    good = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a in zip(QUESTIONS, ANSWERS, strict=True)]  # fmt: skip
    texts = [json.dumps(row, ensure_ascii=False) for row in good]
    texts[3] = texts[3].replace('{"conversations"', "{conversations")
    raw = write(tmp_path / "a.json", "[" + ",\n".join(texts) + "]")
    _, found = make("conversations", raw, max_bad=1.0)
    assert len(turns_of(found)) == N - 1


# Parts and small sets.


@pytest.mark.parametrize("name", ["测试集.json", "test.json", "test/a.json", "测试/1.json",
                                  "測試集.json", "评测.json", "testset.json",
                                  "tests/a.json"])  # fmt: skip
def test_a_test_part_is_known_by_its_name_or_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "raw/训练集.json", ROWS)
    write(tmp_path / "raw" / name, rows("question", "", "answer"))
    counts, found = make("instruction", tmp_path / "raw")
    assert len(found["test"]) == N
    assert len(found["train"]) + len(found["val"]) + len(counts["leaks"]) == N


@pytest.mark.parametrize("name", ["test.json", "测试.json", "my_test_data.jsonl", "dev.json"])
def test_files_that_are_all_called_test_are_asked_about(tmp_path: Path, name: str) -> None:
    raw = write(tmp_path / name, ROWS)
    with pytest.raises(ConfigError, match=r"--official false.*--official true"):
        make("instruction", raw)
    _, found = make("instruction", raw, official=False)
    assert len(found["train"]) == N - 1 and len(found["val"]) == 1
    _, found = make("instruction", raw, official=True)
    assert len(found["val"] + found["test"]) == N


def test_one_run_at_a_time_is_at_work_in_a_place(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.jsonl", ROWS)
    cfg = ProcessConfig("instruction", name="mine", raw=raw, out=tmp_path / "out")
    main(cfg)
    with lock(tmp_path / "out/work"), pytest.raises(ConfigError, match=r"in use.*--out"):
        main(cfg)
    main(cfg)


# Cleaning keeps what a text says.

KEPT = [
    "当 n<p 时，传统方法失效；当惩罚参数 λ>0 时，估计量是相合的。",
    "若 x<a && b>c，则返回 x<a 的值。", "a<br，而 c>d，这是两个不等式。",
    "条件为 p<0.05 且 q>0.1。", "if (i<n && j>m) 返回 arr[i]。",
    "数组的第一个元素写作 arr[0]，主函数写作 main()，打印用 printf()。",
    "调用 f(x)[1] 与 s.pop() 即可。",
    "网址为 http://a.cn/?a=1&section=2&copy=3&lt=4。", "书名号《》和直角引号「」都是成对的符号。",
    "选择题的空处写作（ ），填空题也一样。", "区间[0,1]上的函数 g[i][j] 是连续的。",
    "正则表达式写作 ^[a-z]+()$。", "正确答案是：[12]", "程序输出:[5]",
    "向量 v[12] 是第十三个元素。", "泛型写作 Map<String, List<Integer>>，比较写作 a<b。",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["text", "summary", "article"])
@pytest.mark.parametrize("text", KEPT)
def test_formulas_code_and_signs_are_kept(text: str, kind: str) -> None:
    assert fix({"id": "x/0", "text": text, "summary": "一二三四五六"}, kind)[0]["text"] == text


def test_what_stands_between_fences_is_kept_as_it_is() -> None:
    code = "```\nfor i in x:\n    if a[1] <b> 2:\n        f()   # &lt;\n```"
    text = f"先看&nbsp;这段<p>代码[3]：\n\n\n{code}\n　　再看结果。"
    wanted = f"先看 这段代码：\n{code}\n再看结果。"
    assert fix({"id": "x/0", "text": text}, "text")[0]["text"] == wanted


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("<p class=\"a\">甲</p><br/>乙<a href='x'>丙</a><img src=a.jpg />", "甲乙丙"),
        ("甲&amp;乙&#20013;&#x6587;&hellip;", "甲&乙中文…"),
        ("银杏是落叶乔木[1][2-3]，可入药[12]。", "银杏是落叶乔木，可入药。"),
        ("茶壶（，）是器皿（），见（；）图。", "茶壶是器皿，见图。"),
        ("&lt;p&gt;是段落标签。", "<p>是段落标签。"),
    ],
)
def test_what_is_plainly_rubbish_goes(dirty: str, clean: str) -> None:
    assert fix({"id": "x/0", "text": dirty}, "text")[0]["text"] == clean


@pytest.mark.parametrize("text", ["&#" + "1" * 5000 + ";", "&#x" + "F" * 5000 + ";", "&#9999999;",
                                  "&#xD800;", "&#0;"])  # fmt: skip
@pytest.mark.parametrize("reader", ["lines", "instruction"])
def test_no_entity_ends_a_run(text: str, reader: str, tmp_path: Path) -> None:
    said = f"今天天气很好，我们一起去公园里散步，看湖边的花。{text}"
    pair = {"instruction": said, "input": text, "output": said}
    data = {"lines": said, "instruction": json.dumps(pair)}
    good = data[reader].replace(text, "").replace(json.dumps(text)[1:-1], "")
    counts, _ = make(reader, write(tmp_path / "a.txt", f"{data[reader]}\n{good}\n"))
    assert counts["rows_in"] == 2


# The form that training text and prompts share.

FORMS = [
    ("這是什麼問題？", "这是什么问题？"), ("麵包怎麼做？", "面包怎么做？"),
    ("ＣＮＮ模型１２３", "CNN模型123"), ("甲\r\n乙\r丙", "甲\n乙\n丙"),
    ("零\u200b宽\ufeff字符\x07", "零宽字符"), ("cafe\u0301", "café"),
    ("乾隆皇帝", "乾隆皇帝"),
    ("全角标点，。！？", "全角标点，。！？"), ("👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
    ("  缩进\n\n段落\t", "  缩进\n\n段落\t"), ("", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "wanted"), FORMS)
def test_a_text_takes_one_form_and_keeps_it(text: str, wanted: str) -> None:
    assert plain(text) == wanted and plain(wanted) == wanted


@pytest.mark.parametrize(("text", "wanted"), FORMS[:9])
def test_rows_that_train_have_the_form_of_prompts(text: str, wanted: str) -> None:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    for kind in ("chat", "reference", "exam", "vqa", "smalltalk"):
        row, _ = fix({"id": "x/0", "messages": turns}, kind)
        assert {m["content"] for m in row["messages"]} == {wanted.strip()}
    for kind in ("text", "summary"):
        row, _ = fix({"id": "x/0", "text": text, "summary": text}, kind)
        assert row["text"].split() == wanted.split()
