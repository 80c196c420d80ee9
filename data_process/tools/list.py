"""The data sets: what they are, where they come from, and what of them is on this disk.

    python -m data_process.tools.list
    python -m data_process.tools.list --markdown      the same as a Markdown table, with links
    python -m data_process.tools.list --json          one JSON object a line, nothing shortened

raw: bytes under data/raw/<set>; kept: rows that data_process.run kept; tokens: of the token files,
by tokenizer. Columns without any entry are left out. Sets made under a name of their own (run's
--name) stand at the end. data_process.fetch downloads what is at HF (Hugging Face), ModelScope or
a URL, and says what to do by hand.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError, DataError
from babyllama.language import say
from data_process.registry import DataSet, catalog, data_sets

LONGEST = 24  # columns of a terminal's cell
LINKS = {
    "huggingface": ("HF", "https://huggingface.co/datasets/"),
    "modelscope": ("ModelScope", "https://www.modelscope.cn/datasets/"),
}


@dataclass(frozen=True)
class ListConfig:
    """Settings of data_process.tools.list.

    Args:
        root: directory with raw/, clean/ and tokens/
        markdown: print a Markdown table
        json: print one JSON object a line
    """

    root: Path = Path("data")
    markdown: bool = False
    json: bool = False


def main(cfg: ListConfig) -> None:
    """Print the table."""
    if cfg.markdown and cfg.json:
        raise ConfigError("wanted one of --markdown and --json, found both; leave one out")
    root = from_repo(cfg.root)
    known = [described(data_set) for name in catalog() for data_set in data_sets(name)]
    entries = known + own_sets(root, {entry["name"] for entry in known})
    for entry in entries:
        entry |= on_disk(entry["name"], root)
    if cfg.json:
        print(*(json.dumps(entry, ensure_ascii=False) for entry in entries), sep="\n")
    elif cfg.markdown:
        print(markdown([cells(entry, linked=True) for entry in entries]))
    else:
        print(aligned([cells(entry) for entry in entries]))


def described(data_set: DataSet) -> dict:
    """What the reader's file says of a set."""
    source = data_set.source
    return {
        "name": data_set.name,
        "kind": data_set.kind,
        "size": source.size,
        "rows": source.rows,
        "license": data_set.license,
        "home": source.home,
        "huggingface": source.huggingface,
        "modelscope": source.modelscope,
        "urls": list(source.urls),
        "package": data_set.package[0] if data_set.package else "",
        "manual": source.manual,
    }


def own_sets(root: Path, known: set[str]) -> list[dict]:
    """Finished sets that no reader is named after."""
    blank = dict.fromkeys(("size", "rows", "huggingface", "modelscope", "package", "manual"), "")
    found = []
    for path in sorted(root.glob("clean/*/counts.json")):
        if path.parent.name not in known:
            counts = read_counts(path)
            said = {key: str(counts.get(key, "")) for key in ("kind", "license")}
            home = str(counts.get("source", ""))
            found.append({"name": path.parent.name, **said, "home": home, "urls": [], **blank})
    return found


def read_counts(path: Path) -> dict:
    """counts.json as data_process.run leaves it."""
    try:
        counts = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        counts = None
    if not isinstance(counts, dict):
        raise DataError(
            f"{shown(path)}: wanted the counts of a finished set, found no JSON object; "
            f"delete the directory and run data_process.run again"
        )
    return counts


def on_disk(name: str, root: Path) -> dict:
    """What there is of a set: raw bytes, rows kept (None: not made), tokens of each tokenizer."""
    files = [path for path in (root / "raw" / name).rglob("[!.]*") if path.is_file()]
    counts = root / "clean" / name / "counts.json"
    tokens: dict[str, int] = {}
    for done in sorted(root.glob(f"tokens/*/{name}/*.done")):
        tokenizer = done.parent.parent.name
        if done.with_suffix(".bin").is_file():
            counted = read_counts(done).get("counts") or {}
            tokens[tokenizer] = tokens.get(tokenizer, 0) + counted.get("tokens", 0)
    return {
        "raw_bytes": sum(path.stat().st_size for path in files),
        "raw_unfinished": any(path.suffix == ".part" for path in files),
        "rows_kept": read_counts(counts).get("rows_out") if counts.is_file() else None,
        "tokens": tokens,
    }


def cells(entry: dict, linked: bool = False) -> dict[str, str]:
    """An entry as people read it.

    linked: places as Markdown links
    """
    raw = tqdm.format_sizeof(entry["raw_bytes"], "B") if entry["raw_bytes"] else ""
    kept = entry["rows_kept"]
    return {
        "name": entry["name"],
        "kind": entry["kind"],
        "size": entry["size"],
        "rows": entry["rows"],
        "licence": entry["license"],
        "from": ", ".join(_places(entry, linked)),
        "raw": raw + ", unfinished" * entry["raw_unfinished"],
        "kept": "" if kept is None else f"{kept:,}",
        "tokens": ", ".join(f"{name} {n:,}" for name, n in entry["tokens"].items()),
    }


def _places(entry: dict, linked: bool) -> Iterable[str]:
    for key, (label, address) in LINKS.items():
        if entry[key]:
            yield f"[{label}]({address}{entry[key]})" if linked else label
    if entry["urls"]:
        yield _home(entry, "URL", linked)
    if entry["package"]:
        yield "package"
    elif not (entry["huggingface"] or entry["modelscope"] or entry["urls"]):
        yield _home(entry, "by hand", linked)


def _home(entry: dict, label: str, linked: bool) -> str:
    page = re.match(r"[\w.-]+\.[a-z]{2,}(/\S*)?", entry["home"])
    return f"[{label}](https://{page[0]})" if linked and page else label


def width(text: str) -> int:
    """Columns of a text in a terminal: a Chinese character has two, a combining mark none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def shortened(text: str, limit: int = LONGEST) -> str:
    """A text of at most `limit` columns; "…" stands for what is missing."""
    if width(text) <= limit:
        return text
    while width(text) >= limit:
        text = text[:-1]
    return f"{text.rstrip()}…"


def columns(rows: list[dict[str, str]]) -> list[list[str]]:
    """The header and the rows, without columns in which nothing stands."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    return [names, *([row[name] for name in names] for row in rows)]


def aligned(rows: list[dict[str, str]]) -> str:
    """A table for the terminal."""
    table = [[shortened(say(cell)) for cell in row] for row in columns(rows)]
    widths = [max(map(width, column)) for column in zip(*table, strict=True)]
    lines = (
        "  ".join(cell + " " * (n - width(cell)) for cell, n in zip(row, widths, strict=True))
        for row in table
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: list[dict[str, str]]) -> str:
    """A table for a README."""
    header, *body = columns(rows)
    table = [header, ["---"] * len(header), *body]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table)
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


if __name__ == "__main__":
    run(main, parse(ListConfig, __doc__))
