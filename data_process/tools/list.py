"""The data sets: what they are, where they come from, and what of them is on this disk.

    python -m data_process.tools.list

raw: bytes under data/raw/<set>; kept: rows that data_process.run kept; tokens: of the token files,
by tokenizer. Columns without any entry are left out. Sets made under a name of their own (run's
--name) stand at the end. data_process.fetch downloads what is at HF (Hugging Face), ModelScope or
a URL, and says what to do by hand.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import DataError
from babyllama.language import say
from data_process.registry import DataSet, catalog, data_sets

LONGEST = 24  # columns of a terminal's cell


@dataclass(frozen=True)
class ListConfig:
    """Settings of data_process.tools.list.

    Args:
        root: directory with raw/, clean/ and tokens/
    """

    root: Path = Path("data")


def main(cfg: ListConfig) -> None:
    """Print the table."""
    root = from_repo(cfg.root)
    entries = [described(data_set) for name in catalog() for data_set in data_sets(name)]
    known = {entry["name"] for entry in entries}
    for path in sorted(root.glob("clean/*/counts.json")):
        if path.parent.name not in known:
            counts = read_counts(path)
            said = {"kind": str(counts.get("kind", "")), "licence": str(counts.get("license", ""))}
            entries.append(dict.fromkeys(entries[0], "") | {"name": path.parent.name} | said)
    show([entry | on_disk(entry["name"], root) for entry in entries])


def described(data_set: DataSet) -> dict[str, str]:
    """What the catalogue says of a set."""
    source = data_set.source
    there = {"HF": source.huggingface, "ModelScope": source.modelscope, "URL": source.urls,
             "package": data_set.package}  # fmt: skip
    return {
        "name": data_set.name,
        "kind": data_set.kind,
        "size": source.size,
        "rows": source.rows,
        "licence": data_set.license,
        "from": ", ".join(place for place in there if there[place]) or "by hand",
    }


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


def on_disk(name: str, root: Path) -> dict[str, str]:
    """What there is of a set: raw bytes, rows kept, tokens of each tokenizer."""
    files = [path for path in (root / "raw" / name).rglob("[!.]*") if path.is_file()]
    counts = root / "clean" / name / "counts.json"
    tokens: dict[str, int] = {}
    for done in sorted(root.glob(f"tokens/*/{name}/*.done")):
        tokenizer = done.parent.parent.name
        if done.with_suffix(".bin").is_file():
            counted = read_counts(done).get("counts") or {}
            tokens[tokenizer] = tokens.get(tokenizer, 0) + counted.get("tokens", 0)
    n_bytes = sum(path.stat().st_size for path in files)
    raw = tqdm.format_sizeof(n_bytes, "B") if n_bytes else ""
    return {
        "raw": raw + ", unfinished" * any(path.suffix == ".part" for path in files),
        "kept": f"{read_counts(counts).get('rows_out'):,}" if counts.is_file() else "",
        "tokens": ", ".join(f"{tokenizer} {n:,}" for tokenizer, n in tokens.items()),
    }


def show(rows: list[dict[str, str]]) -> None:
    """Print a table, without columns in which nothing stands."""
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(say(name), max_width=LONGEST, no_wrap=True)
    for row in rows:
        table.add_row(*(say(row[name]) for name in names))
    Console(width=(LONGEST + 2) * len(names), markup=False, emoji=False).print(table)


if __name__ == "__main__":
    run(main, parse(ListConfig, __doc__))
