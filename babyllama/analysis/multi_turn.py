"""Memory of a chat checkpoint: is a fact that the user told still known some turns later?

    python -m babyllama.analysis.multi_turn out/NAME
    python -m babyllama.analysis.multi_turn release --turns 0,1,4 --out said.jsonl

Dialogues are made by template: the user tells a fact, asks about other things (as many turns as
`turns` says; the answers are the model's own, greedy), then asks for the fact. An answer is right
if it holds the value and no other value of its kind. The same dialogues without the fact show what
guessing gives. A dialogue that outgrows the context is not shortened: it is counted and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from babyllama.checkpoint import Loaded
from babyllama.config import from_repo, parse, run, shown
from babyllama.device import Device, pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.rows import write_rows
from babyllama.run_dir import chosen_run
from babyllama.sampling import SamplingConfig
from babyllama.scoring.rouge import bootstrap_interval
from babyllama.scoring.summarise import ReadyModel, ask_all, load_answering
from babyllama.scoring.tables import table

# By fact what is told, how it is asked for, and the values that it may have, of which none is part
# of another; and what is said between.
MATERIAL = yaml.safe_load(Path(__file__).with_name("multi_turn.yaml").read_text("utf-8"))
FACTS: dict[str, list] = MATERIAL["facts"]
BETWEEN: list[str] = MATERIAL["between"]
UNTOLD = "你好。"
AT_ONCE = 32  # dialogues that are continued together


@dataclass(frozen=True)
class MultiTurnConfig:
    """Checkpoint and questions.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        turns: how many stand between, with commas: 0 to 8
        max_new_tokens: longest answer
        out: file for the dialogues, as JSON lines
        device: auto, cpu, cuda or mps
    """

    checkpoint: Path | None = None
    turns: str = "0,1,2"
    max_new_tokens: int = 24
    out: Path | None = None
    device: Device = "auto"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"wanted max_new_tokens of 1 or more, found {self.max_new_tokens}")
        self.numbers()

    def numbers(self) -> list[int]:
        """The numbers of turns; each once."""
        words, most = [word.strip() for word in self.turns.split(",")], len(BETWEEN)
        if not all(word.isdecimal() and int(word) <= most for word in words):
            raise ConfigError(
                f"--turns: wanted numbers of 0 to {most}, as in 0,1,2, found {self.turns!r}"
            )
        return sorted({int(word) for word in words})


@dataclass
class Dialogue:
    """One dialogue on its way.

    waiting: what the user will still say; messages: what was said
    """

    fact: str
    value: str
    waiting: list[str]
    messages: list[dict] = field(default_factory=list)
    fits: bool = True

    @property
    def is_right(self) -> bool:
        return recalls(self.messages[-1]["content"], self.value, FACTS[self.fact][2])


def recalls(reply: str, value: str, values: Sequence[str]) -> bool:
    """True if a reply holds the value and no other one."""
    return [one for one in values if one in reply] == [value]


def about_facts(n: int) -> dict[str, list[Dialogue]]:
    """Every value of every fact, told and not told; what stands between differs from row to row."""
    found: dict[str, list[Dialogue]] = {"told": [], "not told": []}
    for fact, (told, question, values) in FACTS.items():
        for number, value in enumerate(values):
            between = [BETWEEN[(number + turn) % len(BETWEEN)] for turn in range(n)]
            for name, first in (("told", told.format(value)), ("not told", UNTOLD)):
                found[name].append(Dialogue(fact, value, [first, *between, question]))
    return found


def talk(
    loaded: Loaded, model: ReadyModel, asked: Sequence[Dialogue], sampling: SamplingConfig
) -> None:
    """Have the dialogues, turn by turn, all side by side."""
    room = loaded.config.max_seq_len - sampling.max_new_tokens
    while going := [one for one in asked if one.fits and one.waiting]:
        prompts = []
        for one in going:
            one.messages.append({"role": "user", "content": one.waiting.pop(0)})
            prompts.append(loaded.tokenizer.render_prompt(one.messages))
            one.fits = len(prompts[-1]) <= room
        pairs = [pair for pair in zip(going, prompts, strict=True) if pair[0].fits]
        said = ask_all(model, [ids for _, ids in pairs], sampling, AT_ONCE)
        for (one, _), (reply,) in zip(pairs, said, strict=True):
            one.messages.append({"role": "assistant", "content": reply.text.strip() or "……"})


def share(asked: Sequence[Dialogue]) -> str:
    """The share of right answers with its 95 % interval, a cell of the table."""
    flags = np.array([one.is_right for one in asked if one.fits], np.float64)
    end = f", {len(asked) - len(flags)} outgrew the context" if len(flags) < len(asked) else ""
    if not len(flags):
        return f"none fits{end}"
    low, high = bootstrap_interval(100 * flags)
    return f"{100 * flags.mean():.1f} % ({low:.1f} - {high:.1f}) of {len(flags)}{end}"


def main(cfg: MultiTurnConfig) -> None:
    """Talk, count, print a line for each number of turns."""
    loaded = load_answering(chosen_run(cfg.checkpoint, kind="sft"), pick_device(cfg.device))
    model = ReadyModel.of(loaded, "auto")._replace(name="")
    greedy = SamplingConfig(cfg.max_new_tokens, temperature=0.0)
    lines, saved = [["turns", "told", "not told"]], []
    for n in cfg.numbers():
        groups = about_facts(n)
        for name, asked in groups.items():
            talk(loaded, model, asked, greedy)
            saved += [
                {"turns": n, "group": name, "fact": one.fact, "value": one.value,
                 "right": one.is_right, "messages": one.messages}
                for one in asked if one.fits
            ]  # fmt: skip
        lines.append([str(n), *map(share, groups.values())])
    print(f"{shown(loaded.path)}\n{table(lines)}")
    if not saved:
        raise DataError(
            f"no dialogue fits into the context of {loaded.config.max_seq_len} tokens with its "
            f"answers; lower --turns or --max_new_tokens"
        )
    if cfg.out:
        write_rows(from_repo(cfg.out), saved)
        print(f"dialogues: {shown(from_repo(cfg.out))}")


if __name__ == "__main__":
    run(main, parse(MultiTurnConfig, __doc__, positional=["checkpoint"]))
