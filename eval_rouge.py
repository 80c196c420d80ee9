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
from babyllama.fast import Weights, make_decoder
from babyllama.generate import generate_replies
from babyllama.prompts import SummaryPrompts
from babyllama.rows import check_row, numbered_lines, row_kind, write_rows
from babyllama.sampling import SamplingConfig


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
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
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
    weights: Weights = "float32"
    max_new_tokens: int = 48
    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, found {value}")
        if self.n > 1:
            raise ConfigError(f"n {self.n}: each text gets one title; leave --n out")


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


def read_pairs(path: Path) -> list[dict]:
    """The summary rows of one file in any of the three formats.

    raises: DataError with file and line at the first line without a text and its title, or if
        there is no line
    """
    is_tsv = path.suffix == ".tsv"
    rows = []
    for number, line in numbered_lines(path):
        row = _from_tsv(line, f"{path.stem}/{number}") if is_tsv else _from_json(line)
        reason = check_row(row)
        if reason or row_kind(row) != "summary":
            wanted = "cells `to title`, abstract, title" if is_tsv else "keys id, text, summary"
            raise DataError(
                f"{shown(path)}:{number}: wanted a text with its title ({wanted}), found "
                f"{reason or row_kind(row)} in {line[:80]!r}; correct or remove the line, or name "
                f"another file"
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{shown(path)}: wanted texts with titles, found an empty file")
    return rows


def _from_tsv(line: str, row_id: str) -> object:
    """A row of CSL's folder ts; of its other folders, which hold no titles, nothing."""
    # No csv reader: abstracts hold single quotation marks, behind which it would swallow lines.
    cells = line.split("\t")
    if len(cells) != 3 or cells[0] != "to title":
        return cells
    return {"id": row_id, "text": cells[1], "summary": cells[2]}


def _from_json(line: str) -> object:
    """A row as it is, one of csl_title_public turned into ours, or what else stands there."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if isinstance(row, dict) and row.keys() == {"id", "abst", "title"}:
        return {"id": str(row["id"]), "text": row["abst"], "summary": row["title"]}
    return row


def ask(loaded: Loaded, texts: Sequence[str], cfg: EvalConfig) -> tuple[list[list[int]], int]:
    """The prompt for each text, and how many texts were cut to the context."""
    prompts = SummaryPrompts.load(from_repo(cfg.prompts), loaded.tokenizer)
    room = loaded.config.max_seq_len - cfg.max_new_tokens
    asked = [prompts.eval_prompt(text, room) for text in texts]
    return [ids for ids, _ in asked], sum(is_cut for _, is_cut in asked)


def summarise(loaded: Loaded, prompts: Sequence[list[int]], cfg: EvalConfig) -> list[str]:
    """A title for each prompt, in the order given."""
    # Like lengths together need little padding; the longest first show at once whether they fit.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    titles = [""] * len(prompts)
    decoder, tokenizer = make_decoder(loaded.model, cfg.weights), loaded.tokenizer
    with tqdm(total=len(prompts), desc=shown(loaded.path), unit=" texts") as bar:
        for start in range(0, len(order), cfg.batch_size):
            batch = order[start : start + cfg.batch_size]
            asked = [prompts[i] for i in batch]
            replies = generate_replies(decoder, asked, cfg, tokenizer.eos_id, tokenizer)
            for i, reply in zip(batch, replies, strict=True):
                titles[i] = reply.text.strip()
            bar.update(len(batch))
    return titles


def unframed(loaded: Loaded, titles: Sequence[str], cfg: EvalConfig) -> tuple[list[str], int]:
    """The titles without what an answer wording lays round them, and from how many it came off."""
    prompts = SummaryPrompts.load(from_repo(cfg.prompts), loaded.tokenizer)
    bare = [prompts.strip_frame(title).strip() for title in titles]
    return bare, sum(a != b for a, b in zip(titles, bare, strict=True))


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
    lines = [["", *head, "95 % of R-1 (1)", "length", "% empty", "% loops"]]
    for name, row in scores.items():
        means = [f["mean"] for measure in measures for f in row["rouge"][measure].values()]
        rest = [row["mean_length"], row["percent_empty"], row["percent_repeated_4gram"]]
        interval = "{low:.1f} - {high:.1f}".format(**row["rouge"][measures[0]]["rouge-1"])
        lines.append([name, *map("{:.1f}".format, means), interval, *map("{:.1f}".format, rest)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.rjust, line, widths)) for line in lines]
    notes = [f"({i}) {measure}" for i, measure in enumerate(measures, 1)]
    notes[0] += ": the protocol of published numbers"
    n_long = sum(row["n_too_long_for_rouge"] for row in scores.values())
    if n_long:
        notes.append(f"{n_long} texts were too long for (1); there they have the counts of (2)")
    notes.append("% loops: some run of 4 characters stands in the title twice")
    return "\n".join([*rows, "", *notes])


def samples(columns: dict[str, Sequence[str]], n: int = 5) -> str:
    """A few rows, spread evenly over the set: what belongs together stands in one block."""
    n_rows = len(columns["text"])
    chosen = sorted({i * (n_rows - 1) // (n - 1) for i in range(n)})
    return "\n\n".join(
        "\n".join(f"{name:<12}{' '.join(c[i].split())[:60]}" for name, c in columns.items())
        for i in chosen
    )


def load_models(cfg: EvalConfig) -> dict[str, Loaded]:
    """The checkpoint, and the base where one is named."""
    path = from_repo(cfg.checkpoint) if cfg.checkpoint else newest_run(kind="sft")
    if path is None:
        raise CheckpointError(
            "wanted a checkpoint, found no SFT run in out/; make one with `python sft.py`, or "
            "name one: python eval_rouge.py CHECKPOINT"
        )
    paths = {"checkpoint": path} | ({"base": from_repo(cfg.base)} if cfg.base else {})
    return {name: load_model(path, pick_device(cfg.device)) for name, path in paths.items()}


def choose_out(cfg: EvalConfig, checkpoint: Path, files: Sequence[Path]) -> Path:
    """Where the predictions go; refuses at the start what would fail after the last title."""
    name = cfg.data.stem if cfg.data else f"{cfg.dataset}-{cfg.split}"
    name += f"-{cfg.limit}" if cfg.limit else ""
    out = from_repo(cfg.out or checkpoint.parent / f"rouge-{name}-{checkpoint.name}.jsonl")
    if out.is_dir() or out.resolve() in [file.resolve() for file in files]:
        raise ConfigError(f"--out {shown(out)} is a directory or the data; name a new .jsonl file")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def about(cfg: EvalConfig, files: Sequence[Path], models: dict[str, Loaded]) -> dict:
    """What must be known to make the scores again."""
    return {
        "set": str(cfg.data) if cfg.data else cfg.dataset,
        "split": None if cfg.data else cfg.split,
        "data_sha256": hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest(),
        "models": {n: {"path": shown(m.path), "step": m.step} for n, m in models.items()},
        "decoding": {field.name: getattr(cfg, field.name) for field in fields(SamplingConfig)},
        "weights": cfg.weights,
        "batch_size": cfg.batch_size,
        "prompts": str(cfg.prompts),
    }


def main(cfg: EvalConfig) -> None:
    """Read, summarise, score, save, print."""
    files = find_files(cfg)
    rows = [row for file in files for row in read_pairs(file)][: cfg.limit]
    texts, references = ([row[key] for row in rows] for key in ("text", "summary"))
    models = load_models(cfg)
    out = choose_out(cfg, models["checkpoint"].path, files)
    asked = {name: ask(loaded, texts, cfg) for name, loaded in models.items()}
    n_cut = {name: n for name, (_, n) in asked.items()}

    began = perf_counter()
    titles = {name: summarise(models[name], prompts, cfg) for name, (prompts, _) in asked.items()}
    seconds = perf_counter() - began
    found = {name: unframed(models[name], replies, cfg) for name, replies in titles.items()}
    titles = {name: bare for name, (bare, _) in found.items()}
    n_framed = {name: n for name, (_, n) in found.items()}
    predictions = [
        {"id": row["id"], "text": row["text"], "reference": row["summary"], "prediction": title}
        for row, title in zip(rows, titles["checkpoint"], strict=True)
    ]
    write_rows(out, predictions)
    copies = {
        "first sentence": [metrics.first_sentence(text) for text in texts],
        "first 25 characters": [metrics.first_characters(text) for text in texts],
    }
    scores = {name: scores_of(found, references) for name, found in (titles | copies).items()}
    measured = {
        "n": len(rows),
        "n_cut": n_cut,
        "n_framed": n_framed,
        "seconds": seconds,
        "scores_x100": scores,
    }
    scores_file = out.with_suffix(".scores.json")
    write_rows(scores_file, [about(cfg, files, models) | measured])

    for name, loaded in models.items():
        print(f"{name}: {shown(loaded.path)}; {n_cut[name]} of {len(rows)} texts cut to fit, "
              f"{n_framed[name]} answers with a lead-in, which was taken off")  # fmt: skip
    print("", table(scores), "", sep="\n")
    print(samples({"text": texts, "reference": references} | titles))
    print(f"\npredictions: {shown(out)}\nscores: {shown(scores_file)}")


if __name__ == "__main__":
    run(main, parse(EvalConfig, __doc__, positional=["checkpoint"]))
