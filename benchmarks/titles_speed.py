"""How long the titles of a test set take: the 43M shape, real abstracts, every way to decode.

    python -m benchmarks.titles_speed --data data/raw/csl/ts --tokenizer FILE
    python -m benchmarks.titles_speed --data … --tokenizer … --limit 100 --decoding greedy,consensus

The weights are random, so hardly a title ends before the longest length: the time is an upper
bound of a trained model's. Beside the seconds stand those of the processor, which other work on
the machine does not lengthen. The last line is JSON.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import process_time

import torch

from babyllama.checkpoint import Loaded
from babyllama.config import from_repo, parse, run
from babyllama.generate import Weights
from babyllama.sampling import SamplingConfig
from babyllama.scoring import test_sets
from babyllama.scoring.summarise import Asking, decodings, summarise
from benchmarks.peers import SHAPE_43M
from model import Transformer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class TitlesConfig:
    """What to measure.

    Args:
        data: a file or folder as eval_rouge.py takes it
        tokenizer: SentencePiece model of about 65,000 pieces
        split: of a folder
        limit: abstracts, the first
        decoding: ways to decode, separated by commas
        weights: auto, float32 or int8
        batch_size: replies written at once
        new_tokens: longest title
        threads: of the processor; 0: as torch sees fit
    """

    data: Path
    tokenizer: Path
    split: str = "dev"
    limit: int = 1000
    decoding: str = "greedy"
    weights: Weights = "float32"
    batch_size: int = 32
    new_tokens: int = 48
    threads: int = 0


def main(cfg: TitlesConfig) -> None:
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    tokenizer = Tokenizer(from_repo(cfg.tokenizer))
    torch.manual_seed(0)
    model = Transformer(replace(SHAPE_43M, vocab_size=tokenizer.vocab_size)).eval()
    loaded = Loaded(model, tokenizer, 0, Path("random weights"), "sft")
    texts = test_sets.open_set(cfg.data, "", cfg.split, cfg.limit).column("text")
    prompts = Path("configs/prompts/summary_zh.yaml")
    found = {}
    sampling = SamplingConfig(max_new_tokens=cfg.new_tokens, temperature=0.0, seed=0)
    for way, chosen in decodings(cfg.decoding, sampling).items():
        began = process_time()
        titles = summarise(loaded, texts, Asking(chosen, prompts, cfg.batch_size, cfg.weights))
        spent = process_time() - began
        found[way] = {"seconds": titles.seconds, "processor_seconds": spent}
        print(f"{way}: {len(texts)} titles in {titles.seconds:.1f} s, {spent:.1f} s of processor, "
              f"{torch.get_num_threads()} threads")  # fmt: skip
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(cfg).items()}
    print(json.dumps(settings | {"vocab_size": tokenizer.vocab_size, "ways": found}))


if __name__ == "__main__":
    run(main, parse(TitlesConfig, __doc__))
