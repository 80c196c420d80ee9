"""Real servers for tests: a small checkpoint, a process on a free port, and its end."""

import base64
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from babyllama.config import REPO
from babyllama.sampling import SamplingConfig
from conftest import save_model, small_config
from model import Transformer
from tokenizer import Tokenizer
from vqa.chat import look, stream_answer
from vqa.encoders import EncoderConfig, make_encoder
from vqa.model import FusionConfig, Loaded, VqaModel
from warm import Process, keeper

CONTEXT = 4096


def answer(
    loaded: Loaded, given: list, messages: list[dict], sampling: SamplingConfig | None = None
) -> str:
    """The whole answer to the last question about an image."""
    sampling = sampling or SamplingConfig(temperature=0.0, max_new_tokens=64)
    return "".join(stream_answer(loaded, look(loaded, given), messages, sampling))


def endless_model(tokenizer: Tokenizer, context: int = CONTEXT) -> Transformer:
    """Random weights with clear choices that hardly ever end a reply."""
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer.vocab_size, max_seq_len=context)).eval()
    with torch.no_grad():
        model.norm.weight *= 20
        model.output.weight[tokenizer.eos_id] = 0
    return model


def talkative_model(tokenizer: Tokenizer, context: int = CONTEXT) -> Transformer:
    """The same, and every token is text that shows: neither a blank nor bytes of a character."""
    model = endless_model(tokenizer, context)
    for token in range(tokenizer.vocab_size):
        if "\ufffd" in tokenizer.decode([token]) or not tokenizer.decode([token]).strip():
            model.output.weight.data[token] = 0
    return model


def seeing_model(tokenizer: Tokenizer, fusion: str = "cross", context: int = 256) -> VqaModel:
    """The same behind an encoder with random weights: its replies depend on the image."""
    language = endless_model(tokenizer, context)
    encoder = make_encoder(EncoderConfig(size=32, grid=1, depths=(3, 4)))
    torch.manual_seed(1)
    model = VqaModel(language, encoder, FusionConfig(fusion, n_queries=3, n_blocks=1))
    for gate in model.connector.gates.values():
        torch.nn.init.ones_(gate.open_look)
        torch.nn.init.ones_(gate.open_think)
    with torch.no_grad():
        for net in model.connector.projector.depths:
            net[-1].weight *= 30
    return model.eval()


def as_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def save(model: Transformer, tokenizer: Tokenizer, run: Path, kind: str = "sft") -> Path:
    """The model as a fine-tuning run leaves it, or one of another kind; returns the run."""
    return save_model(run, model, tokenizer, kind).parent


@dataclass
class Running:
    """A server process that answers."""

    process: Process
    url: str
    log: Path

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def metric(self, name: str) -> float:
        """The sum of a metric's values."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


@contextlib.contextmanager
def serving(checkpoint: Path, log: Path, *flags: str) -> Iterator[Running]:
    """A server of its own; flags may say more than the ones here."""
    words = [str(REPO / "serve/server.py"), str(checkpoint), "--port", "0", "--wiki-url=", *flags]
    with open(log, "wb") as errors:
        process = keeper().start(words, REPO, log=errors.fileno())
    try:
        lines = []
        while not (lines and lines[-1].startswith("http")):
            lines.append(process.said.readline())
            assert lines[-1], f"no server: {lines} {log.read_text()}"
        yield Running(process, lines[-1].split()[0], log)
        process.send_signal(signal.SIGTERM)
        # Nothing that a client does may leave a traceback behind.
        assert process.wait(timeout=60) == 0 and "Traceback" not in log.read_text("utf-8"), (
            log.read_text("utf-8")
        )
    finally:
        process.close()
