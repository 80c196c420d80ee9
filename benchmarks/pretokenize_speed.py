"""How fast the pre-tokenizer is beside a bare SentencePiece loop, and whether its memory grows.

    python -m benchmarks.pretokenize_speed
    python -m benchmarks.pretokenize_speed --tokenizer data/tokenizers/big.model --repeats 5

Both take the same rows in the same process, in turns, with one thread; the best of the repeats
counts. The bare loop has the texts in memory and only encodes; ours also reads and checks the
rows and writes the token file. Peak memory is that of a fresh process for the same rows once and
four times. The text is the built-in sample; a vocabulary is trained on it if there is none. The
last line is one JSON object.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import sentencepiece

from babyllama.cli import REPO, from_repo, parse, run
from babyllama.rows import read_rows, texts_of
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
from data_process.run import ProcessConfig
from data_process.run import main as make
from tokenizer import train_vocabulary

MEMORY_OF_ONE = """
import resource, sys
from pathlib import Path
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
source, target, tokenizer = map(Path, sys.argv[1:])
pretokenize_shard(source, target, PretokenizeConfig(tokenizer, "text"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of benchmarks.pretokenize_speed.

    Args:
        tokenizer: a SentencePiece .model; trained on the sample if it is missing
        repeats: how often both are timed
    """

    tokenizer: Path = Path("data/tokenizers/sample.model")
    repeats: int = 3


def bare_seconds(texts: list[str], model: Path) -> float:
    """Time to encode all texts with SentencePiece alone, one by one."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = perf_counter()
    for text in texts:
        processor.encode(text)
    return perf_counter() - start


def our_seconds(source: Path, work: Path, model: Path) -> float:
    """Time to turn a file of rows into a token file."""
    start = perf_counter()
    pretokenize_shard(source, work / "speed", PretokenizeConfig(model, "text"))
    return perf_counter() - start


def peak_mb(source: Path, work: Path, model: Path) -> float:
    """Peak resident memory of a process that makes one token file."""
    command = [sys.executable, "-c", MEMORY_OF_ONE, source, work / "memory", model]
    done = subprocess.run([*map(str, command)], cwd=REPO, capture_output=True, check=True)
    # Linux counts in KiB, macOS in bytes.
    return int(done.stdout) / (2**20 if sys.platform == "darwin" else 2**10)


def main(cfg: SpeedConfig) -> None:
    """Make the input, time both, measure memory, print one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make(ProcessConfig("inews", out=work))
        source = work / "clean/inews/train-00000.jsonl"
        texts = [text for row in read_rows(source) for text in texts_of(row)]
        model = from_repo(cfg.tokenizer)
        if not model.is_file():
            model = work / "sample.model"
            train_vocabulary(texts, model, 6000)
        pairs = [
            (our_seconds(source, work, model), bare_seconds(texts, model))
            for _ in range(cfg.repeats)
        ]
        ours, bare = (min(seconds) for seconds in zip(*pairs, strict=True))
        four = work / "four.jsonl"
        four.write_bytes(source.read_bytes() * 4)
        n_chars = sum(map(len, texts))
        print(
            f"{n_chars:,} characters, best of {cfg.repeats}: ours {ours:.2f} s, bare {bare:.2f} s"
        )
        peaks = [peak_mb(path, work, model) for path in (source, four)]
        print(
            json.dumps(
                {
                    "ours_chars_per_s": round(n_chars / ours),
                    "bare_chars_per_s": round(n_chars / bare),
                    "ratio": round(bare / ours, 3),
                    "peak_mb_1x": round(peaks[0], 1),
                    "peak_mb_4x": round(peaks[1], 1),
                }
            )
        )


if __name__ == "__main__":
    run(main, parse(SpeedConfig, doc=__doc__))
