"""The same weights in the hands of peers: transformers, and llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import ModelConfig, Transformer

# Peers and exports are imported where they are needed: not where ours alone is measured.
if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from export.gguf import GgufType

# The benchmarked shape: configs/model/43m.yaml with a vocabulary of 65,000.
SHAPE_43M = ModelConfig(vocab_size=65_000)


def hf_model(config: ModelConfig) -> LlamaForCausalLM:
    """A transformers model of our shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from export.hf import llama_shape

    return LlamaForCausalLM(LlamaConfig(**llama_shape(config)))


def hf_copy(model: Transformer) -> LlamaForCausalLM:
    """A transformers model with our weights."""
    from export.hf import hf_names

    peer, names = hf_model(model.config), hf_names(model.config)
    peer.load_state_dict({names[name]: weight for name, weight in model.state_dict().items()})
    return peer.eval()


def usual_step(
    model: LlamaForCausalLM, ids: Tensor, precision: str, compiled: bool = False
) -> Callable[[], None]:
    """A step of the usual loop: transformers' own loss, torch's AdamW, clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=ids.is_cuda)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def write_gguf(model: Transformer, file: Path, kind: GgufType) -> None:
    """A GGUF file with the model's weights; its tokens have names, but only numbers are used."""
    from gguf import GGUFWriter

    from export.gguf import add_shape, add_weights, finish

    writer = GGUFWriter(file, "llama")
    add_shape(writer, model.config, file.stem)
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [2, 3, 3] + [6] * 256  # unknown, control, byte; 1: normal
    n_rest = model.config.vocab_size - len(pieces)
    pieces += [f"t{number}" for number in range(n_rest)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(number) for number in range(len(pieces))])
    writer.add_token_types(kinds + [1] * n_rest)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    add_weights(writer, model, kind)
    finish(writer)


class LlamaCpp:
    """A GGUF file in llama.cpp, by way of llama-cpp-python, as fast as it goes."""

    def __init__(self, file: Path, threads: int) -> None:
        from llama_cpp import Llama

        self._model = Llama(
            str(file), n_ctx=512, n_batch=512, n_ubatch=512, n_threads=threads,
            n_threads_batch=threads, verbose=False,
        )  # fmt: skip

    def generate(self, prompt: Sequence[int], n: int, greedy: bool) -> int:
        """Let it write exactly n tokens, greedy or at 0.8 and top-p 0.9; returns how many came."""
        drawn = {"temp": 0.0} if greedy else {"temp": 0.8, "top_p": 0.9}
        self._model.reset()  # or it would begin where an equal prompt ended
        tokens = self._model.generate(prompt, top_k=0, min_p=0.0, repeat_penalty=1.0, **drawn)
        return sum(1 for _ in islice(tokens, n))
