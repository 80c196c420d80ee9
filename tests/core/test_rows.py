"""Laws of canonical rows: what is refused and why, and what survives a file."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from babyllama.errors import DataError
from babyllama.rows import (
    check_row,
    numbered_lines,
    read_rows,
    row_kind,
    texts_of,
    write_rows,
)

TEXT = {"id": "wiki/1", "text": "一段文字"}
SUMMARY = {"id": "csl/7", "text": "正文", "summary": "标题", "meta": {"keywords": ["甲", 2]}}
TURNS = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
SYSTEM = {"role": "system", "content": "资料"}
CHAT = {"id": "redgpt/3", "messages": [SYSTEM, *TURNS, *TURNS]}


def chat(*messages: object) -> dict:
    return {"id": "x/1", "messages": list(messages)}


def said(role: object, content: object) -> dict:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row, kind, texts",
    [
        (TEXT, "text", ["一段文字"]),
        (SUMMARY, "summary", ["正文", "标题"]),
        ({k: v for k, v in SUMMARY.items() if k != "meta"}, "summary", ["正文", "标题"]),
        (CHAT, "chat", ["资料", "你好", "你好！", "你好", "你好！"]),
        (chat(*TURNS), "chat", ["你好", "你好！"]),
    ],
)
def test_a_canonical_row_has_a_kind_and_its_texts(row, kind, texts):
    assert check_row(row) is None
    assert row_kind(row) == kind
    assert texts_of(row) == texts


@pytest.mark.parametrize(
    "row, reason",
    [
        ([], "not_an_object"),
        ("text", "not_an_object"),
        ({}, "bad_keys"),
        ({"text": "a"}, "bad_keys"),
        ({"id": "x/1"}, "bad_keys"),
        (TEXT | {"title": "a"}, "bad_keys"),
        (TEXT | {"meta": {}}, "bad_keys"),
        (CHAT | {"text": "a"}, "bad_keys"),
        (TEXT | {"id": ""}, "bad_id"),
        (TEXT | {"id": 1}, "bad_id"),
        (TEXT | {"text": None}, "not_a_string"),
        (SUMMARY | {"summary": ["a"]}, "not_a_string"),
        (TEXT | {"text": " \n　"}, "empty_text"),
        (SUMMARY | {"summary": ""}, "empty_text"),
        (SUMMARY | {"meta": "a"}, "bad_meta"),
        (SUMMARY | {"meta": None}, "bad_meta"),
        (TEXT | {"text": "a\ud800b"}, "lone_surrogate"),
        (TEXT | {"id": "x/\udfff"}, "lone_surrogate"),
        (SUMMARY | {"summary": "\udc00"}, "lone_surrogate"),
        (SUMMARY | {"meta": {"a": ["\ud800"]}}, "lone_surrogate"),
        (chat(said("user", "\ud83d"), TURNS[1]), "lone_surrogate"),
        (CHAT | {"messages": "a"}, "bad_messages"),
        (chat(), "bad_messages"),
        (chat("a"), "bad_messages"),
        (chat({"role": "user"}), "bad_messages"),
        (chat(said("user", "a") | {"name": "b"}, TURNS[1]), "bad_messages"),
        (chat(said("user", " "), TURNS[1]), "empty_turn"),
        (chat(said("user", 5), TURNS[1]), "empty_turn"),
        (chat(said("human", "a"), TURNS[1]), "unknown_role"),
        (chat(said([], "a"), TURNS[1]), "unknown_role"),
        (chat(SYSTEM), "bad_turns"),
        (chat(TURNS[0]), "bad_turns"),
        (chat(TURNS[1], TURNS[0]), "bad_turns"),
        (chat(*TURNS, TURNS[0]), "bad_turns"),
        (chat(SYSTEM, SYSTEM, *TURNS), "bad_turns"),
        (chat(*TURNS, SYSTEM), "bad_turns"),
        (chat(TURNS[0], *TURNS), "bad_turns"),
    ],
    ids=repr,
)
def test_a_row_that_is_not_canonical_is_refused_with_its_reason(row, reason):
    assert check_row(row) == reason


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=4) | st.sampled_from(["user", "a"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["id", "text", "summary", "meta", "messages", "role", "content"]),
        inner, max_size=4,
    ),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=500)
@given(row=json_values)
def test_no_value_of_json_breaks_the_check(row):
    reason = check_row(row)
    assert reason is None or reason.isidentifier()


ROWS = [TEXT, CHAT, SUMMARY]
# None of these ends a row, though str.splitlines would say so.
ODD = "甲\u2028乙\u2029丙\r丁\x0b戊\x0c\x1c\x85己\n庚\x00\ufeff😀"


def test_rows_come_back_from_a_file_as_they_were(tmp_path):
    rows = [*ROWS, TEXT | {"text": ODD}, SUMMARY | {"meta": {"odd": ODD}}]
    path = tmp_path / "new/rows.jsonl"
    assert write_rows(path, iter(rows)) == 5
    assert list(read_rows(path)) == rows


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    # Unescaped, as other writers leave them.
    text = ODD.replace("\n", "").replace("\r", "").replace("\x00", "")
    text = "".join(c for c in text if c >= " ")
    path.write_bytes(f'{{"id": "x/1", "text": "{text}"}}\n'.encode() * 2)
    assert [row["text"] for row in read_rows(path)] == [text, text]


def test_a_lone_carriage_return_does_not_end_a_line(tmp_path):
    (tmp_path / "lines").write_bytes(b"a\rb\r\n\r\nc\n  \nd")
    assert [line for _, line in numbered_lines(tmp_path / "lines")] == ["a\rb", "c", "d"]


@pytest.mark.parametrize(
    "line, found",
    [
        (b'{"id": "x/1", "text": ""}', "found empty_text in"),
        (b'{"id": "x/1"', "wanted one JSON object, found"),
        (b"[" * 100_000, "wanted one JSON object, found"),
        (b'{"id": ' + b"1" * 5000 + b"}", "wanted one JSON object, found"),
        (b"[]", "found not_an_object in"),
    ],
    ids=["empty", "cut", "deep", "number", "list"],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, found):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(TEXT).encode()
    # Blank lines are skipped, but counted.
    path.write_bytes(good + b"\n\n  \r\n" + good + b"\r\n" + line + b"\n" + good)
    rows = read_rows(path)
    assert [next(rows), next(rows)] == [TEXT, TEXT]
    with pytest.raises(DataError, match=rf"rows\.jsonl:5: .*{found}"):
        next(rows)


def test_a_byte_order_mark_is_removed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode())
    assert list(read_rows(path)) == [TEXT]


@pytest.mark.parametrize("n_rows", [1, 1000])
@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "big5"])
def test_bytes_that_are_not_utf8_are_refused_with_advice(tmp_path, encoding, n_rows):
    path = tmp_path / "rows.jsonl"
    line = '{"id": "x/1", "text": "銀杏是中國的一種樹，在山上"}\n'
    path.write_bytes((line * n_rows).encode(encoding))
    with pytest.raises(DataError, match=r"rows\.jsonl: wanted UTF-8.*iconv -f " + encoding):
        list(read_rows(path))


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"], ids=repr)
def test_a_file_without_rows_is_refused(tmp_path, data):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match="found an empty file"):
        list(read_rows(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(tmp_path / "rows.jsonl"))


def one_then(error: Exception):
    yield TEXT
    raise error


@pytest.mark.parametrize("earlier", [None, b"earlier\n"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=repr)
def test_a_file_is_written_whole_or_not_at_all(tmp_path, earlier, error):
    path = tmp_path / "rows.jsonl"
    if earlier:
        path.write_bytes(earlier)
    with pytest.raises(type(error)):
        write_rows(path, one_then(error))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([earlier] if earlier else [])
