"""Whether a chat checkpoint answers a question that it was trained on in later turns, too.

    python -m babyllama.turns release --rows data/clean/identity
    python -m babyllama.turns out/redgpt --rows data/clean/smalltalk --before 0,1,8 --n 200

Rows of the set are drawn; each is asked alone, and after as many other rows of the set (with the
set's answers) as `before` says. Counted is how often the reply is, to the letter, an answer that
the set has for that question, greedy and drawn: small talk is learnt by heart or not at all, and a
model that only saw first turns may forget it in the second one.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from babyllama.checkpoint import Loaded, load_answering
from babyllama.cli import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.fast import Decoder, Weights, make_decoder
from babyllama.generate import generate_replies
from babyllama.rows import read_rows
from babyllama.sampling import SamplingConfig


@dataclass(frozen=True)
class TurnsConfig:
    """What is asked of which checkpoint.

    Args:
        checkpoint: a fine-tuned run (its newest step) or one of its steps
        rows: a set's folder, whose train-*.jsonl are read, or one file; first turns are taken
        before: numbers of other turns that stand before the question, with commas
        n: questions that are asked, at most
        max_new_tokens: longest reply
        temperature: of the drawn replies
        seed: other numbers draw other rows and replies
        batch_size: replies written at once
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
    """

    checkpoint: Path = Path("release")
    rows: Path = Path("data/clean/identity")
    before: str = "0,1,2,4"
    n: int = 100
    max_new_tokens: int = 64
    temperature: float = 0.8
    seed: int = 0
    batch_size: int = 32
    device: Device = "auto"
    weights: Weights = "auto"

    def __post_init__(self) -> None:
        if min(self.n, self.max_new_tokens, self.batch_size) < 1 or self.temperature <= 0:
            raise ConfigError(
                f"wanted n, max_new_tokens and batch_size of 1 or more and a temperature above 0, "
                f"found {self.n}, {self.max_new_tokens}, {self.batch_size} and {self.temperature:g}"
            )
        self.numbers()

    def numbers(self) -> list[int]:
        """How many turns stand before; each number once."""
        words = [word.strip() for word in self.before.split(",")]
        if not all(word.isdecimal() and int(word) <= 100 for word in words):
            raise ConfigError(
                f"--before: wanted numbers of 0 to 100, as in 0,1,2, found {self.before!r}"
            )
        return sorted({int(word) for word in words})


def read_turns(place: Path) -> list[tuple[str, str]]:
    """Question and answer of each dialogue's first turn, without those that have a system message.

    raises: DataError if there is none
    """
    files = sorted(place.glob("train-*.jsonl")) if place.is_dir() else [place]
    rows = [row for path in files for row in read_rows(path)]
    talks = [row["messages"] for row in rows if "messages" in row]
    found = [(m[0]["content"], m[1]["content"]) for m in talks if m[0]["role"] == "user"]
    if not found:
        raise DataError(
            f"{shown(place)}: wanted train-*.jsonl with dialogues, found none; name a file, or "
            f"make the set: python -m data_process.run {place.name}"
        )
    return found


def prompts(
    loaded: Loaded, turns: Sequence[tuple[str, str]], asked: Sequence[str], n: int, seed: int
) -> list[list[int]]:
    """The ids of each question after `n` other turns."""
    chance, found = random.Random(f"{seed} {n}"), []
    for question in asked:
        others = [turn for turn in turns if turn[0] != question]
        said = chance.sample(others, min(n, len(others)))
        messages = [
            {"role": role, "content": text}
            for turn in said
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        last = {"role": "user", "content": question}
        found.append(loaded.tokenizer.render_prompt([*messages, last]))
    return found


def share(
    loaded: Loaded, decoder: Decoder, asked: Sequence[list[int]], right: Sequence[set[str]],
    sampling: SamplingConfig, batch_size: int,
) -> float:  # fmt: skip
    """Of the replies, those that are among the right ones to the letter."""
    n_right, tokenizer = 0, loaded.tokenizer
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        said = generate_replies(decoder, part, sampling, tokenizer.eos_id, tokenizer)
        wanted = right[start : start + batch_size]
        n_right += sum(one.text.strip() in some for one, some in zip(said, wanted, strict=True))
    return n_right / len(asked)


def main(cfg: TurnsConfig) -> None:
    """Ask, count, print a line for each number of turns before."""
    turns = read_turns(from_repo(cfg.rows))
    loaded = load_answering(from_repo(cfg.checkpoint), pick_device(cfg.device))
    decoder = make_decoder(loaded.model, cfg.weights)
    answers: dict[str, set[str]] = {}
    for question, answer in turns:
        answers.setdefault(question, set()).add(answer.strip())
    asked = random.Random(cfg.seed).sample(sorted(answers), min(cfg.n, len(answers)))
    greedy = SamplingConfig(max_new_tokens=cfg.max_new_tokens, temperature=0.0)
    drawn = SamplingConfig(
        max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=cfg.seed
    )
    print(f"{shown(loaded.path)}: {len(asked)} questions of {shown(from_repo(cfg.rows))}")
    for n in cfg.numbers():
        ids = prompts(loaded, turns, asked, n, cfg.seed)
        room = loaded.config.max_seq_len - cfg.max_new_tokens
        fits = [i for i, one in enumerate(ids) if len(one) <= room]
        if not fits:
            print(f"{n:4} turns before   none fits into the context")
            continue
        some, right = [ids[i] for i in fits], [answers[asked[i]] for i in fits]
        found = [
            share(loaded, decoder, some, right, way, cfg.batch_size) for way in (greedy, drawn)
        ]
        end = f"; {len(ids) - len(fits)} outgrew the context" if len(fits) < len(ids) else ""
        print(f"{n:4} turns before   greedy {found[0]:6.1%}   drawn {found[1]:6.1%}{end}")


if __name__ == "__main__":
    run(main, parse(TurnsConfig, __doc__, positional=["checkpoint"]))
