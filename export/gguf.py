"""Write a checkpoint as a GGUF file for llama.cpp and its relatives, and prove it.

    python -m export.gguf out/redgpt --out out/redgpt-gguf                  float32
    python -m export.gguf out/redgpt --out out/redgpt-q8 --type q8_0        a quarter of the size
    llama-server -m out/redgpt-q8/redgpt-q8_0.gguf --jinja

The file holds weights, shape, vocabulary and chat template; parity.json beside it tells what was
compared. transformers reads the file back: its logits and greedy replies must be those of the
checkpoint, or, for f16 and q8_0, of the checkpoint with its weights rounded in that way; how far
the rounding itself moves the logits is counted. A SentencePiece model built from the vocabulary in
the file must give our ids. Where llama-cpp-python is installed, llama.cpp itself is compared too:
token ids and rendered chats always, logits and replies for f32 (its kernels round more for the
other types).
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from babyllama.checkpoint import Loaded, load_model
from babyllama.cli import parse, run
from babyllama.generate import SamplingConfig, generate
from export.folder import check_out, new_folder, settle, show, source_of
from export.gguf_file import WIDTH, GgufType, rounded, vocabulary_in, write_file
from export.parity import (
    AT_ONCE,
    N_NEW,
    Material,
    compare_ids,
    compare_logits,
    compare_replies,
    compare_templates,
    origin_of,
    read_material,
)
from export.peers import GgufInTransformers, LlamaCpp, package
from export.vocabulary import piece_of, probes, require_convertible
from model import Transformer


@dataclass(frozen=True)
class GgufConfig:
    """What is exported, how it is rounded, and where to.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest run in out/
        out: directory to make
        type: of the weights: f32 (as trained), f16, or q8_0 (8 bits and a scale for 32)
        force: replace an earlier export of that name as a whole
        text: UTF-8 file whose lines are compared; if absent data/clean, or built-in news
    """

    checkpoint: Path | None = None
    out: Path | None = None
    type: GgufType = "f32"
    force: bool = False
    text: Path | None = None


def drift(
    model: Transformer, twin: Transformer, eos_id: int, finished: list[list[int]],
    prompts: list[list[int]],
) -> dict:  # fmt: skip
    """What rounding does: mean Kullback-Leibler divergence of a token, and replies kept.

    Counted, not bounded: it is the price of the type that was asked for.
    """
    divergence, n_tokens = 0.0, 0
    for ids in tqdm(finished, desc="measure the rounding", leave=False, disable=None):
        with torch.inference_mode():
            ours, theirs = (net(torch.tensor([ids]))[0].float() for net in (model, twin))
        gap = F.kl_div(
            theirs.log_softmax(-1), ours.log_softmax(-1), reduction="sum", log_target=True
        )
        divergence, n_tokens = divergence + float(gap), n_tokens + len(ids)
    greedy = SamplingConfig(temperature=0, max_new_tokens=N_NEW)
    parts = [prompts[start : start + AT_ONCE] for start in range(0, len(prompts), AT_ONCE)]
    pairs = [zip(*(generate(net, p, greedy, eos_id) for net in (model, twin)), strict=True)
             for p in parts]  # fmt: skip
    n_kept = sum(ours == theirs for pair in pairs for ours, theirs in pair)
    return {
        "mean_divergence": divergence / n_tokens, "prompts": len(prompts), "equal": n_kept,
        "passed": None,
    }  # fmt: skip


def prove(loaded: Loaded, file: Path, material: Material, wanted: GgufType) -> dict:
    """Compare the file, as three readers see it, with the checkpoint."""
    tokenizer, context = loaded.tokenizer, loaded.config.max_seq_len
    finished = material.finished(tokenizer, context)
    prompts = material.prompts(tokenizer, context)
    twin = loaded.model if wanted == "f32" else rounded(loaded.model, wanted)
    peer = GgufInTransformers(file, tokenizer.eos_id)
    pieces, template = vocabulary_in(file)
    report = {
        **origin_of(loaded, material, ["transformers"]),
        "type": wanted,
        "logits": compare_logits(twin, peer.logits, finished),
        "replies": compare_replies(twin, tokenizer.eos_id, peer.replies, prompts),
        "token_ids": compare_ids(tokenizer, pieces.encode, material.lines),
        "hard_token_ids": compare_ids(tokenizer, pieces.encode, probes(tokenizer)),
        "chat_template": compare_templates(
            tokenizer, renderer(loaded, template), None, material.lines
        ),
    }
    if wanted != "f32":
        report["rounding"] = drift(loaded.model, twin, tokenizer.eos_id, finished, prompts)
    if find_spec("llama_cpp") is None:
        return report | {"llama_cpp": "llama.cpp was not compared: llama-cpp-python is missing"}
    report["versions"]["llama_cpp"] = package("llama_cpp").__version__
    return report | prove_llama_cpp(loaded, file, material, wanted)


def renderer(loaded: Loaded, template: str) -> Callable[[list[dict], bool], str]:
    """A template rendered by Jinja as chat programs do, with the special pieces' names."""
    sandbox = package("jinja2.sandbox")
    engine = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = engine.from_string(template)
    bos, eos = (
        piece_of(loaded.tokenizer, i) for i in (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id)
    )
    return lambda messages, is_prompt: compiled.render(
        messages=messages, add_generation_prompt=is_prompt, bos_token=bos, eos_token=eos
    )


def prove_llama_cpp(
    loaded: Loaded, file: Path, material: Material, wanted: GgufType
) -> dict[str, dict]:
    """The same comparisons in llama.cpp; logits and replies are bounded for f32 only."""
    tokenizer, context = loaded.tokenizer, loaded.config.max_seq_len
    peer = LlamaCpp(file, context)
    found = {
        "llama_cpp_logits": compare_logits(
            loaded.model, peer.logits, material.finished(tokenizer, context)
        ),
        "llama_cpp_replies": compare_replies(
            loaded.model, tokenizer.eos_id, peer.replies, material.prompts(tokenizer, context)
        ),
        "llama_cpp_token_ids": compare_ids(tokenizer, peer.encode, material.lines),
        "llama_cpp_hard_token_ids": compare_ids(tokenizer, peer.encode, probes(tokenizer)),
        "llama_cpp_chat_template": compare_templates(
            tokenizer, renderer(loaded, peer.template), peer.encode_rendered, material.lines
        ),
    }
    if wanted != "f32":
        for name in ("llama_cpp_logits", "llama_cpp_replies"):
            found[name]["passed"] = None
    return found


def main(cfg: GgufConfig) -> None:
    """Write the file, prove it, put its directory in its place."""
    source = source_of(cfg.checkpoint)
    out = check_out(cfg.out, cfg.force, source)
    package("gguf"), package("transformers")
    loaded = load_model(source)
    require_convertible(loaded.tokenizer, "llama.cpp")
    material = read_material(cfg.text)
    n_bytes = int(WIDTH[cfg.type] * loaded.model.n_parameters()) + 50 * loaded.config.vocab_size
    with new_folder(out, n_bytes) as place:
        file = place / f"{loaded.path.parent.name}-{cfg.type}.gguf"
        counts = write_file(loaded, file, cfg.type)
        report = prove(loaded, file, material, cfg.type) | {"tensors": counts}
        settle(report, place, out)
    show(report, out)


if __name__ == "__main__":
    run(main, parse(GgufConfig, doc=__doc__, positional=("checkpoint",)))
