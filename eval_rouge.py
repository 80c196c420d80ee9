"""Summarise a test set in batches; print ROUGE-1/2/L beside what copying the text scores.

    python eval_rouge.py                                     newest SFT run, headlines of iNews
    python eval_rouge.py out/csl --dataset csl --base out/wiki
    python eval_rouge.py out/csl --data data/raw/csl/ts/test.tsv --limit 100
    python eval_rouge.py out/csl --dataset csl --temperature 0.8 --top_p 0.9 --seed 1

Greedy unless a temperature is given. --out gets the predictions as JSON lines with the keys id,
text, reference and prediction; the scores stand beside it in <out>.scores.json, with all that is
needed to make them again. The three measures and their traps: babyllama/metrics.py.
"""

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
from tqdm import tqdm

from babyllama import metrics
from babyllama.checkpoint import Loaded, load_model, newest_run
from babyllama.cli import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.generate import SamplingConfig, generate
from babyllama.prompts import SummaryPrompts
from babyllama.rows import check_row, read_lines, row_kind, write_rows


@dataclass(frozen=True)
class EvalConfig(SamplingConfig):
    """What is summarised, by which checkpoint, and how.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest SFT run in out/
        base: a second checkpoint for the same table, usually the one before SFT
        dataset: a set; its data/clean/<dataset>/<split>-*.jsonl are read
        split: which part of the set
        data: one file instead: summary rows (.jsonl), CSL's TSV, csl_title_public's JSON lines
        out: file for the predictions; if absent in the checkpoint's run
        limit: only so many rows, the first
        batch_size: texts summarised at once
        prompts: wordings; the `eval` question is asked
        device: auto, cpu, cuda or mps
    """

    checkpoint: Path | None = None
    base: Path | None = None
    dataset: str = "inews_title"
    split: Literal["test", "val"] = "test"
    data: Path | None = None
    out: Path | None = None
    limit: int | None = None
    batch_size: int = 32
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    device: Device = "auto"
    max_new_tokens: int = 48
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")


@dataclass(frozen=True)
class Pair:
    """A text and the title that people gave it."""

    id: str
    text: str
    title: str


def find_files(cfg: EvalConfig) -> list[Path]:
    """The files of the set that is asked for, in order."""
    if cfg.data:
        return [from_repo(cfg.data)]
    directory = from_repo(Path("data/clean") / cfg.dataset)
    files = sorted(directory.glob(f"{cfg.split}-*.jsonl"))
    if not files:
        raise DataError(
            f"wanted {cfg.split}-*.jsonl in {shown(directory)}, found none; make the set with "
            f"`python -m data_process.run {cfg.dataset}`, or name a file with --data"
        )
    return files


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of one file in any of the three formats.

    raises: DataError with file and line at the first line that is no pair, or if there is none
    """
    read_line = _tsv_pair if path.suffix == ".tsv" else _json_pair
    pairs = []
    for number, line in enumerate(read_lines(path), 1):
        pair = read_line(line, f"{shown(path)}:{number}")
        if not pair.text.strip() or not pair.title.strip():
            raise DataError(
                f"{shown(path)}:{number}: wanted a text and its title, found one of them empty "
                f"in {line[:80]!r}; remove the row"
            )
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{shown(path)}: wanted texts with titles, found an empty file")
    return pairs


def _tsv_pair(line: str, where: str) -> Pair:
    # No csv reader: abstracts hold single quotation marks, behind which it would swallow lines.
    cells = line.split("\t")
    if len(cells) != 3 or cells[0] != "to title":
        raise DataError(
            f"{where}: wanted `to title`, abstract, title between tabs, found {len(cells)} cells "
            f"in {line[:80]!r}; CSL has such rows in its folder ts"
        )
    return Pair(Path(where).name, cells[1], cells[2])


def _json_pair(line: str, where: str) -> Pair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(
            f"{where}: wanted one JSON object a line, found {line[:80]!r}; name a .jsonl file, "
            f"or a .tsv file of CSL"
        ) from None
    if isinstance(row, dict) and row.keys() == {"id", "abst", "title"}:
        return Pair(str(row["id"]), str(row["abst"]), str(row["title"]))
    reason = check_row(row)
    if reason or row_kind(row) != "summary":
        raise DataError(
            f"{where}: wanted the keys id, text, summary (or id, abst, title) with text in them, "
            f"found {reason or 'no title'} in {line[:80]!r}"
        )
    return Pair(row["id"], row["text"], row["summary"])


def summarise(loaded: Loaded, texts: Sequence[str], cfg: EvalConfig) -> tuple[list[str], int]:
    """A title for each text, in the order given, and how many texts were cut to the context."""
    prompts = SummaryPrompts.load(from_repo(cfg.prompts), loaded.tokenizer)
    room = loaded.config.max_seq_len - cfg.max_new_tokens
    asked = [prompts.eval_prompt(text, room) for text in texts]
    ids = [prompt for prompt, _ in asked]
    # Like lengths together need little padding; the longest first show at once whether they fit.
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    titles = [""] * len(ids)
    with tqdm(total=len(ids), desc=shown(loaded.path), unit=" texts") as bar:
        for start in range(0, len(order), cfg.batch_size):
            batch = order[start : start + cfg.batch_size]
            replies = generate(loaded.model, [ids[i] for i in batch], cfg, loaded.tokenizer.eos_id)
            for i, reply in zip(batch, replies, strict=True):
                titles[i] = loaded.tokenizer.decode(reply).strip()
            bar.update(len(batch))
    return titles, sum(is_cut for _, is_cut in asked)


def scores_of(predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Every score of one line of the table, times 100 where it is a share."""
    measures = [measure(predictions, references) for measure in metrics.ROUGE_MEASURES]
    statistics = metrics.text_statistics(predictions)
    return {
        "rouge": {
            found.measure: {name: _mean_and_interval(100 * f) for name, f in found.f.items()}
            for found in measures
        },
        "n_too_long_for_rouge": measures[0].n_long,
        "mean_length": statistics["mean_length"],
        "percent_empty": 100 * statistics["share_empty"],
        "percent_repeated_4gram": 100 * statistics["share_repeated_4gram"],
    }


def _mean_and_interval(f: np.ndarray) -> dict[str, float]:
    low, high = metrics.bootstrap_interval(f)
    return {"mean": float(f.mean()), "low": low, "high": high}


def table(scores: dict[str, dict]) -> str:
    """One line a system; the measures are numbered and named beneath."""
    measures = list(next(iter(scores.values()))["rouge"])
    head = [f"R-{n} ({i})" for i in range(1, len(measures) + 1) for n in "12L"]
    lines = [["", *head[:3], "95 % of R-1", *head[3:], "length", "% empty", "% loops"]]
    for label, row in scores.items():
        means = [f"{f['mean']:.1f}" for name in measures for f in row["rouge"][name].values()]
        headline = row["rouge"][measures[0]]["rouge-1"]
        interval = f"{headline['low']:.1f} - {headline['high']:.1f}"
        rest = [row["mean_length"], row["percent_empty"], row["percent_repeated_4gram"]]
        lines.append([label, *means[:3], interval, *means[3:], *(f"{x:.1f}" for x in rest)])
    notes = [f"({i}) {name}" for i, name in enumerate(measures, 1)]
    notes[0] += ": the protocol of published numbers"
    notes.append("loops: some run of 4 characters stands in the title twice")
    n_long = sum(row["n_too_long_for_rouge"] for row in scores.values())
    if n_long:
        notes.append(f"{n_long} texts were too long for (1); there they have the counts of (2)")
    return "\n".join([aligned(lines), "", *notes])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns, the first flush left, the others right; a Chinese character is two wide."""
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([first + _gap(first, widths[0]), *(_gap(c, w) + c for c, w in zip(
            others, widths[1:], strict=True))])
        for first, *others in lines
    )


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _gap(text: str, width: int) -> str:
    return " " * (width - _width(text))


def samples(columns: dict[str, Sequence[str]], n: int = 5) -> str:
    """A few rows, spread evenly over the set, what belongs together one beneath the other."""
    n_rows = len(columns["text"])
    chosen = sorted({i * (n_rows - 1) // max(n - 1, 1) for i in range(n)})
    width = max(map(_width, columns))
    return "\n\n".join(
        "\n".join(
            f"{label}{_gap(label, width)}  {' '.join(column[i].split())[:60]}"
            for label, column in columns.items()
        )
        for i in chosen
    )


def sha256_of(files: Sequence[Path]) -> str:
    """One hash over the bytes of all files, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def choose_out(cfg: EvalConfig, loaded: Loaded, files: Sequence[Path]) -> Path:
    """Where the predictions go; refuses at the start what would fail after the last title."""
    name = cfg.data.stem if cfg.data else f"{cfg.dataset}-{cfg.split}"
    out = from_repo(cfg.out or loaded.path.parent / f"rouge-{name}-{loaded.path.name}.jsonl")
    if out.is_dir() or out in files:
        raise ConfigError(f"--out {shown(out)} is a directory or the data; name a new .jsonl file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def main(cfg: EvalConfig) -> None:
    """Read, summarise, save the titles, score, save the scores, print."""
    files = find_files(cfg)
    pairs = [pair for file in files for pair in read_pairs(file)][: cfg.limit]
    texts, references = [pair.text for pair in pairs], [pair.title for pair in pairs]
    path = from_repo(cfg.checkpoint) if cfg.checkpoint else newest_run(kind="sft")
    if path is None:
        raise CheckpointError(
            "wanted a checkpoint, found no SFT run in out/; make one with `python sft.py`, or "
            "name one: python eval_rouge.py CHECKPOINT"
        )
    device = pick_device(cfg.device)
    loaded = load_model(path, device)
    base = load_model(from_repo(cfg.base), device) if cfg.base else None
    out = choose_out(cfg, loaded, files)

    began = perf_counter()
    predictions, n_cut = summarise(loaded, texts, cfg)
    seconds = perf_counter() - began
    rows = [
        {"id": pair.id, "text": pair.text, "reference": pair.title, "prediction": prediction}
        for pair, prediction in zip(pairs, predictions, strict=True)
    ]
    write_rows(out, rows)
    titles = {"checkpoint": predictions}
    if base:
        titles["base"], _ = summarise(base, texts, cfg)
    copies = {
        "first sentence": [metrics.first_sentence(text) for text in texts],
        "first 25 characters": [metrics.first_characters(text) for text in texts],
    }
    scores = {name: scores_of(found, references) for name, found in (titles | copies).items()}
    result = {
        "set": str(cfg.data) if cfg.data else cfg.dataset,
        "split": None if cfg.data else cfg.split,
        "n": len(pairs),
        "data_sha256": sha256_of(files),
        "checkpoint": shown(loaded.path),
        "step": loaded.step,
        "base": shown(base.path) if base else None,
        "decoding": {field.name: getattr(cfg, field.name) for field in fields(SamplingConfig)},
        "batch_size": cfg.batch_size,
        "prompts": str(cfg.prompts),
        "texts_cut_to_context": n_cut,
        "seconds": round(seconds, 1),
        "scores_times_100": scores,
    }
    write_rows(out.with_suffix(".scores.json"), [result])

    print(samples({"text": texts, "reference": references, **titles}), end="\n\n")
    ...
