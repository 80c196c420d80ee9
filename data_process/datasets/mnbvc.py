"""MNBVC: web text, questions, forums and more, in five schemas told apart line by line.

段落 (a list)      general: news, law, government …; the publisher flags repeated paragraphs
问, 答             questions with one answer each (zhihu, wikihow …); several turns of one
                   conversation are neighbouring lines with the same 会话 in 元数据.扩展字段
主题, 回复 (list)   forum threads
text, 仓库名       code: left out
zh_text            parallel text: the Chinese side only
text, or text and meta   the oldest uploads; text may hold a JSON list of paragraphs

Every row is text, conversations too: questions and answers on lines of their own.
"""

import json
import re
from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row

# 扩展字段 is meant to be JSON inside a string, but some converters left values unquoted.
TALK = re.compile(r'"会话"\s*:\s*"?([^",}]+)')
PLACE = re.compile(r'"多轮序号"\s*:\s*"?(\d{1,9})')
# Details that describe the line ({"from": "human"} and the like) instead of the question.
NO_DETAIL = re.compile(r'\s*(?:[{\[]|"\w+"\s*:)')
MOST_TURNS = 1_000  # of a conversation kept in memory; a longer one becomes several documents


def mnbvc(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """One document a line, or one a conversation."""
    first: Record | None = None
    name, turns = "", {}
    for record in records:
        turn = _turn(record)
        if first and (not turn or turn[0] != name or turn[1] in turns or len(turns) == MOST_TURNS):
            yield as_row(first, text="\n".join(turns[number] for number in sorted(turns)))
            first, turns = None, {}
        if turn and isinstance(record, Record):
            first, name = first or record, turn[0]
            turns[turn[1]] = f"{record.data['问']}\n{record.data['答']}"
        else:
            yield record if isinstance(record, Skip) else _row(record)
    if first:
        yield as_row(first, text="\n".join(turns[number] for number in sorted(turns)))


def _turn(record: Record | Skip) -> tuple[str, int] | None:
    """The conversation that a line belongs to, with its file, and its place in it."""
    data = None if isinstance(record, Skip) else record.data
    if not isinstance(data, dict) or not isinstance(data.get("元数据"), dict):
        return None
    extra = str(data["元数据"].get("扩展字段"))
    talk, place = TALK.search(extra), PLACE.search(extra)
    if not (talk and place and _is_text(data.get("问")) and _is_text(data.get("答"))):
        return None
    return f"{record.where.rpartition(':')[0]} {talk[1]}", int(place[1])


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    if isinstance(data.get("段落"), list):
        return _paragraphs(record, data["段落"])
    if "问" in data and "答" in data:
        return _question(record)
    if isinstance(data.get("回复"), list):
        return _forum(record)
    if "仓库名" in data:
        return record.skip("code")
    text = data.get("zh_text", data.get("text"))
    if not isinstance(text, str):
        return record.skip("unknown_schema", broken=True)
    if text.startswith("[{"):
        try:
            return _paragraphs(record, json.loads(text))
        except (ValueError, RecursionError):
            pass  # an ordinary text that begins with these two signs
    return _document(record, text)


def _document(record: Record, *texts: object) -> dict | Skip:
    if not all(isinstance(text, str) for text in texts):
        return record.skip("wrong_type", broken=True)
    text = "\n".join(text for text in map(str, texts) if text.strip())
    return as_row(record, text=text) if text else record.skip("empty_text")


def _paragraphs(record: Record, paragraphs: list) -> dict | Skip:
    if record.data.get("是否重复文件") is True:
        return record.skip("flagged_duplicate")
    if record.data.get("是否待查文件") is True:
        return record.skip("flagged_suspect")
    if not all(isinstance(p, dict) and isinstance(p.get("行号", 0), int) for p in paragraphs):
        return record.skip("wrong_type", broken=True)
    kept = [p for p in paragraphs if not p.get("是否重复")]
    kept.sort(key=lambda p: p.get("行号", 0))
    return _document(record, *(p.get("内容", p.get("zh_text")) for p in kept))


def _question(record: Record) -> dict | Skip:
    question, answer = record.data["问"], record.data["答"]
    about = record.data.get("元数据")
    detail = (about.get("问题明细") if isinstance(about, dict) else None) or ""
    if not isinstance(question, str) or not isinstance(answer, str):
        return record.skip("wrong_type", broken=True)
    if not question.strip() or not answer.strip():
        return record.skip("no_answer" if question.strip() else "no_question")
    if not isinstance(detail, str) or NO_DETAIL.match(detail) or detail.strip() == question.strip():
        detail = ""
    return _document(record, question, detail, answer)


def _forum(record: Record) -> dict | Skip:
    # Early uploads hold the replies as plain strings.
    replies = [r.get("回复") if isinstance(r, dict) else r for r in record.data["回复"]]
    return _document(record, record.data.get("主题") or "", *replies)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
