"""Write a checkpoint as a GGUF file for llama.cpp and its relatives, and prove it.

    python -m export.gguf out/redgpt --out out/redgpt-gguf                  float32
    python -m export.gguf out/redgpt --out out/redgpt-q8 --type q8_0        a quarter of the size
    llama-server -m out/redgpt-q8/redgpt-q8_0.gguf --jinja
    ollama create redgpt -f out/redgpt-q8/Modelfile

The file (GGUF 3) holds weights, shape, vocabulary and chat template; parity.json beside it tells
what was compared. transformers reads the file back: its logits and greedy replies must be those of
the checkpoint, or, for f16 and q8_0, of the checkpoint with its weights rounded in that way; how
far the rounding itself moves the logits is counted. A SentencePiece model built from the vocabulary
in the file must give our ids. Where llama-cpp-python is installed, llama.cpp itself is compared
too: token ids and rendered chats always, logits and replies for f32 (its kernels round more for the
other types).

Rows of wq and wk are put in another order. Our heads (and transformers') turn the pairs
(c, c + C/2), llama.cpp's "llama" architecture turns (2c, 2c + 1): llama_model_rope_type in its
src/llama-model.cpp gives LLM_ARCH_LLAMA the type NORM, "operating on pairs of consecutive head
values", and LlamaModel.permute in its convert_hf_to_gguf.py reorders in this way. Scores are sums
over the whole head, so an order that queries and keys share changes nothing else.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from babyllama.checkpoint import Loaded, load_model, model_weights
from babyllama.config import parse, run
from babyllama.generate import generate
from babyllama.run_dir import chosen_run
from babyllama.sampling import SamplingConfig
from export import parity, tools
from export.hf import hf_names
from model import ModelConfig, Transformer
from tokenizer import LABELS, SEPARATOR

GgufType = Literal["f32", "f16", "q8_0"]

# q8_0 stores so many weights of a row as a float16 scale and as many whole numbers.
_BLOCK = 32
WIDTH = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / _BLOCK}  # bytes a weight takes


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter, and its name in GGUF."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH.LLAMA, config.n_layers)
    return {ours: known.get_name(name, (".weight",)) for ours, name in hf_names(config).items()}


def interleave(weight: Tensor, n_heads: int) -> Tensor:
    """Rows c and c + C/2 of each head, which turn together, side by side."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])  # (H, 2, C/2, D)
    return halves.transpose(1, 2).reshape(weight.shape)


def in_their_order(name: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """A weight with its rows as llama.cpp wants them."""
    if name.endswith("attention.wq.weight"):
        return interleave(weight, config.n_heads)
    if name.endswith("attention.wk.weight"):
        return interleave(weight, config.kv_heads)
    return weight


def type_of(weight: Tensor, wanted: GgufType) -> GgufType:
    """Format of a stored weight: norms stay float32, rows that are no whole blocks float16."""
    if weight.dim() < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and weight.shape[-1] % _BLOCK else wanted


def stored(weight: Tensor, kind: GgufType) -> np.ndarray:
    """The bytes or numbers of a weight in the file."""
    from gguf import GGMLQuantizationType, quants

    return quants.quantize(weight.numpy(), GGMLQuantizationType[kind.upper()])


def rounded(model: Transformer, wanted: GgufType) -> Transformer:
    """A copy of the model whose weights are what the file can hold of them."""
    from gguf import GGMLQuantizationType, quants

    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            kind = type_of(weight, wanted)
            read = quants.dequantize(
                stored(weight.detach(), kind), GGMLQuantizationType[kind.upper()]
            )
            weight.copy_(torch.from_numpy(read))
    return twin


def write_file(loaded: Loaded, file: Path, wanted: GgufType) -> dict[str, int]:
    """Write the GGUF file; returns how many tensors have which type."""
    import gguf

    config = loaded.config
    writer = gguf.GGUFWriter(file, "llama")
    add_shape(writer, config, loaded.path.parent.name)
    mostly = "ALL" if wanted == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{mostly}_{wanted.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, loaded)
    counts = add_weights(writer, loaded.model, wanted)
    finish(writer)
    return counts


def add_weights(writer: Any, model: Transformer, wanted: GgufType) -> dict[str, int]:
    """All weights under llama.cpp's names; returns how many tensors have which type."""
    from gguf import GGMLQuantizationType

    names, weights = gguf_names(model.config), model_weights(model)
    for name in parity.bar(list(weights), "store weights"):
        kind = type_of(weights[name], wanted)
        data = stored(in_their_order(name, weights[name], model.config).contiguous(), kind)
        writer.add_tensor(names[name], data, raw_dtype=GGMLQuantizationType[kind.upper()])
    return Counter(type_of(weight, wanted) for weight in weights.values())


def finish(writer: Any) -> None:
    """Write everything that was added to the file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_shape(writer: Any, config: ModelConfig, name: str) -> None:
    """What llama.cpp must know of the network."""
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def add_vocabulary(writer: Any, loaded: Loaded) -> None:
    """Pieces with scores and kinds, the special ids, the chat template.

    GGUF numbers the kinds of pieces as SentencePiece does. "llama" means BPE by scores.
    """
    tokenizer = loaded.tokenizer
    proto = tools.read_proto(tokenizer)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece.encode() for piece in proto.pieces])
    writer.add_token_scores([piece.score for piece in proto.pieces])
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    # The template writes <s> itself, and nothing else may come before a text.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
    writer.add_chat_template(tools.chat_template())


def vocabulary_in(file: Path) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """A SentencePiece model made of nothing but what the file says, and the chat template."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    read = {name: field.contents() for name, field in fields.items() if "tokenizer." in name}
    proto = sentencepiece_model_pb2.ModelProto()
    columns = (read[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for text, score, kind in zip(*columns, strict=True):
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = read["tokenizer.ggml.unknown_token_id"]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = read["tokenizer.ggml.add_space_prefix"]
    proto.normalizer_spec.remove_extra_whitespaces = False
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return model, read["tokenizer.chat_template"]


@dataclass(frozen=True)
class GgufConfig(parity.ExportConfig):
    """Source, rounding and target of an export.

    Args:
        checkpoint: a run (its newest step) or one step; if absent the newest run in out/
        type: of the weights: f32 (as trained), f16, or q8_0 (8 bits and a scale for 32)
    """

    type: GgufType = "f32"


def drift(loaded: Loaded, twin: Transformer, material: parity.Material) -> dict:
    """What rounding does: mean Kullback-Leibler divergence of a token, and replies kept.

    Counted, not bounded: it is the price of the type that was asked for.
    """
    divergence, n_tokens = 0.0, 0
    for ids in parity.bar(material.finished(loaded), "measure the rounding"):
        with torch.inference_mode():
            ours, theirs = (
                net(torch.tensor([ids]))[0].float().log_softmax(-1) for net in (loaded.model, twin)
            )
        divergence += float(F.kl_div(theirs, ours, reduction="sum", log_target=True))
        n_tokens += len(ids)

    def replies(prompts: list[list[int]], n_new: int) -> list[list[int]]:
        return generate(twin, prompts, SamplingConfig(n_new, temperature=0), eos_id)

    eos_id, prompts = loaded.tokenizer.eos_id, material.prompts(loaded)
    n_kept = parity.compare_replies(loaded.model, eos_id, replies, prompts)["equal"]
    return {
        "mean_divergence": divergence / n_tokens, "prompts": len(prompts), "equal": n_kept,
        "passed": None,
    }  # fmt: skip


def prove(loaded: Loaded, file: Path, material: parity.Material, wanted: GgufType) -> dict:
    """Compare the file, as three readers see it, with the checkpoint."""
    twin = loaded.model if wanted == "f32" else rounded(loaded.model, wanted)
    pieces, template = vocabulary_in(file)
    peer = tools.GgufInTransformers(file, loaded.tokenizer.eos_id)
    report = {
        **parity.origin_of(loaded, material, ["transformers"]),
        "type": wanted,
        **parity.compare_model(loaded, peer, material, twin),
        **parity.compare_text(loaded, pieces.encode, renderer(loaded, template), material),
    }
    if wanted != "f32":
        report["rounding"] = drift(loaded, twin, material)
    if find_spec("llama_cpp") is None:
        return report | {"llama_cpp": "llama.cpp was not compared: llama-cpp-python is missing"}
    report["versions"]["llama_cpp"] = version("llama-cpp-python")
    return report | prove_llama_cpp(loaded, file, material, wanted)


def renderer(loaded: Loaded, template: str) -> Callable[[list[dict], bool], str]:
    """A template rendered by Jinja as chat programs do, with the special pieces' names."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    engine = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled, (bos, eos) = engine.from_string(template), tools.ends_of(loaded.tokenizer)
    return lambda messages, is_prompt: compiled.render(
        messages=messages, add_generation_prompt=is_prompt, bos_token=bos, eos_token=eos
    )


def prove_llama_cpp(
    loaded: Loaded, file: Path, material: parity.Material, wanted: GgufType
) -> dict[str, dict]:
    """The same comparisons in llama.cpp; logits and replies are bounded for f32 only."""
    peer = tools.LlamaCpp(file, loaded.config.max_seq_len)
    model = parity.compare_model(loaded, peer, material)
    if wanted != "f32":
        model = {name: check | {"passed": None} for name, check in model.items()}
    text = parity.compare_text(loaded, peer.encode, renderer(loaded, peer.template), material)
    return {f"llama_cpp_{name}": check for name, check in (model | text).items()}


def modelfile(loaded: Loaded, file: str) -> str:
    """What `ollama create NAME -f Modelfile` reads: the file, the chat format, how to choose.

    The template is Go's, and writes <bos> itself, as the GGUF file asks for.
    """
    bos, eos = tools.ends_of(loaded.tokenizer)
    turns = "{{ else }}".join(
        f'{{{{ if eq .Role "{role}" }}}}{label}{{{{ .Content }}}}{eos * (role == "assistant")}'
        for role, label in LABELS.items()
    ) + "{{ end }}" * len(LABELS)  # fmt: skip
    values = {
        "FILE": file, "BOS": bos, "EOS": eos, "SEPARATOR": SEPARATOR, "TURNS": turns,
        "ASSISTANT": LABELS["assistant"], "CONTEXT": loaded.config.max_seq_len,
        "TEMPERATURE": SamplingConfig.temperature, "TOP_P": SamplingConfig.top_p,
        "TOP_K": loaded.config.vocab_size,
    }  # fmt: skip
    return tools.filled("Modelfile", {name: str(value) for name, value in values.items()})


def main(cfg: GgufConfig) -> None:
    """Write the file, prove it, put its directory in its place."""
    import gguf  # noqa: F401  (if one is missing, that is said before the work)
    import transformers  # noqa: F401

    source = chosen_run(cfg.checkpoint)
    out = parity.check_out(cfg.out, cfg.force, source)
    loaded = load_model(source)
    tools.require_convertible(loaded.tokenizer, "llama.cpp")
    material = parity.read_material(cfg.text)
    n_bytes = int(WIDTH[cfg.type] * loaded.model.n_parameters()) + 50 * loaded.config.vocab_size
    with parity.new_folder(out, n_bytes) as place:
        file = place / f"{loaded.path.parent.name}-{cfg.type}.gguf"
        counts = write_file(loaded, file, cfg.type)
        (place / "Modelfile").write_text(modelfile(loaded, file.name), "utf-8")
        report = prove(loaded, file, material, cfg.type) | {"tensors": counts}
        parity.settle(report, place, out)
    parity.show(report, out)


if __name__ == "__main__":
    run(main, parse(GgufConfig, doc=__doc__, positional=("checkpoint",)))
