"""The rows that the vocabulary is learnt from: the texts in their shares, and some dialogues.

python -m release.recipe.vocabulary RAW --out data/vocabulary.jsonl
python tokenizer.py train --rows data/vocabulary.jsonl --vocab_size 16000 --out FILE
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from babyllama.config import from_repo, parse, run, shown
from babyllama.rows import read_rows, write_rows
from release.recipe.passages import HERE, objects

TEXTS = 0.4  # of how often stage 1 sees a text


@dataclass(frozen=True)
class VocabularyConfig:
    """Source and target.

    Args:
        raw: folder with the dialogues
        clean: folder with the cleaned texts
        out: the file of rows
    """

    raw: Path
    clean: Path = Path("data/clean")
    out: Path = Path("data/vocabulary.jsonl")


def texts(clean: Path, chance: random.Random) -> Iterator[str]:
    """The documents of stage 1, each as often as its weight says."""
    stage = yaml.safe_load((HERE / "pretrain/base.yaml").read_text("utf-8"))
    for source in stage["data"]["sources"]:
        times = source.get("weight", 1.0) * TEXTS
        for path in sorted((clean / source["name"]).glob("train-*.jsonl")):
            for row in read_rows(path):
                n = int(times) + (chance.random() < times - int(times))
                yield from [row["text"]] * n


def said(raw: Path, chance: random.Random) -> Iterator[str]:
    """Utterances of some dialogues."""
    wanted = [
        (message["content"], 0.15)
        for one in objects(raw / "dialogue/smilechat.jsonl.xz")
        for message in one["messages"]
    ]
    for one in objects(raw / "sft/alpaca_zh_train.jsonl.xz"):
        wanted += [(one[key], 1.0) for key in ("instruction", "input", "output")]
    for name in ("duconv_dev", "persona_dev"):
        for one in objects(raw / f"dialogue/{name}.jsonl.xz"):
            wanted += [(utterance, 0.7) for utterance in one["conversation"]]
    for text, share in wanted:
        if text and chance.random() < share:
            yield text


def main(cfg: VocabularyConfig) -> None:
    """Draw and write."""
    chance = random.Random(0)
    clean, raw, out = map(from_repo, (cfg.clean, cfg.raw, cfg.out))
    found = [*texts(clean, chance), *said(raw, chance)]
    n = write_rows(out, ({"id": f"v/{i}", "text": text} for i, text in enumerate(found)))
    print(f"{shown(out)}: {n:,} rows, {sum(map(len, found)):,} characters")


if __name__ == "__main__":
    run(main, parse(VocabularyConfig, __doc__, positional=("raw",)))
