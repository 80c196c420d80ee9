"""Forty everyday openings with a follow-up each: how often a checkpoint replies sensibly.

    python -m release.recipe.openings out/release_chat --out out/openings.jsonl
    python -m release.recipe.openings --rows '[data/clean/talk, data/clean/turns]'    the check

openings.jsonl says of each turn which words a sensible reply has one of (`must`) and which it has
none of (`must_not`), both as regular expressions. A reply also fails that is blank, repeats the
question, loops, does not come to an end, or speaks of titles and papers. Words are a coarse judge:
they find what is off the subject, not what is clumsy, so the card shows conversations beside the
figure. The follow-up is asked after the model's own first reply. Nothing of this is trained on:
--rows looks for the openings among the users' turns of the sets named, and finds none.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from babyllama.checkpoint import Loaded
from babyllama.config import from_repo, parse, run, shown
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Reply
from babyllama.device import Device, pick_device
from babyllama.errors import DataError
from babyllama.generate import generate_replies
from babyllama.rows import numbered_lines, read_rows, write_rows
from babyllama.sampling import SamplingConfig, loops, squeeze
from babyllama.scoring.summarise import load_answering

OPENINGS = Path(__file__).parent / "openings.jsonl"
OFF = re.compile("论文|摘要|标题|关键词|资料")  # nobody asked for these
LEAST = 5  # characters: what is shorter, such as a greeting, stands in any set


@dataclass(frozen=True)
class OpeningsConfig:
    """Checkpoint and questions.

    Args:
        checkpoint: a fine-tuned run (its newest step) or one of its steps
        rows: folders of cleaned dialogues that are looked through instead
        out: file for the conversations, as JSON lines
        device: auto, cpu, cuda or mps
        max_new_tokens: longest reply
    """

    checkpoint: Path = Path("release")
    rows: tuple[Path, ...] = ()
    out: Path | None = None
    device: Device = "auto"
    max_new_tokens: int = 96


def read_openings(path: Path = OPENINGS) -> list[list[dict]]:
    """The turns of each opening."""
    return [json.loads(line)["turns"] for _, line in numbered_lines(path)]


def fault(reply: Reply, turn: dict) -> str | None:
    """Reason why a reply to a turn is not sensible, or None if nothing speaks against it."""
    text, asked = squeeze(reply.text), bare(turn["say"])
    if not bare(text):
        return "blank"
    if loops(text):
        return "loops"
    if reply.reason != "eos":
        return "no_end"
    if bare(text) == asked:
        return "echo"
    if OFF.search(text) or re.search(turn["must_not"], text):
        return "wrong_word"
    return None if re.search(turn["must"], text) else "off_subject"


def bare(text: str) -> str:
    """A text without white space and punctuation."""
    return re.sub(r"[\W_]", "", text)


def talk(loaded: Loaded, openings: Sequence[list[dict]], way: SamplingConfig) -> list[dict]:
    """Each opening as a conversation, with the fault of each reply."""
    decoder, tokenizer = make_decoder(loaded.model, "auto"), loaded.tokenizer
    found: list[dict] = [{"messages": [], "faults": []} for _ in openings]
    for turns in zip(*openings, strict=True):
        for one, turn in zip(found, turns, strict=True):
            one["messages"].append({"role": "user", "content": turn["say"]})
        prompts = [tokenizer.render_prompt(one["messages"]) for one in found]
        replies = generate_replies(decoder, prompts, way, tokenizer.eos_id, tokenizer)
        for one, turn, reply in zip(found, turns, replies, strict=True):
            one["faults"].append(fault(reply, turn))
            said = reply.text.strip() or "……"
            one["messages"].append({"role": "assistant", "content": said})
    return found


def figures(found: Sequence[dict]) -> dict[str, float]:
    """Shares in per cent: sensible replies, conversations of such alone, loops; and faults."""
    faults = [fault for one in found for fault in one["faults"]]
    sensible = [not any(one["faults"]) for one in found]
    return {
        "sensible": 100 * faults.count(None) / len(faults),
        "both turns": 100 * sum(sensible) / len(sensible),
        "loops": 100 * faults.count("loops") / len(faults),
    }


def trained_on(openings: Sequence[list[dict]], places: Sequence[Path]) -> Iterator[str]:
    """The users' turns of cleaned sets that hold a turn of the openings, punctuation aside."""
    said = {bare(turn["say"]) for turns in openings for turn in turns}
    said = {text for text in said if len(text) >= LEAST}
    pattern = re.compile("|".join(map(re.escape, sorted(said))))
    for place in places:
        files = sorted(place.glob("train-*.jsonl")) if place.is_dir() else [place]
        if not files:
            raise DataError(f"{shown(place)}: wanted train-*.jsonl, found none; make the set first")
        for row in (row for path in files for row in read_rows(path)):
            for message in row.get("messages", ()):
                if message["role"] == "user" and pattern.search(bare(message["content"])):
                    yield f"{row['id']}: {message['content'][:60]}"


def main(cfg: OpeningsConfig) -> None:
    """Look for the openings in sets, or talk and count."""
    openings = read_openings()
    if cfg.rows:
        found = list(trained_on(openings, list(map(from_repo, cfg.rows))))
        if found:
            raise DataError(
                f"wanted no opening of {shown(OPENINGS)} in the sets, found {len(found)}: "
                f"{'; '.join(found[:10])}; take them out of the sets, or write other openings"
            )
        print(f"none of {len(openings)} openings stands in {len(cfg.rows)} sets")
        return
    loaded = load_answering(from_repo(cfg.checkpoint), pick_device(cfg.device))
    drawn = SamplingConfig(cfg.max_new_tokens, loop_guard="redraw", seed=0)  # as chat.py draws
    greedy = replace(drawn, temperature=0.0, loop_guard="off")
    rows = []
    print(f"{shown(loaded.path)}: {len(openings)} openings with their follow-ups")
    for name, way in {"greedy": greedy, "drawn": drawn}.items():
        talked = talk(loaded, openings, way)
        line = "  ".join(f"{what} {share:5.1f} %" for what, share in figures(talked).items())
        faults = Counter(fault for one in talked for fault in one["faults"] if fault)
        print(f"{name:<7} {line}  {dict(faults.most_common())}")
        rows += [{"way": name, **one} for one in talked]
    if cfg.out:
        write_rows(from_repo(cfg.out), rows)
        print(f"conversations: {shown(from_repo(cfg.out))}")


if __name__ == "__main__":
    run(main, parse(OpeningsConfig, __doc__, positional=["checkpoint"]))
