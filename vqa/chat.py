"""Talk about an image in the terminal.

    python -m vqa.chat out/vqa-splice --image photo.jpg
    python -m vqa.chat out/vqa-splice --image photo.jpg --ask 图片里是什么？

/image FILE looks at another image and begins anew, an empty line or Ctrl-D ends.

The chat, the scores and a server share the functions here. A model of today looks at exactly one
image; none, or several, is a DataError that says so.
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from babyllama.config import from_repo, parse, run
from babyllama.decoder import Batch, Reply
from babyllama.device import pick_device
from babyllama.errors import ConfigError, DataError
from babyllama.generate import stream_text
from babyllama.language import verbatim
from babyllama.language.letters import as_trained
from babyllama.rows import check_messages
from babyllama.sampling import SamplingConfig
from vqa.data import prepared
from vqa.model import Loaded, VqaModel, load, with_image


def look(loaded: Loaded, given: Sequence[bytes | Path]) -> Tensor:
    """What the language model gets of the one image: (1, M, D).

    raises: DataError if it is not one image, or one that cannot be used
    """
    if not given:
        raise DataError(
            "wanted an image, found a question without one; send it with the question "
            "(--image FILE, or an image_url in the message)"
        )
    if len(given) > 1:
        raise DataError(
            f"wanted one image, found {len(given)}; this model looks at one at a time: ask "
            f"about each by itself"
        )
    squares = prepared(given[0], "", loaded.model.encoder.config)
    device = loaded.model.output.weight.device
    with torch.inference_mode():
        return loaded.model.see(squares[None].to(device))


def prompt_of(loaded: Loaded, messages: Sequence[dict], seen: Tensor) -> list[int]:
    """The ids of a dialogue that ends with a question, with the image's positions.

    raises: DataError if it is no such dialogue, ConfigError if it is too long
    """
    finished = [*messages, {"role": "assistant", "content": "-"}]
    reason = check_messages(finished)
    if reason:
        raise DataError(f"messages: wanted questions and answers in turn, found {reason}; "
                        f"end with a question")  # fmt: skip
    n_positions = loaded.model.n_positions
    ids = with_image(loaded.tokenizer.render_prompt(as_trained(messages)), 0, n_positions)
    context = loaded.model.config.max_seq_len
    if len(ids) >= context:
        raise ConfigError(
            f"wanted a dialogue of less than {context} tokens, found {len(ids)}, of which the "
            f"image takes {n_positions}; begin a new one or shorten the question"
        )
    return ids


def stream_answer(
    loaded: Loaded,
    seen: Tensor,
    messages: Sequence[dict],
    sampling: SamplingConfig,
    reply: Reply | None = None,
) -> Iterator[str]:
    """The answer as whole characters come; errors as prompt_of.

    seen: what `look` gave, for as many questions as wanted
    """
    if sampling.n > 1:
        raise ConfigError("answers about images want n 1; leave the setting out")
    ids = prompt_of(loaded, messages, seen)
    with loaded.model.looking_at(seen):
        yield from stream_text(loaded.model.decoder(seen), ids, sampling, loaded.tokenizer, reply)


@torch.inference_mode()
def greedy(
    model: VqaModel, prompts: Sequence[list[int]], seen: Tensor, eos_id: int, n_new: int = 32
) -> list[list[int]]:
    """The likeliest token after token for many rows at once, up to <eos>.

    prompts: without images; each gets that of its row in `seen` (B, M, D)
    """
    rows = [with_image(ids, n, model.n_positions) for n, ids in enumerate(prompts)]
    said: list[list[int]] = []
    has_ended = [False] * len(rows)
    with model.looking_at(seen):
        batch = Batch(model.decoder(seen), rows, n_new, 1)
        # All rows go on together, so that row n keeps looking at image n.
        for left in reversed(range(min(batch.limits))):
            said.append(batch.logits.argmax(dim=1).tolist())
            has_ended = [end or i == eos_id for end, i in zip(has_ended, said[-1], strict=True)]
            if all(has_ended) or not left:
                break
            batch.add(said[-1])
    return [list(itertools.takewhile(eos_id.__ne__, row)) for row in zip(*said, strict=True)]


@dataclass(frozen=True)
class ChatConfig:
    """Settings of a talk.

    Args:
        checkpoint: a run or a checkpoint of python -m vqa.train
        image: the image
        ask: one question, answered without a talk
        sampling: how answers are drawn
        device: where to compute; auto: the fastest there is
    """

    checkpoint: Path | None = None
    image: Path | None = None
    ask: str | None = None
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(temperature=0.0, max_new_tokens=64)
    )
    device: str = "auto"


def main(cfg: ChatConfig) -> None:
    """Answer until the user has enough."""
    if cfg.checkpoint is None:
        raise ConfigError("wanted a checkpoint: python -m vqa.chat out/NAME --image FILE")
    loaded = load(from_repo(cfg.checkpoint), pick_device(cfg.device))
    seen = look(loaded, [cfg.image.expanduser()] if cfg.image else [])
    messages: list[dict] = []
    while True:
        try:
            question = cfg.ask or input("人类：").strip()
        except EOFError:
            return
        if not question:
            return
        if question.startswith("/image"):
            try:
                name = question.removeprefix("/image").strip()
                seen, messages = look(loaded, [Path(name).expanduser()]), []
            except DataError as error:
                print(f"error: {error}", file=sys.stderr)
            continue
        messages.append({"role": "user", "content": question})
        text = ""
        print("助手：", end="", flush=True)
        for part in stream_answer(loaded, seen, messages, cfg.sampling):
            text += part
            print(part, end="", file=verbatim(sys.stdout), flush=True)
        print()
        if cfg.ask:
            return
        messages.append({"role": "assistant", "content": text or "…"})


if __name__ == "__main__":
    run(main, parse(ChatConfig, __doc__, positional=("checkpoint",)))
