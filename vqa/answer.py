"""Answers about a picture: the way that the chat, the scores and a server share.

    loaded = load(Path("out/vqa-splice"))
    text = answer(loaded, [picture_bytes], [{"role": "user", "content": "图片里是什么？"}])

A model of today looks at exactly one picture; none, or several, is a DataError that says so. The
decoding and its limits are babyllama/images.py's, the dialogue's form tokenizer.py's.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from babyllama import images
from babyllama.batch import Batch
from babyllama.errors import ConfigError, DataError
from babyllama.generate import Reply, stream_text
from babyllama.rows import check_messages
from babyllama.sampling import SamplingConfig
from vqa.model import Loaded, VqaModel, with_picture


def look(loaded: Loaded, pictures: Sequence[bytes | Path]) -> Tensor:
    """What the language model gets of the one picture: (1, M, D).

    raises: DataError if it is not one picture, or one that cannot be used
    """
    if not pictures:
        raise DataError(
            "wanted a picture, found a question without one; send it with the question "
            "(--image FILE, or an image_url in the message)"
        )
    if len(pictures) > 1:
        raise DataError(
            f"wanted one picture, found {len(pictures)}; this model looks at one at a time: ask "
            f"about each by itself"
        )
    config = loaded.model.encoder.config
    decoded = images.decode(pictures[0], least=config.size * config.tiles)
    squares = images.squares(decoded, config.size, config.tiles)
    device = loaded.model.output.weight.device
    with torch.inference_mode():
        return loaded.model.see(squares[None].to(device))


def prompt_of(loaded: Loaded, messages: Sequence[dict], seen: Tensor) -> list[int]:
    """The ids of a dialogue that ends with a question, with the picture's positions.

    raises: DataError if it is no such dialogue, ConfigError if it is too long
    """
    finished = [*messages, {"role": "assistant", "content": "-"}]
    reason = check_messages(finished)
    if reason:
        raise DataError(f"messages: wanted questions and answers in turn, found {reason}; "
                        f"end with a question")  # fmt: skip
    n_positions = loaded.model.n_positions
    ids = with_picture(loaded.tokenizer.render_prompt(messages), 0, n_positions)
    context = loaded.model.config.max_seq_len
    if len(ids) >= context:
        raise ConfigError(
            f"wanted a dialogue of less than {context} tokens, found {len(ids)}, of which the "
            f"picture takes {n_positions}; begin a new one or shorten the question"
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
    if sampling.n > 1 or sampling.beams > 1:
        raise ConfigError("answers about pictures want n 1 and beams 1; leave these settings out")
    ids = prompt_of(loaded, messages, seen)
    with loaded.model.looking_at(seen):
        yield from stream_text(loaded.model.decoder(seen), ids, sampling, loaded.tokenizer, reply)


def answer(
    loaded: Loaded,
    pictures: Sequence[bytes | Path],
    messages: Sequence[dict],
    sampling: SamplingConfig | None = None,
) -> str:
    """The whole answer to the last question; errors as look and prompt_of."""
    sampling = sampling or SamplingConfig(temperature=0.0, max_new_tokens=64)
    return "".join(stream_answer(loaded, look(loaded, pictures), messages, sampling))


@torch.inference_mode()
def greedy(
    model: VqaModel, prompts: Sequence[list[int]], seen: Tensor, eos_id: int, n_new: int = 32
) -> list[list[int]]:
    """The likeliest token after token for many rows at once, up to <eos>.

    prompts: without pictures; each gets that of its row in `seen` (B, M, D)
    """
    rows = [with_picture(ids, n, model.n_positions) for n, ids in enumerate(prompts)]
    replies: list[list[int]] = [[] for _ in rows]
    going = set(range(len(rows)))
    with model.looking_at(seen):
        batch = Batch(model.decoder(seen), rows, n_new, 1)
        # All rows go on together, so that row n keeps looking at picture n.
        for left in reversed(range(min(batch.limits))):
            ids = batch.logits.argmax(dim=1).tolist()
            for row in list(going):
                if ids[row] == eos_id:
                    going.discard(row)
                else:
                    replies[row].append(ids[row])
            if not going or not left:
                break
            batch.add(ids)
    return replies
