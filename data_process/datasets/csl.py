"""CSL: abstracts of Chinese papers with their titles, in any of the published layouts.

TSV without header   2 columns  title, abstract                     (the older CLGE release)
                     3 columns  "to title", abstract, title         (benchmark/ts)
                     5 columns  title, abstract, keywords, discipline, category   (the full set)
JSON lines or list   "title", "abst" (csl_title_public); "abstract" or "content"; "keywords" …

The benchmark's other tasks ("to keywords" …) are read by csl_keywords, csl_discipline and
csl_category, which take the fields that they need from `papers`. All four tasks were drawn from
the full set and share their papers: clear the full set of the benchmark's dev and test papers.
"""

from collections.abc import Iterable, Iterator

from data_process.raw import Record, Skip, as_row
from data_process.registry import Source

KIND = "summary"
SOURCE = Source(
    home="github.com/ydli-ai/CSL",
    rows="benchmark/ts 8,000 / 1,000 / 1,000; full set 396,209",
    huggingface="neuclir/csl",
    files=("data/csl.jsonl.gz",),
    manual="the hub holds the full set; for the benchmark take benchmark/ts/*.tsv of the "
    "repository, for csl_title_public the link in github.com/CLUEbenchmark/CLGE",
)
LICENSE = "Apache-2.0 (CSL's repository and card); none stated for csl_title_public"

TASKS = {
    "to title": ("abstract", "title"),
    "to keywords": ("abstract", "keywords"),  # the abstract, a space, and the title
    "to discipline": ("abstract", "discipline"),
    "to category": ("title", "category"),
}
COLUMNS = {2: ("title", "abstract"), 5: ("title", "abstract", "keywords", "discipline", "category")}
KEYS = {"abst": "abstract", "content": "abstract", "keyword": "keywords", "label": "discipline"}
META = ("keywords", "discipline", "category")
FIELDS = frozenset(COLUMNS[5])


def read(records: Iterable[Record | Skip]) -> Iterator[dict | Skip]:
    """Pairs with the abstract as text and the title as summary."""
    for record, paper in papers(records, "abstract", "title"):
        if isinstance(paper, Skip):
            yield paper
        else:
            meta = {key: paper[key] for key in META if key in paper}
            fields = {"text": paper["abstract"], "summary": paper["title"]}
            yield as_row(record, **fields, **({"meta": meta} if meta else {}))


def papers(
    records: Iterable[Record | Skip], *wanted: str
) -> Iterator[tuple[Record | Skip, dict | Skip]]:
    """Each record with the fields of its paper, all of them filled; keywords are a list.

    wanted: fields without which a record is a Skip
    """
    for record in records:
        yield record, record if isinstance(record, Skip) else _paper(record, wanted)


def _paper(record: Record, wanted: tuple[str, ...]) -> dict | Skip:
    paper = _fields(record)
    if isinstance(paper, Skip):
        return paper
    if isinstance(record.data, str) and not paper.keys() >= set(wanted):
        return Skip("other_task", record.where, record.data, broken=False)
    if isinstance(paper.get("keywords"), str):
        paper["keywords"] = paper["keywords"].split("_")
    for field, value in paper.items():
        parts = value if field == "keywords" and isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            return Skip("wrong_type", record.where, str(record.data))
    if "keywords" in paper:
        paper["keywords"] = [word.strip() for word in paper["keywords"] if word.strip()]
    filled = {key: value for key, value in paper.items() if value and not str(value).isspace()}
    for field in wanted:
        if field not in filled:
            return Skip(f"no_{field}", record.where, str(record.data), broken=field in paper)
    return filled


def _fields(record: Record) -> dict | Skip:
    """What a record states of its paper, unchecked."""
    if isinstance(record.data, dict):
        # In csldcp "label" is the discipline; in CLUE's csl, whether the keywords are the paper's.
        label = str(record.data.get("label"))
        if label == "0":
            return Skip("false_keywords", record.where, str(record.data), broken=False)
        named = {KEYS.get(key, key): value for key, value in record.data.items()
                 if value is not None and (key != "label" or not label.isdigit())}  # fmt: skip
        return {key: value for key, value in named.items() if key in FIELDS}
    if not isinstance(record.data, str):
        return Skip("wrong_type", record.where, str(record.data))
    # A quoting reader would glue rows: fields may start with one '"'.
    columns = record.data.split("\t")
    if len(columns) == 3 and columns[0] in TASKS:
        return dict(zip(TASKS[columns[0]], columns[1:], strict=True))
    if len(columns) not in COLUMNS:
        return Skip("wrong_columns", record.where, record.data)
    return dict(zip(COLUMNS[len(columns)], columns, strict=True))
