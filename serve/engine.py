"""Continuous batching: replies join and leave between the steps that they share.

`Engine.step` reads a block of the prompt that waits longest and continues every reply by a token.
Who runs the steps, in which thread, and what becomes of the pieces is serve's business; nothing
here waits or locks. Rules and random numbers of a reply are sampling.py's: reply number i of a
request is that of generate_replies with the same seed.

What holds for a reply in company, beside the same reply written alone: prompts are read one at a
time, and neither an int8 step nor a draw in C depends on the rows beside it, so with int8 weights
the reply is the same, bit for bit, drawn or not. (The rare draw that ends in torch, and those with
top_k, may round the last bit of a probability otherwise.) Steps in float32 add in an order that
depends on the number of rows and on the column, so logits agree to rounding (1e-6 of their size)
and a reply can change only where two tokens are that near to each other.

Memory of replies that are written together: a KV cache with slots, and prompts read before.

All replies add their newest token in the same column, so that one step serves them; each begins
at a column of its own, and keys are turned by their place in their own reply, so a prompt that was
read elsewhere can be laid in anywhere. Prompts are read in blocks at fixed places: what a block
computes depends on the tokens up to its end and on nothing else, so blocks that were kept are, bit
for bit, what reading them again would give (after PagedAttention, Kwon et al. 2023,
arXiv:2309.06180, whose blocks serve sharing as well).
Axes: L layers, B slots, K key/value heads, S columns, C head width.
"""

import random
import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from babyllama.cpu.decoder import Float32Step
from babyllama.decoder import Decoder, Reply, Rules, random_numbers, redraw
from babyllama.sampling import Chooser, SamplingConfig, n_showable, penalise, until_stop
from model import KVCache, ModelConfig, Transformer
from tokenizer import Tokenizer


class Slots:
    """A KV cache whose rows come and go.

    Memory for `most` rows is taken once; a step works on as many rows as `resize` asked for.

    starts: first column of each row; that of a free one is the newest column, so that it sees
        nothing but itself
    length: the next free column; never less than the longest context, so a prompt always fits in
        front of it
    """

    def __init__(self, model: Transformer, most: int, dtype: torch.dtype | None = None) -> None:
        """dtype: of keys and values; None: that of the weights"""
        self.config: ModelConfig = model.config
        self.context = self.config.max_seq_len
        self.size = self.context + max(self.context // 2, 1)
        # Zeros: what was never written is weighted with 0, and 0 times NaN would not be 0.
        self._memory = torch.zeros(
            self._shape(most), dtype=dtype or model.output.weight.dtype, device=model.rope.device
        ).flatten()
        self.starts: list[int] = []
        self.length = self.context
        self.buffer = self._view(0)

    def _shape(self, rows: int) -> tuple[int, ...]:
        c = self.config
        return (c.n_layers, 2, rows, c.kv_heads, self.size, c.head_dim)

    def _view(self, rows: int) -> Tensor:
        shape = self._shape(rows)
        return self._memory[: torch.Size(shape).numel()].view(shape)

    def resize(self, kept: list[int], rows: int) -> None:
        """Go on with these rows, in this order, and free ones up to `rows`."""
        first = min((self.starts[row] for row in kept), default=self.length)
        moved = self.buffer[:, :, kept, :, first : self.length]  # a copy
        self.starts = [self.starts[row] for row in kept] + [self.length] * (rows - len(kept))
        self.buffer = self._view(rows)
        self.buffer[:, :, : len(kept), :, first : self.length] = moved

    def put(self, row: int, prompt: KVCache) -> None:
        """Lay a prompt that was read into a row."""
        first = self.length - prompt.length
        self.buffer[:, :, row, :, first : self.length] = prompt.buffer[:, :, 0]
        self.starts[row] = first

    def free(self, row: int) -> None:
        self.starts[row] = self.length

    def window(self, whole: bool = True) -> KVCache:
        """The cache as a step wants it: the next column is free in every row.

        whole: all columns, which is what compiled code reads; else those that some row sees
        """
        if self.length == self.size:
            self._move_back()
        hidden = 0 if whole else min(self.starts)
        return _Window(self.buffer[..., hidden:, :], [s - hidden for s in self.starts],
                       self.length - hidden)  # fmt: skip

    def stepped(self, is_free: Sequence[bool]) -> None:
        """A step has filled the newest column."""
        self.length += 1
        for row, free in enumerate(is_free):
            if free:
                self.starts[row] = self.length

    def _move_back(self) -> None:
        """Make room on the right: no row is longer than the context, so the rest is not seen."""
        by = self.length - self.context
        self.buffer[..., : self.context, :] = self.buffer[..., by : self.length, :].clone()
        self.starts = [start - by for start in self.starts]
        self.length = self.context


class _Window(KVCache):
    """A KVCache over memory that exists."""

    def __init__(self, buffer: Tensor, starts: list[int], length: int) -> None:
        self.buffer, self.length = buffer, length
        self.start = torch.tensor(starts, device=buffer.device)
        self.first, self.ragged = min(starts), max(starts) > 0


class PrefixCache:
    """Blocks of prompts that were read, the least used ones forgotten first.

    most_bytes: of keys and values; 0 keeps nothing
    """

    def __init__(self, most_bytes: int, block: int) -> None:
        self.most_bytes, self.block = most_bytes, block
        self.n_bytes = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> list[Tensor]:
        """The longest known beginning, in blocks (L, 2, K, block, C); never the whole prompt, whose
        last token must be read to know what follows."""
        found = []
        for end in range(self.block, len(prompt), self.block):
            key = _key(prompt[:end])
            if key not in self._blocks:
                break
            self._blocks.move_to_end(key)
            found.append(self._blocks[key])
        return found

    def keep(self, prompt: Sequence[int], block: Tensor) -> None:
        """Remember the last block of a beginning."""
        key, size = _key(prompt), block.numel() * block.element_size()
        if key in self._blocks or size > self.most_bytes:
            return
        self._blocks[key] = block.clone()
        self.n_bytes += size
        while self.n_bytes > self.most_bytes:
            _, forgotten = self._blocks.popitem(last=False)
            self.n_bytes -= forgotten.numel() * forgotten.element_size()


def _key(ids: Sequence[int]) -> bytes:
    return array("i", ids).tobytes()  # positions of images are negative


class Reading:
    """A prompt that is being read, block by block.

    n_known: tokens that were read before, for another prompt
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int], known: PrefixCache) -> None:
        self.decoder, self.prompt, self.known = decoder, prompt, known
        start = torch.zeros(1, dtype=torch.int64, device=decoder.model.rope.device)
        self.cache = decoder.new_cache(start, len(prompt))
        for block in known.find(prompt):
            end = self.cache.length + known.block
            self.cache.buffer[:, :, 0, :, self.cache.length : end] = block
            self.cache.length = end
        self.n_known = self.cache.length

    def read_block(self) -> tuple[int, Tensor | None]:
        """Read on; returns how many tokens, and after the last one the logits (1, V)."""
        past = self.cache.length
        end = min(past + self.known.block, len(self.prompt))
        tokens = torch.tensor([self.prompt[past:end]], device=self.cache.buffer.device)
        logits = self.decoder.read(tokens, self.cache)
        if end - past == self.known.block:
            self.known.keep(self.prompt[:end], self.cache.buffer[:, :, 0, :, past:end])
        return end - past, logits if end == len(self.prompt) else None


BLOCK = 64


class Piece(NamedTuple):
    """What a step added to a reply.

    text: whole characters; may be empty
    reason: why the reply ended, "" while it goes on: a reason of Reply, cancelled, time, or error
        (the logits were no finite numbers)
    """

    text: str
    reason: str = ""


@dataclass(eq=False)
class Job:
    """One reply to write.

    number: among the replies to its prompt
    notify: called with each piece, in the thread that steps; the last one has a reason
    cancelled: may be set from any thread; the slot is free after the step under way
    deadline: by `Engine.clock`
    n_known: tokens of the prompt that another one had read before
    image: what the model looks at, of one that sees (serve/vision.py)
    """

    prompt: list[int]
    sampling: SamplingConfig
    notify: Callable[[Piece], None]
    number: int = 0
    deadline: float = float("inf")
    cancelled: bool = False
    reply: Reply = field(default_factory=Reply)
    n_known: int = 0
    image: Tensor | None = None


class _Row:
    """A job whose prompt was read: what its next token depends on."""

    def __init__(self, job: Job, tokenizer: Tokenizer, context: int) -> None:
        self.job = job
        self.rules = Rules(job.sampling, tokenizer.eos_id, tokenizer)
        self.limit = min(job.sampling.max_new_tokens, context - len(job.prompt))
        seed = job.sampling.seed
        seed = random.randrange(2**63) if seed is None else seed
        self.chance = random.Random(f"{seed}/{job.number}")
        self.decode, self.text, self.n_shown = tokenizer.stream_decoder(), "", 0
        self.ended = False

    def penalised(self, logits: Tensor) -> Tensor:
        """The logits (1, V) after the penalties for what was said."""
        job = self.job
        said = torch.tensor([job.prompt + job.reply.ids], device=logits.device)
        return penalise(logits, job.sampling, said, len(job.prompt), self.rules.eos_id)

    def take(self, token: int, found: Tensor, choose: Chooser) -> None:
        """Continue by the token that was drawn from these logits (V,), or end."""
        job, ids, before = self.job, self.job.reply.ids, len(self.job.reply.ids)
        if job.sampling.reads_text:
            token = redraw(found, token, ids, self.rules, self.chance, choose)
        self.rules.extend(job.reply, token, self.limit)
        if len(ids) > before:
            self.text += self.decode(token)
        self.tell(job.reply.reason)

    def tell(self, reason: str) -> None:
        """Give what can be shown, and all of it with a reason, which ends the reply."""
        stop, self.ended = self.job.sampling.stop, bool(reason)
        end = len(until_stop(self.text, stop)) if reason else n_showable(self.text, stop)
        text = self.text[self.n_shown : end]
        self.n_shown = max(self.n_shown, end)
        if text or reason:
            self.job.notify(Piece(text, reason))


def draw(rows: list[_Row], logits: Tensor, choose: Chooser) -> None:
    """Continue each reply by a token, or end it; logits (B, V). Those with the same settings draw
    together, each with its own chances."""
    alike: dict[tuple, list[int]] = {}
    for number, row in enumerate(rows):
        s = row.job.sampling
        key = (s.temperature, s.top_p, s.top_k, s.min_p, s.penalises)
        alike.setdefault(key, []).append(number)
    for numbers in alike.values():
        found = logits if len(numbers) == len(rows) else logits[numbers]
        if rows[numbers[0]].job.sampling.penalises:
            found = torch.cat([rows[n].penalised(found[i : i + 1]) for i, n in enumerate(numbers)])
        # A penalty next to 0 is enough to leave the numbers behind, as is a damaged checkpoint.
        is_finite = torch.isfinite(found.amax(dim=1))
        if not bool(is_finite.all()):
            for number, is_good in zip(numbers, is_finite.tolist(), strict=True):
                if not is_good:
                    rows[number].tell("error")
            numbers = [n for n in numbers if not rows[n].ended]
            found = found[is_finite]
        if numbers:
            chances = random_numbers(found, [rows[n].chance for n in numbers])
            tokens = choose(found, rows[numbers[0]].job.sampling, chances).tolist()
            for i, number in enumerate(numbers):
                rows[number].take(tokens[i], found[i], choose)


class Engine:
    """A model that writes many replies at once.

    n_slots: at most so many replies at a time; the others wait in the order in which they came
    prefix_mb: memory for prompts that were read, for those that begin alike
    block: tokens of a prompt that a step reads, at least, while replies are being written
    clock: in seconds, for deadlines
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        n_slots: int,
        prefix_mb: float = 256,
        block: int = BLOCK,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.decoder, self.tokenizer, self.n_slots = decoder, tokenizer, n_slots
        self.context = decoder.model.config.max_seq_len
        self.slots = Slots(decoder.model, n_slots, decoder.cache_dtype)
        self.known = PrefixCache(int(prefix_mb * 1e6), block)
        self.clock = clock
        self.rows: list[_Row | None] = []
        self.waiting: deque[Job] = deque()
        self.reading: tuple[Job, Reading] | None = None
        # Compiled steps read the whole cache; these two can be given the columns that count.
        self.reads_whole = not isinstance(decoder.step, Float32Step | partial)

    @property
    def n_running(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def n_waiting(self) -> int:
        return len(self.waiting) + (self.reading is not None)

    def add(self, job: Job) -> None:
        """Let a job wait for its turn; its prompt must leave room for a token in the context."""
        self.waiting.append(job)

    def step(self) -> bool:
        """One round; returns whether there is more to do."""
        with torch.inference_mode():
            self._let_go()
            self._read()
            self._write()
            self._shrink()
        return bool(self.n_running or self.n_waiting)

    def _let_go(self) -> None:
        """End what was cancelled and what took too long."""
        now = self.clock()
        for number, row in enumerate(self.rows):
            if row and (reason := _over(row.job, now)):
                row.tell(reason)
                self._leave(number)
        if self.reading and (reason := _over(self.reading[0], now)):
            self.reading[0].notify(Piece("", reason))
            self.reading = None
        for job in [job for job in self.waiting if _over(job, now)]:
            self.waiting.remove(job)
            job.notify(Piece("", _over(job, now)))

    def _leave(self, number: int) -> None:
        self.rows[number] = None
        self.slots.free(number)

    def _read(self) -> None:
        """Read a block's worth of prompts, or a little more."""
        left = self.known.block
        while left > 0 and (self.reading or self.waiting) and self.n_running < self.n_slots:
            if self.reading is None:
                job = self.waiting.popleft()
                reading = Reading(self._decoder_for(job), job.prompt, self.known)
                job.n_known = reading.n_known
                self.reading = job, reading
            job, reading = self.reading
            n_read, logits = reading.read_block()
            left -= n_read
            if logits is not None:
                self.reading = None
                self._join(job, reading, logits)

    def _decoder_for(self, job: Job) -> Decoder:
        """What reads its prompt."""
        return self.decoder

    def _join(self, job: Job, reading: Reading, logits: Tensor) -> None:
        row = _Row(job, self.tokenizer, self.context)
        draw([row], logits, self.decoder.choose)
        if row.ended:
            return
        if None not in self.rows:
            # Room for those who wait as well, so that the memory moves once.
            n = min(self.n_slots, len(self.rows) + 1 + len(self.waiting))
            self.slots.resize(list(range(len(self.rows))), n)
            self.rows += [None] * (n - len(self.rows))
        number = self.rows.index(None)
        self.slots.put(number, reading.cache)
        self.rows[number] = row

    def _write(self) -> None:
        """A token more for every reply."""
        if not self.n_running:
            return
        tokens = [row.job.reply.ids[-1] if row else 0 for row in self.rows]
        device = self.decoder.model.rope.device
        cache = self.slots.window(whole=self.reads_whole)
        logits = self.decoder.step(torch.tensor(tokens, device=device), cache)
        self.slots.stepped([row is None for row in self.rows])
        running = {number: row for number, row in enumerate(self.rows) if row}
        found = logits if None not in self.rows else logits[list(running)]
        draw(list(running.values()), found, self.decoder.choose)
        for number, row in running.items():
            if row.ended:
                self._leave(number)

    def _shrink(self) -> None:
        """Give up free rows when they are a quarter: they cost time, and so does moving."""
        if self.n_waiting or None not in self.rows or self.n_running > 3 * len(self.rows) // 4:
            return
        kept = [number for number, row in enumerate(self.rows) if row]
        self.slots.resize(kept, len(kept))
        self.rows = [self.rows[number] for number in kept]


def _over(job: Job, now: float) -> str:
    """Reason why a job must end before it is finished, or ""."""
    return "cancelled" if job.cancelled else "time" if now > job.deadline else ""
