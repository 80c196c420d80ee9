"""CSL: abstracts of Chinese papers with their titles, in any of the published layouts.

TSV without header   2 columns  title, abstract                (the older CLGE release)
                     3 columns  "to title", abstract, title    (benchmark/ts)
                     5 columns  title, abstract, keywords, discipline, category (the full set)
JSON lines or list   {"id", "title", "abst"}  (csl_title_public), or "content" for the abstract

Lines of the other benchmark tasks ("to keywords" …) hold no pair and are left out.
"""

from collections.abc import Iterator
from pathlib import Path

from data_process.raw import Record, Skip, as_row, records

KIND = "summary"
SOURCE = "github.com/ydli-ai/CSL, or csl_title_public of github.com/CLUEbenchmark/CLGE"
LICENSE = "Apache-2.0 (repository of CSL); none stated for csl_title_public"

COLUMNS = {2: (1, 0), 3: (1, 2), 5: (1, 0)}  # where abstract and title stand
ABSTRACT_KEYS = ("abst", "content", "abstract")


def read(raw_dir: Path, encoding: str) -> Iterator[dict | Skip]:
    """Pairs with the abstract as text and the title as summary."""
    for record in records(raw_dir, encoding):
        yield record if isinstance(record, Skip) else _row(record)


def _row(record: Record) -> dict | Skip:
    if isinstance(record.data, dict):
        abstract = next((record.data[k] for k in ABSTRACT_KEYS if k in record.data), None)
        title = record.data.get("title")
    else:
        # A quoting reader would glue rows: fields may start with one '"'.
        fields = record.data.split("\t")
        if fields[0].startswith("to ") and fields[0] != "to title":
            return Skip("other_task", record.where, record.data, broken=False)
        if len(fields) not in COLUMNS:
            return Skip("wrong_columns", record.where, record.data)
        abstract, title = (fields[i] for i in COLUMNS[len(fields)])
    if not isinstance(abstract, str) or not isinstance(title, str):
        return Skip("wrong_type", record.where, str(record.data))
    if not abstract.strip() or not title.strip():
        return Skip("empty_text", record.where, str(record.data))
    return as_row(record, text=abstract, summary=title)
