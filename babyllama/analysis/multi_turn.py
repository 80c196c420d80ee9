"""What a chat checkpoint still knows some turns later, in two tests.

With --rows, whether it answers a question that it was trained on in later
turns, too.

    python -m babyllama.analysis.multi_turn release --rows data/clean/identity
    python -m babyllama.analysis.multi_turn out/redgpt --rows data/clean/smalltalk --before 0,1,8

Rows of the set are drawn; each is asked alone, and after as many other rows of the set (with the
set's answers) as `before` says. Counted is how often the reply is, to the letter, an answer that
the set has for that question, greedy and drawn: small talk is learnt by heart or not at all, and a
model that only saw first turns may forget it in the second one.

Without, whether it still knows what it was told about its user.

    python -m babyllama.analysis.multi_turn out/csl_talk
    python -m babyllama.analysis.multi_turn release --gaps 0,1,4 --out recall.jsonl

Dialogues are made by template: the user tells a fact, asks about other things (as many turns as
`gaps` says; the answers are the model's own, greedy), then asks for the fact. An answer is right if
it holds the value and no other value of its kind. The same dialogues without the fact show what
guessing gives. A dialogue that outgrows the context is not shortened: it is counted and left out.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from babyllama.checkpoint import Loaded, load_answering, load_model
from babyllama.config import from_repo, parse, run, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.device import Device, pick_device
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.generate import Decoder, Weights, generate_replies
from babyllama.rows import read_rows, write_rows
from babyllama.run_dir import chosen_run
from babyllama.sampling import SamplingConfig
from babyllama.scoring.rouge import bootstrap_interval

# What is told, how it is asked for, and the values that it may have: none is part of another.
FACTS = {
    "name": ("你好，我叫{}。", "你还记得我叫什么名字吗？",
             ("小明", "王芳", "李雷", "张伟", "刘洋", "陈静", "赵强", "孙丽")),
    "city": ("我住在{}。", "我住在哪个城市？",
             ("上海", "广州", "成都", "西安", "南京", "武汉", "杭州", "青岛")),
    "pet": ("我家养了一只{}。", "我家养了什么动物？",
            ("小猫", "小狗", "兔子", "乌龟", "鹦鹉", "仓鼠", "鸽子", "刺猬")),
    "colour": ("我最喜欢的颜色是{}。", "我最喜欢什么颜色？",
               ("红色", "蓝色", "绿色", "黄色", "紫色", "黑色", "白色", "灰色")),
    "number": ("我的房间号是{}。", "我的房间号是多少？",
               ("308", "512", "127", "946", "271", "683", "435", "759")),
}  # fmt: skip
UNTOLD = "你好。"
BETWEEN = ("怎样才能睡得好？", "下雨天可以做什么？", "写一句祝福的话。", "围棋是怎么下的？",
           "怎么学好数学？", "请讲一个笑话。", "早饭吃什么好？", "怎么锻炼身体？")  # fmt: skip


@dataclass(frozen=True)
class RecallConfig:
    """What is asked of which checkpoint.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        gaps: numbers of turns between the fact and the question, with commas, 0 to 8
        max_new_tokens: longest answer; the dialogue must fit into the context with all of them
        batch_size: dialogues continued at once
        out: file for the dialogues, as JSON lines
        device: auto, cpu, cuda or mps
        weights: auto, float32, or int8: a quarter of the bytes, on the cpu only, with a C compiler
    """

    checkpoint: Path | None = None
    gaps: str = "0,1,2"
    max_new_tokens: int = 24
    batch_size: int = 32
    out: Path | None = None
    device: Device = "auto"
    weights: Weights = "float32"

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.batch_size) < 1:
            raise ConfigError(
                f"wanted max_new_tokens and batch_size of 1 or more, found {self.max_new_tokens} "
                f"and {self.batch_size}"
            )
        self.numbers()

    def numbers(self) -> list[int]:
        """The gaps; each once."""
        words = [word.strip() for word in self.gaps.split(",")]
        if not all(word.isdecimal() and int(word) <= len(BETWEEN) for word in words):
            raise ConfigError(
                f"--gaps: wanted numbers of 0 to {len(BETWEEN)}, as in 0,1,2, found {self.gaps!r}"
            )
        return sorted({int(word) for word in words})


@dataclass
class Probe:
    """One dialogue on its way.

    waiting: what the user will still say; messages: what was said
    """

    kind: str
    value: str
    is_told: bool
    waiting: list[str]
    messages: list[dict] = field(default_factory=list)
    fits: bool = True

    @property
    def is_right(self) -> bool:
        return recalls(self.messages[-1]["content"], self.value, FACTS[self.kind][2])


def recalls(reply: str, value: str, values: Sequence[str]) -> bool:
    """Whether a reply holds the value and no other one."""
    return [one for one in values if one in reply] == [value]


def probes(gap: int) -> list[Probe]:
    """Every value of every fact, told and not told; what stands between differs from row to row."""
    found = []
    for kind, (told, question, values) in FACTS.items():
        for number, value in enumerate(values):
            between = [BETWEEN[(number + n) % len(BETWEEN)] for n in range(gap)]
            for is_told in (True, False):
                first = told.format(value) if is_told else UNTOLD
                found.append(Probe(kind, value, is_told, [first, *between, question]))
    return found


def talk(loaded: Loaded, asked: Sequence[Probe], cfg: RecallConfig) -> None:
    """Have the dialogues, turn by turn, all side by side."""
    decoder, tokenizer = make_decoder(loaded.model, cfg.weights), loaded.tokenizer
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=cfg.max_new_tokens)
    room = loaded.config.max_seq_len - cfg.max_new_tokens
    while going := [one for one in asked if one.fits and one.waiting]:
        prompts = []
        for one in going:
            one.messages.append({"role": "user", "content": one.waiting.pop(0)})
            prompts.append(tokenizer.render_prompt(one.messages))
            one.fits = len(prompts[-1]) <= room
        pairs = [pair for pair in zip(going, prompts, strict=True) if pair[0].fits]
        for start in tqdm(range(0, len(pairs), cfg.batch_size), "answers", leave=False):
            part = pairs[start : start + cfg.batch_size]
            said = generate_replies(
                decoder, [ids for _, ids in part], sampling, tokenizer.eos_id, tokenizer
            )
            for (one, _), reply in zip(part, said, strict=True):
                one.messages.append({"role": "assistant", "content": reply.text.strip() or "……"})


def figures(asked: Sequence[Probe]) -> dict:
    """Shares of right answers in per cent, told and not told."""
    found: dict = {"left_out": sum(not one.fits for one in asked)}
    for name, is_told in (("told", True), ("not told", False)):
        flags = np.array([o.is_right for o in asked if o.fits and o.is_told == is_told], np.float64)
        if len(flags):
            low, high = bootstrap_interval(100 * flags)
            found[name] = {"n": len(flags), "right": 100 * flags.mean(), "low": low, "high": high}
    return found


def line(gap: int, found: dict) -> str:
    """One line of the table."""
    cells = [
        f"{name}: {row['right']:5.1f} % ({row['low']:.1f} - {row['high']:.1f}) of {row['n']}"
        for name, row in found.items()
        if name != "left_out"
    ]
    end = f"; {found['left_out']} outgrew the context" if found["left_out"] else ""
    return f"{gap} turns between   {'   '.join(cells) or 'none fits'}{end}"


def ask_for_facts(cfg: RecallConfig) -> None:
    """Talk, count, print."""
    path = chosen_run(cfg.checkpoint, kind="sft")
    loaded = load_model(path, pick_device(cfg.device))
    if loaded.kind == "pretrain":
        raise CheckpointError(
            f"{shown(loaded.path)}: wanted a checkpoint that answers, found one of pretraining, "
            f"which knows no turns; name an SFT run"
        )
    print(shown(loaded.path))
    rows, n_talked = [], 0
    for gap in cfg.numbers():
        asked = probes(gap)
        talk(loaded, asked, cfg)
        print(line(gap, figures(asked)))
        n_talked += sum(one.fits for one in asked)
        rows += [
            {"gap": gap, "fact": o.kind, "value": o.value, "told": o.is_told, "right": o.is_right,
             "messages": o.messages}
            for o in asked if o.fits
        ]  # fmt: skip
    if not n_talked:
        raise DataError(
            f"no dialogue fits into the context of {loaded.config.max_seq_len} tokens with answers "
            f"of {cfg.max_new_tokens}; lower --gaps or --max_new_tokens"
        )
    if cfg.out:
        write_rows(from_repo(cfg.out), rows)
        print(f"dialogues: {shown(from_repo(cfg.out))}")


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


def ask_rows(cfg: TurnsConfig) -> None:
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
    if any(word.partition("=")[0] == "--rows" for word in sys.argv[1:]):
        run(ask_rows, parse(TurnsConfig, __doc__, positional=["checkpoint"]))
    else:
        run(ask_for_facts, parse(RecallConfig, __doc__, positional=["checkpoint"]))
