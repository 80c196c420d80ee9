"""CSL: abstracts of Chinese papers, in any of the published layouts and for any of its tasks.

TSV without header   2 columns  title, abstract                     (the older CLGE release)
                     3 columns  "to title", abstract, title         (benchmark/ts; kg, cls_dcp …)
                     5 columns  title, abstract, keywords, discipline, category   (the full set)
JSON lines or list   "title", "abst" (csl_title_public); "abstract" or "content"; "keywords" …

All tasks were drawn from the full set and share their papers: clear the full set of the
benchmark's dev and test papers.
"""

from data_process.columns import Refused
from data_process.raw import Record, as_row

TASKS = {
    "to title": ("abstract", "title"),
    "to keywords": ("abstract", "keywords"),  # the abstract, a space, and the title
    "to discipline": ("abstract", "discipline"),
    "to category": ("title", "category"),
}
COLUMNS = {2: ("title", "abstract"), 5: ("title", "abstract", "keywords", "discipline", "category")}
KEYS = {"abst": "abstract", "content": "abstract", "text": "abstract", "summary": "title",
        "keyword": "keywords", "label": "discipline"}  # fmt: skip
META = ("keywords", "discipline", "category")


def title(record: Record) -> dict:
    """A pair with the abstract as text and the title as summary."""
    paper = paper_of(record, "abstract", "title")
    meta = {key: paper[key] for key in META if key in paper}
    fields = {"text": paper["abstract"], "summary": paper["title"]}
    return as_row(record, **fields, **({"meta": meta} if meta else {}))


def answer(record: Record, request: str, asked: list[str], wanted: str) -> dict:
    """A dialogue: of the fields `asked` about the first must be there, and the others follow it, as
    the title the abstract in benchmark/kg; answered is the field `wanted`. FewCLUE's csldcp too."""
    paper = paper_of(record, asked[0], wanted)
    question = request + "\n" + " ".join(paper[field] for field in asked if field in paper)
    found = paper[wanted]
    turns = (("user", question), ("assistant", "、".join(found) if wanted == "keywords" else found))
    return as_row(record, messages=[{"role": r, "content": c.strip()} for r, c in turns])


def paper_of(record: Record, *wanted: str) -> dict:
    """What a record states of its paper, all of it filled; keywords are a list.

    wanted: fields without which the record is Refused
    """
    paper = _fields(record)
    if isinstance(record.data, str) and not paper.keys() >= set(wanted):
        raise Refused("other_task")
    if isinstance(paper.get("keywords"), str):
        paper["keywords"] = paper["keywords"].split("_")
    for field, value in paper.items():
        parts = value if field == "keywords" and isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise Refused("wrong_type", f"{field}: {value!r:.40}; wanted text", broken=True)
    if "keywords" in paper:
        paper["keywords"] = [word.strip() for word in paper["keywords"] if word.strip()]
    filled = {key: value for key, value in paper.items() if value and not str(value).isspace()}
    for field in wanted:
        if field not in filled:
            found = ", ".join(record.data) if isinstance(record.data, dict) else "a line"
            known = ", ".join(key for key in (field, *KEYS) if KEYS.get(key, key) == field)
            raise Refused(f"no_{field}", f"columns {found}; known for {field} are {known}",
                          broken=field in paper)  # fmt: skip
    return filled


def _fields(record: Record) -> dict:
    data = record.data
    if isinstance(data, dict):
        # In csldcp "label" is the discipline; in CLUE's csl, whether the keywords are the paper's.
        label = str(data.get("label"))
        if label == "0":
            raise Refused("false_keywords")
        # Of two names for one field the first in the record counts.
        named: dict = {}
        for key, value in data.items():
            if value is not None and (key != "label" or not label.isdigit()):
                named.setdefault(KEYS.get(key, key), value)
        return {key: value for key, value in named.items() if key in COLUMNS[5]}
    if not isinstance(data, str):
        raise Refused("wrong_type", "a list; wanted an object or a line of TSV", broken=True)
    # A quoting reader would glue rows: fields may start with one '"'.
    columns = data.split("\t")
    if len(columns) == 3 and columns[0] in TASKS:
        return dict(zip(TASKS[columns[0]], columns[1:], strict=True))
    if len(columns) not in COLUMNS:
        raise Refused("wrong_columns", f"{len(columns)} columns; wanted 2, 3 or 5", broken=True)
    return dict(zip(COLUMNS[len(columns)], columns, strict=True))
