"""The same weights in the hands of peers: transformers, and llama.cpp in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from babyllama.errors import ConfigError
from export.gguf import GgufType, add_shape, add_weights, finish
from export.hf import hf_names, llama_shape
from export.tools import package
from model import ModelConfig, Transformer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# The benchmarked shape: configs/model/43m.yaml with a vocabulary of 65,000.
SHAPE_43M = ModelConfig(vocab_size=65_000)


def hf_model(config: ModelConfig) -> LlamaForCausalLM:
    """A transformers model of our shape with random weights."""
    transformers = package("transformers")  # not where ours alone is measured
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_shape(config)))


def hf_copy(model: Transformer) -> LlamaForCausalLM:
    """A transformers model with our weights."""
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
    writer = package("gguf").GGUFWriter(file, "llama")
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
    """A process that decodes with llama.cpp (llama_peer.py); a context manager."""

    def __init__(self, python: Path, file: Path, threads: int) -> None:
        command = [str(python), str(Path(__file__).with_name("llama_peer.py")), str(file)]
        self.process = subprocess.Popen(
            [*command, str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer(f"{python} with llama-cpp-python, that loads {file}")

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def generate(self, prompt: Sequence[int], n: int, greedy: bool) -> int:
        """Let it write exactly n tokens; returns how many came."""
        asked = {"prompt": list(prompt), "n": n, "greedy": greedy}
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return self._answer("a reply of llama.cpp")["tokens"]

    def _answer(self, wanted: str) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.stderr.flush()
            raise ConfigError(
                f"wanted {wanted}, found that it ended with exit code {self.process.wait()}; see "
                f"its message above; pip install llama-cpp-python there"
            )
        return json.loads(line)
