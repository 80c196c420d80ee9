"""Pairs of answers for preference tuning, made of a model's own replies: those that loop and those
that do not.

    python -m babyllama.pairs out/redgpt --prompts prompts.txt --out data/clean/loops/rows.jsonl
    python -m babyllama.pairs --rows data/clean/mine/rows.jsonl --tokenizer data/tokenizers/x.model
    python sft.py --config configs/sft/dpo.yaml --base out/redgpt

A checkpoint answers each prompt several times, once greedily. Where one reply falls into a loop (as
sampling.py says) and another ends of itself without one, the two are a row: {id, messages, chosen,
rejected}. Rows are also made into token files, data/tokens/<tokenizer>/<set>, where <set> is the
directory that they lie in; --rows does that alone, for pairs of any origin.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from tqdm import tqdm

from babyllama.checkpoint import Loaded, load_model
from babyllama.cli import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.generate import Reply, generate_replies
from babyllama.loops import PROMPTS, read_prompts
from babyllama.rows import read_rows, row_kind, write_rows
from babyllama.sampling import SamplingConfig, loops, squeeze
from babyllama.token_file import CHOICES, TokenFileWriter
from tokenizer import Tokenizer

VAL_SHARE = 20  # one row in so many is for validation


@dataclass(frozen=True)
class PairsConfig(SamplingConfig):
    """What is asked of which checkpoint, and where the pairs go.

    Args:
        checkpoint: a fine-tuned run (its newest step) or one of its steps
        prompts: a text file with a question on each line; if absent two dozen built-in ones
        out: file for the rows; its directory gives the set's name
        rows: make token files of these rows instead
        tokenizer: of the token files of --rows
        tokens: root of the token files
        batch_size: prompts answered at once
        device: auto, cpu, cuda or mps
        n: drawn replies to each prompt, beside the greedy one
        max_new_tokens: longest reply; a pair has to fit the context together
        seed: of the drawn replies
    """

    checkpoint: Path | None = None
    prompts: Path | None = None
    out: Path = Path("data/clean/loops/rows.jsonl")
    rows: Path | None = None
    tokenizer: Path | None = None
    tokens: Path = Path("data/tokens")
    batch_size: int = 8
    device: Device = "auto"
    n: int = 7
    max_new_tokens: int = 96
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1 or self.temperature == 0 or self.loop_guard != "off":
            raise ConfigError(
                f"wanted a batch_size of at least 1, a temperature above 0 and loop_guard off, "
                f"found {self.batch_size}, {self.temperature:g} and {self.loop_guard}"
            )
        if (self.checkpoint is None) == (self.rows is None):
            raise ConfigError(
                "wanted a checkpoint that answers, or --rows with pairs, and not both: "
                "python -m babyllama.pairs out/redgpt --prompts FILE --out ROWS"
            )
        if self.rows is not None and self.tokenizer is None:
            raise ConfigError("--rows wants --tokenizer, the .model of the run to be tuned")


def pair_of(replies: Sequence[Reply]) -> tuple[str, str] | str:
    """(chosen, rejected) out of the replies to one prompt, or the reason why there is none."""
    looping = [reply.text for reply in replies if loops(squeeze(reply.text))]
    good = [r.text for r in replies
            if r.reason == "eos" and r.text.strip() and not loops(squeeze(r.text))]  # fmt: skip
    if not looping:
        return "no_loop"
    return (good[0], looping[0]) if good else "no_reply_without_loop"


def answers(loaded: Loaded, prompts: Sequence[str], cfg: PairsConfig) -> list[list[Reply]]:
    """The greedy reply and the drawn ones to each prompt."""
    ways = {f.name: getattr(cfg, f.name) for f in fields(SamplingConfig)}
    drawn = SamplingConfig(**ways)
    greedy = replace(drawn, temperature=0.0, n=1)
    tokenizer = loaded.tokenizer
    asked = [tokenizer.render_prompt([{"role": "user", "content": text}]) for text in prompts]
    found: list[list[Reply]] = []
    for start in tqdm(range(0, len(asked), cfg.batch_size), desc="answering", leave=False):
        batch = asked[start : start + cfg.batch_size]
        first, more = (
            generate_replies(loaded.model, batch, way, tokenizer.eos_id, tokenizer)
            for way in (greedy, drawn)
        )
        found += [[first[i], *more[i * cfg.n : (i + 1) * cfg.n]] for i in range(len(batch))]
    return found


def make_rows(
    prompts: Sequence[str], replies: Sequence[Sequence[Reply]], name: str
) -> tuple[list[dict], Counter[str]]:
    """Preference rows, and how many prompts gave none, by reason."""
    rows, without = [], Counter()
    for prompt, given in zip(prompts, replies, strict=True):
        found = pair_of(given)
        if isinstance(found, str):
            without[found] += 1
            continue
        asked = [{"role": "user", "content": prompt}]
        rows.append({"id": f"{name}/{len(rows)}", "messages": asked,
                     "chosen": found[0], "rejected": found[1]})  # fmt: skip
    return rows, without


def write_tokens(rows: Sequence[dict], tokenizer: Tokenizer, place: Path) -> dict[str, int]:
    """Token files of preference rows, one row in twenty for validation; rows of each part.

    raises: DataError if there are fewer than two rows, or rows of another kind
    """
    wrong = [row["id"] for row in rows if row_kind(row) != "preference"]
    if len(rows) < 2 or wrong:
        raise DataError(
            f"{shown(place)}: wanted two rows or more of messages, chosen and rejected, found "
            f"{len(rows)} rows" + (f", of other kinds {', '.join(wrong[:5])}" if wrong else "")
        )
    parts = {
        "val": [row for n, row in enumerate(rows) if n % VAL_SHARE == 0],
        "train": [row for n, row in enumerate(rows) if n % VAL_SHARE],
    }
    for split, own in parts.items():
        with TokenFileWriter(place / f"{split}-00000", "preference", tokenizer) as writer:
            for row in own:
                pieces = [(m["role"], m["content"]) for m in row["messages"]]
                pieces += [(choice, row[choice]) for choice in CHOICES]
                writer.add_row([(role, tokenizer.encode(text)) for role, text in pieces])
    return {split: len(own) for split, own in parts.items()}


def main(cfg: PairsConfig) -> None:
    """Ask, sort, write."""
    if cfg.rows is not None:
        path, tokenizer = from_repo(cfg.rows), Tokenizer(from_repo(cfg.tokenizer))
        rows = list(read_rows(path))
    else:
        path, loaded = (
            from_repo(cfg.out),
            load_model(from_repo(cfg.checkpoint), pick_device(cfg.device)),
        )
        if loaded.kind == "pretrain":
            raise CheckpointError(
                f"{shown(loaded.path)}: wanted a checkpoint that answers, found a base; fine-tune "
                f"it first with python sft.py"
            )
        tokenizer = loaded.tokenizer
        prompts = read_prompts(from_repo(cfg.prompts)) if cfg.prompts else list(PROMPTS)
        rows, without = make_rows(prompts, answers(loaded, prompts, cfg), path.parent.name)
        reasons = "".join(f", {n} {reason}" for reason, n in sorted(without.items()))
        print(f"{len(prompts)} prompts gave {len(rows)} pairs{reasons}")
        if len(rows) < 2:
            raise DataError(
                f"wanted two pairs or more, found {len(rows)}{reasons}; ask more prompts, or draw "
                f"more replies (--n), or this checkpoint needs no such tuning"
            )
        write_rows(path, rows)
        print(f"rows: {shown(path)}")
    place = from_repo(cfg.tokens) / tokenizer.path.stem / path.parent.name
    parts = write_tokens(rows, tokenizer, place)
    print(f"tokens: {shown(place)} ({', '.join(f'{split} {n}' for split, n in parts.items())})")


if __name__ == "__main__":
    run(main, parse(PairsConfig, __doc__, positional=["checkpoint"]))
