"""Memory of replies that are written together: a KV cache with slots, and prompts read before.

All replies add their newest token in the same column, so that one step serves them; each begins
at a column of its own, and keys are turned by their place in their own reply, so a prompt that was
read elsewhere can be laid in anywhere. Prompts are read in blocks at fixed places: what a block
computes depends on the tokens up to its end and on nothing else, so blocks that were kept are, bit
for bit, what reading them again would give (after PagedAttention, Kwon et al. 2023,
arXiv:2309.06180, whose blocks serve sharing as well).
Axes: L layers, B slots, K key/value heads, S columns, C head width.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from babyllama.fast import Decoder
from model import KVCache, ModelConfig, Transformer


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
    return array("i", ids).tobytes()  # positions of pictures are negative


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
