"""One's own files as what trains: rows, token files, and settings that fit them. No torch.

    python sft.py --rows my.jsonl           dialogues, instructions, texts with titles
    python pretrain.py --text diary.txt     texts

The layout is recognised by content: each reader that could fit tries the first records, and the one
that understands most of them reads all. Nothing is dropped for what it says, only for what cannot
train, each with its reason. The parts are divided by count, so that twelve rows have one to check
with, unless the files are named train and val; a test part is left alone.

    data/own/<name>-<key>/{train,val}-00000.jsonl   rows, as they are trained
                          {train,val}-00000.{bin,idx}
                          report.json               what was found (OwnData)
                          settings.yaml             for --config; flags come after it

The key belongs to the files' content and the tokenizer: changed files become another set, and a run
that reads the old one can still be continued.
"""

import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from babyllama.config import REPO, from_repo, shown, similar
from babyllama.errors import DataError
from babyllama.language.letters import likely_encoding
from babyllama.rows import check_row, write_rows
from data_process import formats
from data_process.clean import fix
from data_process.columns import known
from data_process.datasets.conversations import labelled, split_at_labels
from data_process.executor import key_of, write_whole
from data_process.formats import HEAD, format_of
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.raw import Part, Record, Skip, is_packed, records, sorted_files, split_of
from data_process.registry import data_sets
from data_process.stages import share_of
from tokenizer import LABELS, Tokenizer

Purpose = Literal["dialogue", "text"]
Rows = Iterable[dict | Skip]
# What could fit: words for it, and the entry of the catalogue whose reader is tried.
READERS = {
    "dialogue": (("dialogues", "instruction"), ("texts with titles", "pairs")),
    "text": (("texts", "text"),),
}
COMMANDS = {"dialogue": "sft.py --rows", "text": "pretrain.py --text"}
RULES = {"chat": "reference", "summary": "summary", "text": "text"}  # in clean.py
# Turns in a text file: 问：… 答：…
LABEL = re.compile(
    r"^\s*(问|用户|人类|Q|User|Human|答|助手|A|Assistant)\s*[:：]", re.IGNORECASE | re.MULTILINE
)
TRIED = 200  # records by which the layout is recognised
VAL_SHARE, MAX_VAL = 0.05, 500


@dataclass
class OwnData:
    """What was made of one's files.

    place: directory of the token files
    parts: number of rows and tokens by part
    left_out: rows that cannot train, by reason
    example: one row as it trains
    prompts: how the first rows to check with begin
    """

    name: str
    place: str
    kind: str
    layout: str
    parts: dict[str, dict[str, int]]
    left_out: dict[str, int]
    example: str
    prompts: list[str]

    def lines(self) -> list[str]:
        """What the user sees before training begins."""
        train, val = self.parts["train"], self.parts["val"]
        told = [
            f"data: {self.layout}; {train['rows']:,} rows to learn from and {val['rows']:,} to "
            f"check with, {train['tokens']:,} tokens; in {self.place}",
            f"a row as it trains: {self.example}",
        ]
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in self.left_out.items())
        return [*told, f"left out: {reasons}"] if reasons else told


def prepare(
    place: Path, purpose: Purpose, tokenizer: Tokenizer, ask: Callable[[str], bool]
) -> OwnData:
    """Rows and token files of one's own files, made once for a content and a tokenizer.

    place: a file or a folder
    ask: answers a question where something is unclear
    raises: DataError if the place is missing, not understood, or fewer than two rows can train
    """
    if not place.exists():
        raise DataError(f"{shown(place)}: wanted a file or a folder, found none{similar(place)}")
    if purpose == "dialogue":
        tokenizer.require_dialogue()
    files = sorted_files(place)[0]
    entries = [entry for readers in READERS.values() for _, entry in readers]
    code = [Path(formats.__file__), *(part for e in entries for part in data_sets(e)[0].key())]
    key = key_of(purpose, tokenizer.fingerprint, Path(__file__), *code, *map(str, files), *files)[
        :8
    ]
    name = re.sub(r"[^\w-]+", "-", place.resolve().stem).strip("-_") or "own"
    target = REPO / "data/own" / f"{name}-{key}"
    if not (target / "report.json").is_file():
        # Processes of one run may come here at once; each makes it alone, and one of them stays.
        fresh = target.with_name(f"tmp-{os.getpid()}-{target.name}")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        try:
            made = _make(_recognised(files, purpose, ask), name, fresh, target, tokenizer)
            write_whole(fresh / "report.json", json.dumps(asdict(made), ensure_ascii=False))
            if not target.exists():
                fresh.rename(target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return OwnData(**json.loads((target / "report.json").read_text("utf-8")))


class _Found(NamedTuple):
    """Files whose layout is known.

    kind: of the rows
    has_parts: the files' names say which part their rows belong to
    """

    layout: str
    kind: str
    rows: Rows
    has_parts: bool


def _recognised(files: list[Path], purpose: Purpose, ask: Callable[[str], bool]) -> _Found:
    """raises: DataError that says what stands there, if no reader understands it"""
    has_parts = len(files) > 1 or split_of(files[0].name) in (None, "train")
    if not has_parts and not ask(
        f"{files[0].name} is named like a part to score with; train on it?"
    ):
        raise DataError(f"{shown(files[0])}: left alone; name the file to train on")
    prose = [path for path in files if _is_prose(path)]
    if prose and prose != files:
        other = next(path for path in files if path not in prose)
        raise DataError(
            f"{shown(files[0].parent)}: wanted plain texts, or JSON and tables, found both "
            f"({prose[0].name}, {other.name}); put them into two folders"
        )
    if prose and purpose == "text":
        size = min(2000, max(200, sum(path.stat().st_size for path in prose) // 120))
        words = f"texts, in pieces of about {size} characters"
        return _Found(words, "text", _pieces(prose, size), has_parts)
    if prose:
        if not any(LABEL.match(line) for path in prose for line in _text_lines(path)):
            raise DataError(_wrong_script(prose[0], "text"))
        return _Found("dialogues with labels (问：… 答：…)", "chat", _labelled(prose), has_parts)
    first = list(islice(_records(files), TRIED))
    objects = (r.data for r in first if isinstance(r, Record) and isinstance(r.data, dict))
    keys, chosen = list(next(objects, ())), {}
    words, entry, n_rows = _best(first, READERS[purpose])
    if not n_rows and purpose == "dialogue" and len(keys) == 2:
        chosen = dict(zip(("question", "answer"), keys, strict=True))
        entry = "instruction"
        n_rows = _understood(first, entry, chosen)
        if n_rows and not ask(f"is {keys[0]!r} the question and {keys[1]!r} the answer?"):
            chosen = dict(zip(("answer", "question"), keys, strict=True))
    if not n_rows:
        raise DataError(_not_understood(files[0], first, keys, purpose))
    (data_set,) = data_sets(entry)
    rows = data_set.read(_records(files), columns=chosen)
    return _Found(f"{words} ({', '.join(keys)})", data_set.kind, rows, has_parts)


def _understood(first: list[Record | Skip], entry: str, columns: Mapping[str, str]) -> int:
    """Number of the first records that a reader makes a row of."""
    rows = data_sets(entry)[0].read(first, columns=columns)
    return sum(isinstance(row, dict) for row in rows)


def _best(first: list[Record | Skip], readers: tuple) -> tuple[str, str, int]:
    """Of several readers the one that makes most rows of the first records, and their number."""
    counted = [(words, entry, _understood(first, entry, {})) for words, entry in readers]
    return max(counted, key=lambda one: one[2])


def _not_understood(file: Path, first: list, keys: list[str], purpose: Purpose) -> str:
    """What to say of records that no reader makes a row of."""
    other: Purpose = "text" if purpose == "dialogue" else "dialogue"
    if _best(first, READERS[other])[2]:
        return _wrong_script(file, other)
    wanted = {
        "dialogue": "question and answer, instruction and output, messages, conversations, or "
        "title and content",
        "text": "text or content",
    }
    skipped = (f"{skip.reason} at {skip.where}" for skip in first if isinstance(skip, Skip))
    found = f"the keys {', '.join(keys)}" if keys else next(skipped, "no entry")
    return f"{shown(file)}: wanted entries with {wanted[purpose]}, found {found}; rename the keys"


def _wrong_script(file: Path, purpose: Purpose) -> str:
    what = "plain texts" if purpose == "text" else "questions and answers"
    return (
        f"{shown(file)}: these are {what}; train on them with: "
        f"python {COMMANDS[purpose]} {shown(file)}"
    )


def encoding_of(path: Path) -> str:
    """UTF-8, UTF-16, GB18030 or Big5.

    raises: DataError if the bytes are no text
    """
    found = likely_encoding(_head(path))
    if not found:
        raise DataError(f"{shown(path)}: wanted text, found a file of another kind; save it as "
                        f".txt, .docx, .csv, .xlsx or JSON lines")  # fmt: skip
    return found


def _is_prose(path: Path) -> bool:
    if path.suffix.lower() == ".docx":
        return True
    head = _head(path)
    if is_packed(head):
        return False
    return format_of(head, encoding_of(path), path.name, known()) in ("text", "document")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)


def _records(files: list[Path]) -> Iterator[Record | Skip]:
    """Every entry of tables, JSON files and archives."""
    for path in files:
        encoding = "utf-8-sig" if is_packed(_head(path)) else encoding_of(path)
        yield from records([Part(path, path.name)], encoding, columns=known())


def _text_lines(path: Path) -> Iterator[str]:
    if path.suffix.lower() == ".docx":
        with open(path, "rb") as file:
            yield from formats.paragraphs(path.name, file)
        return
    with open(path, encoding=encoding_of(path), errors="replace") as file:
        yield from (line.rstrip() for line in file)


def _pieces(files: list[Path], size: int) -> Rows:
    """The lines of texts, put together to pieces of at least `size` characters that end with a
    line; a longer line stays whole. No piece crosses files."""
    for path in files:
        piece, n_chars = [], 0
        for line in _text_lines(path):
            piece.append(line)
            n_chars += len(line)
            if n_chars >= size:
                yield {"id": 0, "text": "\n".join(piece), "split": split_of(path.name)}
                piece, n_chars = [], 0
        if n_chars:
            yield {"id": 0, "text": "\n".join(piece), "split": split_of(path.name)}


def _labelled(files: list[Path]) -> Rows:
    """Dialogues between blank lines; without blank lines each question with its answer."""
    for path in files:
        whole = "\n".join(_text_lines(path))
        blocks = [block for block in re.split(r"\n\s*\n", whole) if block.strip()]
        if len(blocks) == 1:
            blocks = re.split(r"(?m)^(?=\s*(?:问|用户|人类|Q|User|Human)\s*[:：])", whole)
        for block in filter(str.strip, blocks):
            before, turns = split_at_labels(LABEL, block)
            where = f"{path.name} {block.strip()[:20]!r}"
            if before.strip() or not turns:
                yield Skip("no_label", where, block)
                continue
            yield {"id": 0, "messages": labelled(turns), "split": split_of(path.name)}


def _make(found: _Found, name: str, fresh: Path, target: Path, tokenizer: Tokenizer) -> OwnData:
    """Write rows and token files of both parts into `fresh`, which will be `target`."""
    left_out: Counter[str] = Counter()
    kept = list(_kept(found, name, left_out))
    shares = [share_of(json.dumps(row, ensure_ascii=False)) for row, _ in kept]
    parts = _parts(shares, [part for _, part in kept])
    left_out["test_part"] = parts.count("test")
    if not {"train", "val"} <= set(parts):
        reasons = ", ".join(f"{reason} {n}" for reason, n in left_out.items() if n)
        raise DataError(
            f"{name}: wanted two rows at least, one to learn from and one to check with, found "
            f"{len(parts)}{f' (left out: {reasons})' if reasons else ''}; add some"
        )
    rows = [row | {"id": f"{name}/{n}"} for n, (row, _) in enumerate(kept)]
    first = [row.get("messages", [{"role": ""}])[0] for row in rows]
    # What every dialogue is told alike says nothing about any of them.
    persona = first[0]["role"] == "system" and all(turn == first[0] for turn in first)
    for row in rows if persona else ():
        del row["messages"][0]
    counts, examples = {}, {}
    for part in ("train", "val"):
        mine = [row for row, its_part in zip(rows, parts, strict=True) if its_part == part]
        path = fresh / f"{part}-00000.jsonl"
        write_rows(path, mine)
        cfg = PretokenizeConfig(tokenizer.path, found.kind)
        counts[part] = pretokenize_shard(path, path.with_suffix(""), cfg)
        del counts[part]["files"]
        examples[part] = mine[:2]
    layout = found.layout + "; their one system text is left out" * persona
    return OwnData(
        name, shown(target), found.kind, layout, counts, {k: n for k, n in left_out.items() if n},
        as_it_trains(examples["train"][0]), [beginning(row) for row in examples["val"]],
    )  # fmt: skip


def _kept(found: _Found, name: str, left_out: Counter[str]) -> Iterator[tuple[dict, str | None]]:
    """The rows that can train, cleaned, each once, with the part that its file is named after."""
    seen = set()
    for item in found.rows:
        if isinstance(item, Skip):
            left_out[item.reason] += 1
            continue
        part = item.pop("split", None) if found.has_parts else None
        item.pop("split", None)
        item.pop("unused", None)
        row, _ = fix(item | {"id": f"{name}/0"}, RULES[found.kind])
        digest = key_of(row)[:16]
        reason = check_row(row) or ("duplicate" if digest in seen else None)
        if reason:
            left_out[reason] += 1
            continue
        seen.add(digest)
        yield row, part


def _parts(shares: list[float], named: list[str | None]) -> list[str]:
    """The part of each row: as its file is named, or, where no file is named val, val for the
    twentieth of the rows whose content has the smallest hashes, but one at least."""
    parts = [part or "train" for part in named]
    if "val" not in parts:
        free = sorted((share, n) for n, share in enumerate(shares) if parts[n] == "train")
        n_val = min(MAX_VAL, max(1, round(VAL_SHARE * len(free)))) if len(free) > 1 else 0
        for _, n in free[:n_val]:
            parts[n] = "val"
    return parts


def as_it_trains(row: dict, most: int = 70) -> str:
    """A row in one line; what is learnt stands in 【】."""

    def short(content: str) -> str:
        content = content.replace("\n", "⏎")
        return content if len(content) <= most else content[:most] + "…"

    if "messages" in row:
        return " ".join(
            LABELS[m["role"]]
            + (f"【{short(m['content'])}】" if m["role"] == "assistant" else short(m["content"]))
            for m in row["messages"][:4]
        )
    if "summary" in row:
        return f"{short(row['text'])} →【{short(row['summary'])}】"
    return f"【{short(row['text'])}】"


def beginning(row: dict) -> str:
    """What a run asks or continues, to show what it learns of a row to check with."""
    if "messages" in row:
        return next(m["content"] for m in row["messages"] if m["role"] == "user")[:100]
    return row["text"][: 8 if "summary" not in row else 100]


def confirm(question: str) -> bool:
    """The user's answer; where nobody can be asked it is yes, and that is said."""
    asks = sys.stdin.isatty() and sys.stderr.isatty()
    print(question, "[Y/n] " if asks else "(no terminal to ask: yes)", file=sys.stderr)
    return not asks or input().strip().lower() not in ("n", "no", "否", "不")


def settings_for(
    place: Path,
    purpose: Purpose,
    base: Path | None,
    name: str | None,
    read_base: Callable[[Path | None], tuple[Path, Path, Any]],
) -> Path:
    """Prepare one's own files for a base, say what was found, and write the settings.

    base: a run or checkpoint, None: release
    read_base: where the base and its newest checkpoint lie, and its shape (model.ModelConfig)
    """
    base, checkpoint, shape = read_base(base)
    print(f"base: {shown(base)}, {shape.n_parameters:,} parameters", file=sys.stderr)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    found = prepare(from_repo(place), purpose, tokenizer, confirm)
    print(*found.lines(), sep="\n", file=sys.stderr)
    return write_settings(found, base, shape, tokenizer.path, name)


def write_settings(own: OwnData, base: Path, shape: Any, tokenizer: Path, name: str | None) -> Path:
    """The file of settings that fit the data and the base; small sets are seen more often, in
    smaller batches, and every schedule ends within its steps."""
    rows, is_text = own.parts["train"]["rows"], own.kind == "text"
    if is_text:
        tokens = own.parts["train"]["tokens"]
        length = min(shape.max_seq_len, next((n for n in (512, 256) if tokens >= 64 * n), 128))
        rows = max(1, tokens // length)
    epochs = min(12.0 if is_text else 20.0, max(1.0, 60 * rows**-0.3))
    batch = min(64, max(2, 2 ** round(math.log2(rows) / 2)))
    steps = max(1, round(epochs * rows / batch))
    settings = {
        "name": name or _free_name(own, shown(base)),
        "base": shown(base),
        **({"tokenizer": shown(tokenizer)} if is_text else {}),
        "data": {"sources": [{"name": own.place}], **({"max_seq_len": length} if is_text else {})},
        "optim": {
            "lr": float(f"{1e-3 * min(1, (2.5e6 / shape.n_parameters) ** 0.5):.1e}"),
            "warmup_steps": steps // 10,
        },
        "train": {
            "max_steps": steps, "batch_size": batch, "micro_batch_size": min(8, batch),
            "log_every": max(1, steps // 10), "eval_every": max(1, -(-steps // 4)),
            "save_every": min(500, steps), "keep": 1, "keep_best": False,
            "samples": own.prompts,
        },
    }  # fmt: skip
    path = REPO / own.place / "settings.yaml"
    script = "pretrain.py" if is_text else "sft.py"
    head = f"# Settings that fit these rows and this base: python {script} --config {shown(path)}\n"
    write_whole(path, head + yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))
    return path


def _free_name(own: OwnData, base: str) -> str:
    """The data's name, with a number where a run of that name read other rows or began from
    another base; a run of the same is so continued."""
    for number in count(1):
        name = own.name if number == 1 else f"{own.name}-{number}"
        saved = REPO / "out" / name / "config.yaml"
        text = saved.read_text("utf-8", errors="replace") if saved.is_file() else ""
        if not text or (own.place in text and re.search(f"^base: {re.escape(base)}$", text, re.M)):
            return name
    raise AssertionError
