"""How fast the pre-tokenizer is beside others, and whether its memory grows.

    python -m benchmarks.pretokenize_speed
    python -m benchmarks.pretokenize_speed --tokenizer data/tokenizers/big.model --repeats 5
    python -m benchmarks.pretokenize_speed --peer_python DIR/bin/python    also datasets.map

All take the same rows with one thread, in turns; the best of the repeats counts.
    bare    SentencePiece over texts in memory, nothing read or written
    list    the usual script: all ids appended to one list, written at the end
    map     `datasets.map` with the fast tokenizer of transformers, batched, saved to disk
Ours reads and checks the rows and writes the token file. Peak memory is that of a fresh process
for the same rows once and four times. The text is the built-in sample; a vocabulary is trained
on it if there is none. The last line is one JSON object.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import sentencepiece
from tqdm import tqdm

from babyllama.config import REPO, from_repo, parse, run
from babyllama.errors import ConfigError
from babyllama.rows import read_rows, texts_of
from data_process.run import ProcessConfig
from data_process.run import main as make
from tokenizer import train_vocabulary

REPORT = """
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.platform == "linux":  # where ru_maxrss begins with the memory of the process that started us
    peak = int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
print(json.dumps([seconds, peak]))
"""
OURS = """
import json, resource, sys, time
from pathlib import Path
from data_process.pretokenize import PretokenizeConfig, pretokenize_shard
source, target, tokenizer = map(Path, sys.argv[1:])
start = time.perf_counter()
pretokenize_shard(source, target, PretokenizeConfig(tokenizer, "text"))
"""
LIST = """
import json, resource, sys, time
import numpy as np, sentencepiece
source, target, tokenizer = sys.argv[1:]
processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
start = time.perf_counter()
ids = []
for line in open(source, encoding="utf-8"):
    ids += processor.encode(json.loads(line)["text"]) + [processor.eos_id()]
np.array(ids, dtype=np.uint16).tofile(target)
"""
MAP = """
import json, resource, shutil, sys, tempfile, time
import datasets
from transformers import PreTrainedTokenizerFast
source, target, tokenizer = sys.argv[1:]
target += ".saved"
shutil.rmtree(target, ignore_errors=True)
datasets.disable_progress_bars()
fast = PreTrainedTokenizerFast(tokenizer_file=tokenizer + ".json")
def encode(batch):
    return {"input_ids": fast(batch["text"], add_special_tokens=False)["input_ids"]}
start = time.perf_counter()
with tempfile.TemporaryDirectory() as cache:
    rows = datasets.load_dataset("json", data_files=source, split="train", cache_dir=cache)
    rows.map(encode, batched=True, remove_columns=rows.column_names).save_to_disk(target)
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class SpeedConfig:
    """Settings of benchmarks.pretokenize_speed.

    Args:
        tokenizer: a SentencePiece .model; trained on the sample if it is missing
        repeats: how often each is timed
        copies: how many times the sample's text is taken
        peer_python: a Python that has the packages datasets and transformers
    """

    tokenizer: Path = Path("data/tokenizers/sample.model")
    repeats: int = 3
    copies: int = 1
    peer_python: Path | None = None


def bare_seconds(texts: list[str], model: Path) -> float:
    """Time to encode all texts with SentencePiece alone, one by one."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = perf_counter()
    for text in texts:
        processor.encode(text)
    return perf_counter() - start


def measure(program: str, python: Path, source: Path, work: Path, model: Path) -> tuple:
    """(seconds, peak MB) of a program in a fresh process."""
    command = [python, "-c", program + REPORT, source, work / "made", model]
    environment = os.environ | ONE_THREAD
    done = subprocess.run(
        [*map(str, command)], cwd=REPO, env=environment, capture_output=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"a peer failed in {python}: {done.stderr.decode()[-300:]!r}")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    # Linux counts in KiB, macOS in bytes.
    return seconds, peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_fast_tokenizer(model: Path) -> None:
    """The same vocabulary as transformers' fast tokenizer, in <model>.json."""
    from transformers import LlamaTokenizerFast

    fast = LlamaTokenizerFast(vocab_file=str(model), legacy=False, add_bos_token=False)
    fast.backend_tokenizer.save(f"{model}.json")


def main(cfg: SpeedConfig) -> None:
    """Make the input, time all in turns, measure memory, print one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        make(ProcessConfig("inews", out=work))
        sample = work / "clean/inews/train-00000.jsonl"
        texts = [text for row in read_rows(sample) for text in texts_of(row)] * cfg.copies
        model = work / "sample.model"
        if from_repo(cfg.tokenizer).is_file():
            shutil.copyfile(from_repo(cfg.tokenizer), model)
        else:
            train_vocabulary(texts, model, 6000)
        source, four = work / "one.jsonl", work / "four.jsonl"
        source.write_bytes(sample.read_bytes() * cfg.copies)
        four.write_bytes(source.read_bytes() * 4)
        programs = {"ours": (OURS, Path(sys.executable)), "list": (LIST, Path(sys.executable))}
        if cfg.peer_python:
            write_fast_tokenizer(model)
            programs["map"] = (MAP, cfg.peer_python)
        seconds: dict[str, list[float]] = {name: [] for name in ("bare", *programs)}
        peaks = {}
        for _ in tqdm(range(cfg.repeats), "repeats"):
            seconds["bare"].append(bare_seconds(texts, model))
            for name, (program, python) in programs.items():
                found = measure(program, python, source, work, model)
                seconds[name].append(found[0])
                peaks[name] = [round(found[1], 1)]
        for name, (program, python) in programs.items():
            peaks[name].append(round(measure(program, python, four, work, model)[1], 1))
        n_chars = sum(map(len, texts))
        rates = {name: round(n_chars / min(found)) for name, found in seconds.items()}
        ratios = {name: round(rates["ours"] / rate, 2) for name, rate in rates.items()}
        print(json.dumps({"chars": n_chars, "chars_per_s": rates, "ours_over": ratios,
                          "peak_mb_1x_4x": peaks}))  # fmt: skip


if __name__ == "__main__":
    run(main, parse(SpeedConfig, doc=__doc__))
