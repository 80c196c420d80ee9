"""Writing replies: one as a stream, or many at once with a shared KV cache.

The loop is `_write`: draw a token for each row, ask the rules, go on with the rows that have not
ended. How a token is chosen is sampling.py's, what computes the logits decoder.py's. The number of
a reply in its batch and the seed give it random numbers of its own, so it does not depend on which
other replies are written beside it.
"""

import random
from collections.abc import Iterator, Sequence

import torch

from babyllama.decoder import Batch, Decoder, Reply, Rules, random_numbers, redraw
from babyllama.sampling import SamplingConfig, n_showable, until_stop
from model import Transformer
from tokenizer import Tokenizer


def stream(
    model: Transformer | Decoder,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    eos_id: int,
    tokenizer: Tokenizer | None = None,
    reply: Reply | None = None,
) -> Iterator[int]:
    """The tokens of one reply as they are chosen, without <eos>.

    tokenizer: needed by the settings that look at characters (stop, no_repeat_ngram, loop_guard)
    reply: filled on the way, for who wants to know how it ended
    raises: ConfigError if the prompt leaves no room in the context
    """
    reply = Reply() if reply is None else reply
    n_given = 0
    for _ in _write(model, [prompt], sampling, eos_id, tokenizer, [reply]):
        yield from reply.ids[n_given:]
        n_given = len(reply.ids)


def stream_text(
    model: Transformer | Decoder,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    reply: Reply | None = None,
) -> Iterator[str]:
    """The text of one reply as whole characters come, without the stop texts.

    What may be the beginning of a stop text is held back until it is clear that it is none. Bytes
    that never become a whole character are left out.
    """
    reply = Reply() if reply is None else reply
    decode, text, n_shown = tokenizer.stream_decoder(), "", 0
    for token in stream(model, prompt, sampling, tokenizer.eos_id, tokenizer, reply):
        text += decode(token)
        end = n_showable(text, sampling.stop)
        if end > n_shown:
            yield text[n_shown:end]
            n_shown = end
    rest = until_stop(text, sampling.stop)[n_shown:]
    if rest:
        yield rest


def generate(
    model: Transformer | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """The ids of generate_replies."""
    return [r.ids for r in generate_replies(model, prompts, sampling, eos_id, tokenizer)]


def generate_replies(
    model: Transformer | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int,
    tokenizer: Tokenizer | None = None,
) -> list[Reply]:
    """The replies to each prompt: sampling.n to the first, then to the second, and so on.

    Prompts may differ in length; like lengths together waste least.

    tokenizer: needed by the settings that look at characters
    raises: ConfigError if a prompt leaves no room in the context
    """
    replies = [Reply() for _ in range(len(prompts) * sampling.n)]
    for _ in _write(model, prompts, sampling, eos_id, tokenizer, replies):
        pass
    return replies


def _write(
    model: Transformer | Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int,
    tokenizer: Tokenizer | None,
    replies: list[Reply],
) -> Iterator[None]:
    """Fill the replies, a token each at every step; finished ones leave the batch."""
    rules = Rules(sampling, eos_id, tokenizer)
    if not prompts:
        return
    # A generator must not be left inside inference_mode: its caller would be in it, too.
    with torch.inference_mode():
        batch = Batch(model, prompts, sampling.max_new_tokens, sampling.n)
    limits, seed = batch.limits, sampling.seed
    if seed is None:
        seed = random.randrange(2**63)
    chances = [random.Random(f"{seed}/{row}") for row in range(len(replies))]
    rows = list(range(len(replies)))
    while rows:
        with torch.inference_mode():
            logits = batch.penalised(sampling, eos_id)
            numbers = random_numbers(logits, [chances[r] for r in rows])
            draw = batch.decoder.choose
            ids = draw(logits, sampling, numbers).tolist()
            for i, row in enumerate(rows):
                if sampling.reads_text:
                    ids[i] = redraw(logits[i], ids[i], replies[row].ids, rules, chances[row], draw)
                rules.extend(replies[row], ids[i], limits[row])
        yield
        going = [i for i, row in enumerate(rows) if not replies[row].reason]
        with torch.inference_mode():
            if 0 < len(going) < len(rows):
                batch.keep(going)
            rows = [rows[i] for i in going]
            if rows:
                batch.add([ids[i] for i in going])
