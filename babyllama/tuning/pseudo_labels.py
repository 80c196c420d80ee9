"""Pseudo-labels: titles of our own checkpoints for abstracts that have none, to fine-tune on.

    python -m babyllama.tuning.pseudo_labels out/release --rows data/clean/abstracts
    python -m babyllama.tuning.pseudo_labels out/a out/b out/c       three teachers decide together
    python -m data_process.run csl --name own_titles --raw data/raw/own_titles --tokenizer FILE

The titles are those of the search behind every title that people see (scoring/summarise.py). A
student trained on what its ensemble agrees on comes near the ensemble (Freitag et al. 2017,
arXiv:1702.01802). Blank and looping replies and overlong titles are left out and counted. Written
in files of 500 rows as JSON lines with the keys "abst" and "title"; files of an earlier run are
kept, so a stopped run continues.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from babyllama.config import from_repo, parse, run, shown
from babyllama.device import pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.rows import read_rows, write_rows
from babyllama.sampling import repeats, squeeze
from babyllama.scoring.summarise import BEST, AskConfig, ReadyModel, load_answering, summarise

ROWS_A_FILE = 500


@dataclass(frozen=True)
class PseudoLabelConfig(AskConfig):
    """Checkpoints and the texts that they read.

    Args:
        checkpoints: fine-tuned runs (their newest steps) or single steps, which decide together
        rows: a set's folder, whose train-*.jsonl are read, or one file; rows need a "text"
        out: folder for the rows
        min_chars: shorter texts are left out
        max_chars: longer texts are left out
        limit: only so many texts, the first
    """

    checkpoints: tuple[Path, ...] = (Path("release"),)
    rows: Path = Path("data/clean/abstracts")
    out: Path = Path("data/raw/own_titles")
    min_chars: int = 80
    max_chars: int = 600
    limit: int | None = None
    batch_size: int = 64
    max_new_tokens: int = BEST.max_new_tokens
    temperature: float = BEST.temperature
    no_repeat_ngram: int = BEST.no_repeat_ngram
    beams: int = BEST.beams
    n: int = BEST.n
    length_penalty: float = BEST.length_penalty
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoints:
            raise ConfigError("wanted a checkpoint or several, found none; name one, as in release")
        if not 1 <= self.min_chars <= self.max_chars:
            raise ConfigError(
                f"wanted min_chars of 1 or more and max_chars of min_chars or more, found "
                f"{self.min_chars} and {self.max_chars}"
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


def fault(title: str, text: str) -> str | None:
    """Reason why a title is not worth training on, or None."""
    if not squeeze(title):
        return "blank"
    if len(title) >= len(text) / 2:
        return "as_long_as_half_the_text"
    return "loops" if repeats(squeeze(title), 4) else None


def keep_good(texts: Sequence[str], titles: Sequence[str]) -> tuple[list[dict], Counter[str]]:
    """Rows of abstract and title, and how many titles are left out, by reason."""
    pairs = list(zip(texts, titles, strict=True))
    faults = [fault(title, text) for text, title in pairs]
    rows = [
        {"abst": text, "title": title}
        for (text, title), reason in zip(pairs, faults, strict=True)
        if reason is None
    ]
    return rows, Counter(filter(None, faults))


def main(cfg: PseudoLabelConfig) -> None:
    """Read, ask file by file, write."""
    texts, n_left = read_texts(from_repo(cfg.rows), cfg.min_chars, cfg.max_chars)
    texts = texts[: cfg.limit]
    device = pick_device(cfg.device)
    loaded = [load_answering(from_repo(path), device) for path in cfg.checkpoints]
    models = [ReadyModel.of(one, cfg.weights) for one in loaded]
    sampling = cfg.alone
    out, left_out = from_repo(cfg.out), Counter()
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(texts)} texts, {n_left} rows of another length or double left out")
    for number, start in enumerate(range(0, len(texts), ROWS_A_FILE)):
        path = out / f"titles-{number:05d}.jsonl"
        if path.exists():
            print(f"{shown(path)} exists and is kept")
            continue
        some = texts[start : start + ROWS_A_FILE]
        made = summarise(models, some, sampling, cfg.batch_size, cfg.prompts)
        rows, without = keep_good(some, [each.title for each in made])
        left_out.update(without)
        write_rows(path, rows)
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(without.items()))
        print(f"{shown(path)}: {len(rows)} rows{reasons}")
    print(f"rows: {shown(out)} ({left_out.total()} left out)")


if __name__ == "__main__":
    run(main, parse(PseudoLabelConfig, __doc__, positional=["checkpoints"]))
