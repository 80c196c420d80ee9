"""Throughput and memory from JSON lines to token files, stage by stage.

    python -m benchmarks.data_speed              1 GB, one worker and two
    python -m benchmarks.data_speed --mb 100     a tenth of it

The text is generated from real text: documents of sentences drawn from the built-in news sample,
one in twenty a copy with some characters changed. MB are those of the raw file; rates are per
worker. Peak memory is that of the largest process. The last line is one JSON object.
"""

import hashlib
import json
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from babyllama.config import REPO, from_repo, parse, run
from babyllama.rows import read_rows
from data_process.run import ProcessConfig
from data_process.run import main as make
from data_process.vocabulary import train_vocabulary

SENTENCE = re.compile(r"[^。！？\n]{8,120}[。！？]")


@dataclass(frozen=True)
class DataSpeedConfig:
    """Settings of benchmarks.data_speed.

    Args:
        mb: size of the raw file
        workers: each number is one run
        tokenizer: a SentencePiece .model; trained on the sample if it is missing
        work: where the files go; null: a temporary directory
    """

    mb: int = 1000
    workers: tuple[int, ...] = (1, 2)
    tokenizer: Path = Path("data/tokenizers/sample.model")
    work: Path | None = None


def sample_texts(work: Path) -> list[str]:
    """The articles of the built-in sample."""
    make(ProcessConfig("inews", out=work / "sample"))
    return [row["text"] for row in read_rows(work / "sample/clean/inews/train-00000.jsonl")]


def write_raw(texts: list[str], path: Path, n_bytes: int) -> None:
    """Documents of about 500 characters until the file is as large as asked."""
    chance = random.Random(0)
    sentences = list(dict.fromkeys(s for text in texts for s in SENTENCE.findall(text)))
    last = ""
    with (
        open(path, "w", encoding="utf-8") as file,
        tqdm(total=n_bytes, unit="B", unit_scale=True, desc="generate", disable=None) as bar,
    ):
        written = 0
        while written < n_bytes:
            if last and chance.random() < 0.05:
                at = chance.randrange(len(last))
                text = last[:at] + "改" + last[at + 1 :]
            else:
                text = "".join(chance.choices(sentences, k=chance.randint(5, 18)))
            last = text
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            bar.update(len(line.encode()))


def command(raw: Path, out: Path, tokenizer: Path, workers: int) -> list[str]:
    """The run as a user types it."""
    engine = "serial" if workers == 1 else "processes"
    arguments = ["text", "--raw", raw, "--out", out, "--tokenizer", tokenizer,
                 "--engine", engine, "--workers", workers]  # fmt: skip
    return [sys.executable, "-m", "data_process.run", *map(str, arguments)]


def measure(raw: Path, out: Path, tokenizer: Path, workers: int) -> dict:
    """Seconds and MB/s of each stage and of all, and the largest process's memory."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(command(raw, out, tokenizer, workers), cwd=REPO, check=True)
    seconds = time.perf_counter() - start
    # Linux counts in KiB, macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    timing = json.loads((out / "clean/text/timing.json").read_text(encoding="utf-8"))["stages"]
    parts = {name: found["seconds"] for name, found in timing.items()}
    parts["pretokenize"] = seconds - sum(parts.values())
    mb = raw.stat().st_size / 1e6
    return {
        "workers": workers,
        "seconds": round(seconds, 1),
        "mb_per_s": round(mb / seconds, 2),
        "mb_per_s_per_worker": {
            name: round(mb / s / workers, 1) for name, s in parts.items() if s > 0
        },
        "peak_mb": round(peak / (2**20 if sys.platform == "darwin" else 2**10)),
    }


def digest(root: Path) -> str:
    """One number for all files that a later step reads."""
    total = hashlib.sha256()
    for path in sorted([*(root / "clean").rglob("*"), *(root / "tokens").rglob("*")]):
        if path.is_file() and path.name != "timing.json":
            total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


def main(cfg: DataSpeedConfig) -> None:
    """Generate, run once for each number of workers, print one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        work = cfg.work or Path(directory)
        work.mkdir(parents=True, exist_ok=True)
        texts = sample_texts(work)
        tokenizer = from_repo(cfg.tokenizer)
        if not tokenizer.is_file():
            tokenizer = work / "sample.model"
            train_vocabulary(texts, tokenizer, 6000)
        raw = work / "raw.jsonl"
        write_raw(texts, raw, cfg.mb * 1_000_000)
        runs, digests = [], set()
        for workers in cfg.workers:
            runs.append(measure(raw, work / "out", tokenizer, workers))
            digests.add(digest(work / "out"))
        result = {"mb": cfg.mb, "runs": runs, "same_bytes": len(digests) == 1}
        if len(runs) > 1:
            result["speedup"] = round(runs[0]["seconds"] / runs[1]["seconds"], 2)
        print(json.dumps(result))


if __name__ == "__main__":
    run(main, parse(DataSpeedConfig, doc=__doc__))
