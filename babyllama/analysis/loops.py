"""Loops in a checkpoint's replies: how often, and what the guard does about them.

    python -m babyllama.analysis.loops out/redgpt                     two dozen built-in questions
    python -m babyllama.analysis.loops out/wiki --prompts prompts.txt --loop_guard end

A chat checkpoint answers each prompt, a base checkpoint continues it. One line of the table for
each way of decoding: greedy and drawn, without the guard and with it. Characters are counted
without white space; what a loop is, sampling.py says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Literal

from babyllama.checkpoint import Loaded, load_model
from babyllama.config import from_repo, parse, run, shown
from babyllama.decoder import Reply
from babyllama.device import pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.rows import write_rows
from babyllama.run_dir import chosen_run
from babyllama.sampling import LOOP_LENGTH, LOOP_TIMES, alone, loops, squeeze
from babyllama.scoring.beams import BeamConfig
from babyllama.scoring.summarise import AskConfig, ReadyModel, ask_all
from babyllama.scoring.tables import table


@dataclass(frozen=True)
class LoopsConfig(AskConfig):
    """Checkpoint and questions.

    Args:
        checkpoint: run directory (its newest step) or step directory; if absent the newest run
        prompts: a text file with a prompt on each line
        out: file for the replies, as JSON lines
        loop_guard: what the guarded lines of the table do
        seed: of the drawn replies
    """

    checkpoint: Path | None = None
    prompts: Path = Path("configs/prompts/questions.txt")
    out: Path | None = None
    loop_guard: Literal["end", "redraw"] = "redraw"
    seed: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loop_guard == "off" or self.temperature == 0:
            raise ConfigError(
                f"wanted a loop_guard (end, redraw) and a temperature above 0 for the drawn "
                f"replies, found {self.loop_guard}, {self.temperature:g}; leave them out, or "
                f"correct them"
            )


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not blank.

    raises: DataError if there is none, or the file is missing or no UTF-8
    """
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
        found = "an empty file"
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        lines, found = [], f"{type(error).__name__}"
    if not lines:
        raise DataError(
            f"{shown(path)}: wanted UTF-8 text with a prompt on each line, found {found}; correct "
            f"the name or the file, or leave --prompts out"
        )
    return lines


def ask(loaded: Loaded, text: str) -> list[int]:
    """The ids to continue: a question to a chat checkpoint, a beginning for a base one."""
    if loaded.kind == "pretrain":
        return loaded.tokenizer.encode(text, bos=True)
    return loaded.tokenizer.render_prompt([{"role": "user", "content": text}])


def ways(cfg: LoopsConfig) -> dict[str, BeamConfig]:
    """The lines of the table: greedy and drawn, without the guard and with it."""
    drawn = replace(alone(cfg, BeamConfig), loop_guard="off")
    free = {"greedy": replace(drawn, temperature=0.0), f"top-p {cfg.top_p:g}": drawn}
    guarded = {
        f"{name}, {cfg.loop_guard}": replace(way, loop_guard=cfg.loop_guard)
        for name, way in free.items()
    }
    return free | guarded


def statistics(replies: Sequence[Reply]) -> dict[str, float]:
    """Percentages but for the length: loops, ends by <eos>, ends by the guard."""
    texts = [squeeze(reply.text) for reply in replies]
    return {
        "% loops": 100 * fmean(map(loops, texts)),
        "length": fmean(map(len, texts)),
        "% ended": 100 * fmean(reply.reason == "eos" for reply in replies),
        "% cut": 100 * fmean(reply.reason == "loop" for reply in replies),
    }


def main(cfg: LoopsConfig) -> None:
    """Answer every prompt in every way, count, print."""
    path = chosen_run(cfg.checkpoint)
    prompts = read_prompts(from_repo(cfg.prompts))
    loaded = load_model(path, pick_device(cfg.device))
    model = ReadyModel.of(loaded, cfg.weights)
    asked = [ask(loaded, prompt) for prompt in prompts]
    lines, saved = [], []
    for name, way in ways(cfg).items():
        found = ask_all(model._replace(name=name), asked, way, cfg.batch_size)
        figures = statistics([reply for replies in found for reply in replies])
        lines = lines or [["", *figures]]
        lines.append([name, *(f"{figure:.1f}" for figure in figures.values())])
        saved += [
            {"way": name, "prompt": prompt, "reply": reply.text, "end": reply.reason}
            for prompt, replies in zip(prompts, found, strict=True)
            for reply in replies
        ]
    print(f"{shown(loaded.path)}: {len(asked)} prompts, at most {cfg.max_new_tokens} tokens")
    print(table(lines))
    print(f"a loop: some {LOOP_LENGTH} characters in a row come {LOOP_TIMES} times in a reply")
    if cfg.out:
        write_rows(from_repo(cfg.out), saved)
        print(f"replies: {shown(from_repo(cfg.out))}")


if __name__ == "__main__":
    run(main, parse(LoopsConfig, __doc__, positional=["checkpoint"]))
