"""NaturalConv (Tencent): dialogues of two people about a piece of news.

    dialog_release.json            {"dialog_id": "0_3", "document_id": 0, "content": ["…", …]}
    train.txt, dev.txt, test.txt   one dialog_id a line: the official split
    document_url_release.json      addresses of the articles; no dialogues, left out

Speakers take turns, and the first is the user. A dialogue in none of the three lists belongs to
no official part. The articles themselves are not published with the set (only their addresses),
so rows have no reference text; articles that you got elsewhere are not read.
"""

from collections.abc import Iterable, Iterator

from data_process.datasets.conversations import dialogue, in_turns, refuse
from data_process.raw import Record, Skip
from data_process.registry import Source

KIND = "chat"
WHOLE = True
SOURCE = Source(
    home="github.com/naturalconv/NaturalConvDataSet",
    rows="19,919",
    huggingface="xywang1/NaturalConv",
    files=("dialog_release.json", "train.txt", "dev.txt", "test.txt"),
)
LICENSE = "non-commercial research (Tencent AI Lab terms)"

ORDER = ("test", "val", "train", None)


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """The dialogues, held-out parts first.

    An id list may be read after the dialogues it names, so these wait (about 50 MB).
    """
    split: dict[str, str | None] = {}
    waiting = []
    for record in records:
        if isinstance(record, Skip):
            yield record
        elif isinstance(record.data, str):
            split[record.data.strip()] = record.split
        else:
            waiting.append(record)
    named = [record._replace(split=split.get(_dialog_id(record))) for record in waiting]
    for record in sorted(named, key=lambda record: ORDER.index(record.split)):
        yield _row(record)


def _dialog_id(record: Record) -> str:
    return str(record.data.get("dialog_id")) if isinstance(record.data, dict) else ""


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    if "url" in data and "content" not in data:
        return refuse(record, "address_only", broken=False)
    if not isinstance(data.get("content"), list):
        return refuse(record, "wrong_keys")
    return dialogue(record, in_turns(data["content"]))
