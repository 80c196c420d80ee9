"""Titles of checkpoints' own for texts that have none, to fine-tune on.

    python -m babyllama.tuning.pseudo_labels out/release --rows data/clean/abstracts
    python -m babyllama.tuning.pseudo_labels release release/second --n 16    both vote
    python -m data_process.run csl --name own_titles --raw data/raw/own_titles --tokenizer FILE

Of many drawn replies the one most like the others is better than the greedy one, and costs as many
times more; a model that learns from such choices gives them greedily (Finkelstein and Freitag 2023,
arXiv:2309.10966). Titles that are blank, loop or are cut short are left out and counted. Written in
files of 500 texts as JSON lines with the keys "abst" and "title"; started again, the files that
are there are kept.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from babyllama.checkpoint import load_answering
from babyllama.config import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.generate import Weights
from babyllama.rows import read_rows, write_rows
from babyllama.sampling import SamplingConfig, repeats, squeeze
from babyllama.scoring.summarise import Asking, summarise_together

TEXTS_A_FILE = 500
LOOP_LENGTH, LOOP_TIMES = 4, 2  # four characters that stand twice: no title needs that


@dataclass(frozen=True)
class OwnTitlesConfig(SamplingConfig):
    """Which checkpoints read which texts.

    Args:
        checkpoints: fine-tuned runs (their newest steps) or single steps
        rows: a set's folder, whose train-*.jsonl are read, or one file; rows need a "text"
        out: folder for the titles
        min_chars: shorter texts are left out
        max_chars: longer texts are left out
        limit: only so many texts, the first
        prompts: wordings; the `eval` question is asked
        batch_size: replies written at once
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
        device: auto, cpu, cuda or mps
        n: replies of each checkpoint to each text, of which the consensus is taken
    """

    checkpoints: tuple[Path, ...] = (Path("release"),)
    rows: Path = Path("data/clean/abstracts")
    out: Path = Path("data/raw/own_titles")
    min_chars: int = 80
    max_chars: int = 600
    limit: int | None = None
    prompts: Path = Path("configs/prompts/summary_zh.yaml")
    batch_size: int = 48
    weights: Weights = "auto"
    device: Device = "auto"
    n: int = 24
    temperature: float = 0.8
    no_repeat_ngram: int = 3
    max_new_tokens: int = 48
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise ConfigError("wanted a checkpoint or several, found none; name one, as in release")
        if self.n < 2 or self.temperature == 0:
            raise ConfigError(
                f"wanted several drawn replies to choose from, found n {self.n} at temperature "
                f"{self.temperature:g}; try --n 24 --temperature 0.8"
            )
        limit = 1 if self.limit is None else self.limit
        if min(self.batch_size, limit, self.min_chars) < 1 or self.max_chars < self.min_chars:
            raise ConfigError(
                f"wanted batch_size, limit and min_chars of 1 or more and max_chars of min_chars "
                f"or more, found {self.batch_size}, {self.limit}, {self.min_chars} and "
                f"{self.max_chars}"
            )


def read_texts(place: Path, shortest: int, longest: int) -> tuple[list[str], int]:
    """The different texts of that length, in order, and how many rows are left out.

    raises: DataError if there is no file, a row has no text, or none is of that length
    """
    files = sorted(place.glob("train-*.jsonl")) if place.is_dir() else [place]
    if not files:
        raise DataError(
            f"{shown(place)}: wanted train-*.jsonl, found none; name a file, or make the set: "
            f"python -m data_process.run {place.name}"
        )
    rows = [(path, row) for path in files for row in read_rows(path)]
    for path, row in rows:
        if not isinstance(row.get("text"), str):
            raise DataError(
                f'{shown(path)}: wanted rows with a "text", found {", ".join(row)} in row '
                f"{row.get('id')}; dialogues have no title"
            )
    texts = dict.fromkeys(r["text"] for _, r in rows if shortest <= len(r["text"]) <= longest)
    if not texts:
        raise DataError(
            f"{shown(place)}: wanted texts of {shortest} to {longest} characters, found none in "
            f"{len(rows)} rows; change --min_chars and --max_chars"
        )
    return list(texts), len(rows) - len(texts)


def wrong(title: str, text: str) -> str | None:
    """Why a title is not worth learning, or None."""
    if not squeeze(title):
        return "blank"
    if len(title) >= len(text) / 2:
        return "as_long_as_half_the_text"
    if repeats(squeeze(title), LOOP_LENGTH, LOOP_TIMES):
        return "loops"
    return None


def keep_good(texts: Sequence[str], titles: Sequence[str]) -> tuple[list[dict], Counter[str]]:
    """Rows of abstract and title, and how many titles are left out, by reason."""
    rows, left_out = [], Counter()
    for text, title in zip(texts, titles, strict=True):
        reason = wrong(title, text)
        if reason:
            left_out[reason] += 1
        else:
            rows.append({"abst": text, "title": title})
    return rows, left_out


def main(cfg: OwnTitlesConfig) -> None:
    """Read, ask file by file, write."""
    texts, n_left = read_texts(from_repo(cfg.rows), cfg.min_chars, cfg.max_chars)
    texts = texts[: cfg.limit]
    device = pick_device(cfg.device)
    systems = [load_answering(from_repo(path), device) for path in cfg.checkpoints]
    ways = SamplingConfig(**{f.name: getattr(cfg, f.name) for f in fields(SamplingConfig)})
    how = Asking(ways, cfg.prompts, cfg.batch_size, cfg.weights)
    out, left_out = from_repo(cfg.out), Counter()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(texts)} texts, {n_left} rows of another length or double left out")
    for number, start in enumerate(range(0, len(texts), TEXTS_A_FILE)):
        path = out / f"titles-{number:05d}.jsonl"
        if path.exists():
            print(f"{shown(path)} is there")
            continue
        some = texts[start : start + TEXTS_A_FILE]
        rows, without = keep_good(some, summarise_together(systems, some, how).titles)
        left_out.update(without)
        write_rows(path, rows)
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(without.items()))
        print(f"{shown(path)}: {len(rows)} titles{reasons}")
    print(f"titles: {shown(out)} ({left_out.total()} left out)")


if __name__ == "__main__":
    run(main, parse(OwnTitlesConfig, __doc__, positional=["checkpoints"]))
