"""A batch of replies under way: what was said, the KV cache, and the logits of what follows.

Prompts are filled up on the left and read at once; each further token is a step. Both are the
decoder's (fast.py). Logits that are no finite numbers are computed again in float32.
"""

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from babyllama.errors import CheckpointError, ConfigError
from babyllama.fast import Decoder, plain_decoder
from babyllama.sampling import SamplingConfig, penalise
from model import Transformer


class Batch:
    """Prompts that were read, and the logits of what follows each.

    said: (B, S) ids of prompt and reply; filler repeats a token of its row, so that who asks what
        was said need not know of it
    """

    def __init__(
        self,
        model: Transformer | Decoder,
        prompts: Sequence[Sequence[int]],
        n_new: int,
        copies: int,
    ) -> None:
        self.decoder = model if isinstance(model, Decoder) else plain_decoder(model)
        net = self.decoder.model
        lengths = [len(prompt) for prompt in prompts]
        longest, context = max(lengths), net.config.max_seq_len
        if min(lengths) < 1 or longest >= context:
            raise ConfigError(
                f"a prompt of {longest} tokens leaves no room for a reply in the model's context "
                f"of {context}, or a prompt is empty; shorten it"
            )
        self.limits = [min(n_new, context - n) for n in lengths for _ in range(copies)]
        self.width, self.size = longest, longest + max(self.limits)
        device = net.rope.device
        filled = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.said = torch.tensor(filled, device=device)
        self.start = torch.tensor([longest - n for n in lengths], device=device)
        self.read()
        if copies > 1:
            self.keep([row for row in range(len(prompts)) for _ in range(copies)])

    def read(self) -> None:
        """Compute the cache and the logits from all that was said."""
        self.cache = self.decoder.new_cache(self.start, self.size)
        self.logits = self._finite(self.decoder.read(self.said, self.cache))

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only; a row may come several times."""
        kept = torch.tensor(rows, device=self.said.device)
        self.cache.keep(kept)
        self.said, self.logits, self.start = self.said[kept], self.logits[kept], self.start[kept]

    def add(self, ids: list[int]) -> None:
        """Continue each row by a token."""
        tokens = torch.tensor(ids, device=self.said.device)
        self.said = torch.cat((self.said, tokens[:, None]), dim=1)
        self.logits = self._finite(self.decoder.step(tokens, self.cache))

    def penalised(self, sampling: SamplingConfig, eos_id: int) -> Tensor:
        """The logits after the penalties for what was said."""
        if not sampling.penalises:
            return self.logits
        return penalise(self.logits, sampling, self.said, self.width, eos_id)

    def _finite(self, logits: Tensor) -> Tensor:
        """The logits, computed again in float32 where they are no finite numbers.

        raises: CheckpointError if that does not help
        """
        if self.decoder.are_finite(logits):
            return logits
        net = self.decoder.model
        if net.output.weight.dtype == torch.float32 and self.decoder.kind == "float32":
            raise CheckpointError(
                "wanted finite logits, found some that are not, in float32 too; the checkpoint is "
                "damaged or its training diverged; use an earlier one"
            )
        warnings.warn(
            f"logits in {self.decoder.kind} were not finite; going on in float32",
            RuntimeWarning,
            stacklevel=1,
        )
        self.decoder = plain_decoder(copy.deepcopy(net).float())
        self.read()
        return self.logits
