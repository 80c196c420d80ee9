"""News articles as documents: headline, newline, body. {"title", "content" or "text", …}

Fits news2016zh (news_id, title, content, source, time, keywords, desc) and most collections of web
news. Read as pairs and joined at the end, so that news and news_title, made of the same files,
have the same ids and the same held-out articles.
"""

from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "text"
RULES = "article"
SHARES = {"val": 0.02, "test": 0.05}
IDS = "news"
REFUSED_COUNT = True
SOURCE = Source(
    home="github.com/brightmart/nlp_chinese_corpus",
    rows="2,500,000",
    size="3.6 GB zipped",
    manual="news2016zh: Google Drive and Baidu links on the home page; or your own JSON files",
)
LICENSE = "MIT (repository of nlp_chinese_corpus); the articles belong to their publishers"

BODIES = ("content", "text", "article", "body")


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """Pairs with the body as text and the headline as summary."""
    for record in records:
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    data = record.data if isinstance(record.data, dict) else {}
    title, body = data.get("title"), next((data[key] for key in BODIES if key in data), None)
    if not isinstance(title, str) or not isinstance(body, str):
        return Skip("wrong_type", record.where, str(record.data))
    # Some collections hold "\n" as two characters.
    title, body = title.replace("\\n", " "), body.replace("\\n", "\n")
    if not title.strip() or not body.strip():
        reason = "no_body" if title.strip() else "no_title"
        return Skip(reason, record.where, str(data), broken=False)
    return as_row(record, text=body, summary=title)


def finish(row: dict) -> dict:
    """Pair to document."""
    return {"id": row["id"], "text": f"{row['summary']}\n{row['text']}"}
