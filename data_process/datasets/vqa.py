"""Rows about images: your own, Chinese-LLaVA's and minimind-v's.

    {"image": "a.jpg", "messages": [{"role": "user", "content": "…"}, …]}     or "conversations"
    {"image": "a.jpg", "qa": [{"question": "…", "answer": "…"}, …]}           each pair one row
    parquet: conversations = a JSON string of such a list, image_bytes = one image or a list

Only the rows are read; the images stay where they are, and python -m vqa.pack looks for them. The
image in a parquet row is called "<file>#<row>". "<image>" may stand before or after the first
question. Rows about several images are left out and counted.
"""

import re
from collections.abc import Iterator, Mapping

from data_process.columns import Refused
from data_process.datasets.conversations import conversation, dialogue, in_turns
from data_process.raw import Record, Skip

PLACEHOLDER = "<image>"
ENDING = re.compile(r"(?i)\.(?:jpe?g|png|webp|gif|bmp)\s*$")


def vqa(record: Record, roles: Mapping[str, str] | None = None) -> Iterator[dict | Skip]:
    """One row a dialogue, or a question with its answer."""
    if not isinstance(record.data, dict):
        raise Refused("not_an_object", broken=True)
    image = _image_name(record)
    data = {key: v for key, v in record.data.items() if key not in ("image", "image_bytes", "id")}
    if not isinstance(data.get("qa"), list):
        yield _with_image(conversation(record._replace(data=data), None, roles), image)
        return
    for pair in data["qa"]:
        try:
            if not isinstance(pair, dict):
                raise Refused("wrong_type", "column 'qa': wanted a question and its answer", True)
            turns = in_turns((pair.get("question"), pair.get("answer")))
            yield _with_image(dialogue(record, turns), image)
        except Refused as refused:  # the other pairs stay
            yield refused.skip(record)


def _image_name(record: Record) -> str:
    """The name of the record's one image; a name with commas is several names where each of them
    ends like an image's."""
    held, named = record.data.get("image_bytes"), record.data.get("image")
    if held is not None:
        file, _, row = record.where.rpartition(":")
        n_held = len(held) if isinstance(held, list) else 1
        names = [f"{file}#{row}" if n == 0 else f"{file}#{row}.{n}" for n in range(n_held)]
    elif isinstance(named, str) and all(map(ENDING.search, named.split(","))):
        names = named.split(",")
    else:
        names = named if isinstance(named, list) else [named]
    names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    if len(names) != 1:
        raise Refused("several_images" if names else "no_image")
    return names[0].replace("\\", "/")  # as Windows writes it


def _with_image(row: dict, image: str) -> dict:
    """A dialogue with its image; "<image>" and the line break beside it go.

    raises: Refused if it names the image anywhere but in the first question
    """
    messages = [dict(message) for message in row["messages"]]
    question = next(m for m in messages if m["role"] == "user")
    text = question["content"]
    for mark in (f"{PLACEHOLDER}\n", f"\n{PLACEHOLDER}", PLACEHOLDER):
        text = text.replace(mark, "", 1) if PLACEHOLDER in text else text
    question["content"] = text
    if not text.strip():
        raise Refused("empty_turn")
    if any(PLACEHOLDER in message["content"] for message in messages):
        raise Refused("several_images")
    return row | {"image": image, "messages": messages}
