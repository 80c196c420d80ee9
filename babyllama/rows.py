"""Canonical rows: the one form that every data set is turned into, one JSON object a line.

    text     {"id": "wiki/12", "text": "…"}
    chat     {"id": "redgpt/3", "messages": [{"role": "user", "content": "…"}, …]}
    summary  {"id": "csl/7", "text": "…", "summary": "…", "meta": {…}}      meta is optional
    preference {"id": "pairs/1", "messages": [… user], "chosen": "…", "rejected": "…"}
    vqa      {"id": "cifar/1", "image": "a.jpg", "messages": […]}      a dialogue about an image

`id` is "<set>/<number>", unique and stable. Unknown keys are refused. Raw downloads are read
in `data_process/`; this file knows only what comes out of there. No torch.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from babyllama.config import atomic_write
from babyllama.errors import DataError
from babyllama.language.letters import likely_encoding

REQUIRED = {
    "text": ("text",),
    "chat": ("messages",),
    "summary": ("text", "summary"),
    "preference": ("messages", "chosen", "rejected"),
    "vqa": ("messages", "image"),
}
OPTIONAL = {"text": (), "chat": (), "summary": ("meta",), "preference": (), "vqa": ()}
ROLES = ("system", "user", "assistant")
# JSON's "\ud800" becomes half a character that UTF-8 and SentencePiece refuse.
_SURROGATE = re.compile("[\ud800-\udfff]")
# How files of texts with titles name their columns, in the order in which they are looked for.
BODIES = ("text", "content", "article", "abstract", "abst", "body", "short_text", "completion",
          "正文", "内容", "文本", "摘要", "source")  # fmt: skip
SUMMARIES = ("summary", "title", "target", "summarization", "headline", "tldr", "标题", "题目",
             "概要", "摘要")  # fmt: skip


def row_kind(row: dict) -> str:
    """The kind of a row, read from its keys.

    raises: DataError if the keys fit no kind
    """
    for kind, required in REQUIRED.items():
        wanted = {"id", *required}
        if wanted <= row.keys() <= wanted | set(OPTIONAL[kind]):
            return kind
    raise DataError(
        f"a row needs the keys of one kind, id with text | messages | text, summary | messages, "
        f"chosen, rejected | messages, image; "
        f"found {sorted(row)}"
    )


def check_messages(messages: object) -> str | None:
    """Reason why a list is not `[system]? (user assistant)+`, or None if it is."""
    if not isinstance(messages, list) or not messages:
        return "bad_messages"
    for message in messages:
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            return "bad_messages"
        if not isinstance(message["content"], str) or not message["content"].strip():
            return "empty_turn"
        if message["role"] not in ROLES:
            return "unknown_role"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        return "bad_turns"
    return None


def check_row(row: object) -> str | None:
    """Short reason, to be counted, why a row is not canonical, or None if it is."""
    if not isinstance(row, dict):
        return "not_an_object"
    try:
        kind = row_kind(row)
    except DataError:
        return "bad_keys"
    if not isinstance(row["id"], str) or not row["id"]:
        return "bad_id"
    if not all(isinstance(text, str) for text in _strings(row, kind)):
        return "not_a_string"
    if "messages" in row:
        # What is preferred is an answer to the last question, which makes a dialogue of it.
        answer = (
            [{"role": "assistant", "content": row.get("chosen")}] if kind == "preference" else []
        )
        is_list = isinstance(row["messages"], list)
        reason = check_messages([*row["messages"], *answer] if is_list else None)
        if reason:
            return reason
    if not all(row[key].strip() for key in REQUIRED[kind] if key != "messages"):
        return "empty_text"
    if not isinstance(row.get("meta", {}), dict):
        return "bad_meta"
    if not isinstance(row.get("image", ""), str):
        return "bad_image"
    unseen = [row["id"], row.get("image", ""), json.dumps(row.get("meta"), ensure_ascii=False)]
    if any(map(_SURROGATE.search, texts_of(row) + unseen)):
        return "lone_surrogate"
    return None


def texts_of(row: dict) -> list[str]:
    """Every string of a row that a tokenizer will see."""
    return _strings(row, row_kind(row))


def _strings(row: dict, kind: str) -> list:
    own = [row[key] for key in REQUIRED[kind] if key not in ("messages", "image")]
    messages = row.get("messages", [])
    if kind in ("chat", "vqa") and check_messages(messages):
        return []
    return [m.get("content") for m in messages if isinstance(m, dict)] + own


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a canonical file.

    raises: DataError with file and line at the first line that is not a canonical row, or if
        the file is missing or holds no row at all
    """
    n_rows = 0
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: wanted one JSON object, found {error}") from None
        reason = check_row(row)
        if reason:
            raise DataError(
                f"{path}:{number}: wanted a canonical row, found {reason} in {line[:80]!r}; "
                f"raw files become rows with `python -m data_process.run`"
            )
        n_rows += 1
        yield row
    if n_rows == 0:
        raise DataError(f"{path}: wanted rows, found an empty file; make the data set again")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file (a BOM is removed), without their line ends, each with
    its number in the file, from 1.

    raises: DataError if the file is missing or not UTF-8
    """
    try:
        # newline="\n": texts may hold \r, \x0b or \u2028, which must not end a row.
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                line = line.rstrip("\r\n")
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        likely, name = likely_encoding(error.object) or "gb18030", shlex.quote(str(path))
        raise DataError(
            f"{path}: wanted UTF-8, found byte 0x{error.object[error.start]:02x} that is not; "
            f"convert it: iconv -f {likely} -t utf-8 {name}"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; wanted rows, one JSON object a line") from None


def write_rows(path: Path, rows: Iterable[dict]) -> int:
    """Write rows as JSON lines, whole or not at all; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n_rows = 0
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="\n") as file,
    ):
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            n_rows += 1
    return n_rows
