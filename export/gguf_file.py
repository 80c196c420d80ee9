"""A GGUF file of a checkpoint: names, order of rows, types, vocabulary; and reading it back.

Rows of wq and wk are put in another order. Our heads (and transformers') turn the pairs
(c, c + C/2), llama.cpp's "llama" architecture turns (2c, 2c + 1): llama_model_rope_type in its
src/llama-model.cpp gives LLM_ARCH_LLAMA the type NORM, "operating on pairs of consecutive head
values", and LlamaModel.permute in its convert_hf_to_gguf.py reorders in this way. Scores are sums
over the whole head, so an order that queries and keys share changes nothing else. Format: GGUF 3.
"""

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor
from tqdm import tqdm

from babyllama.checkpoint import Loaded, model_weights
from export.dialogue import chat_template
from export.peers import package
from export.vocabulary import read_proto
from model import ModelConfig, Transformer

GgufType = Literal["f32", "f16", "q8_0"]

LAYER_NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
OUTER_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}

# q8_0 stores so many weights of a row as a float16 scale and as many whole numbers.
_BLOCK = 32
WIDTH = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / _BLOCK}  # bytes a weight takes


def gguf_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter, and its name in GGUF."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER_NAMES.items()}
    for layer in range(config.n_layers):
        for ours, theirs in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


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
    """How a weight is stored: norms stay float32, rows that are no whole blocks float16."""
    if weight.dim() < 2:
        return "f32"
    return "f16" if wanted == "q8_0" and weight.shape[-1] % _BLOCK else wanted


def stored(weight: Tensor, kind: GgufType) -> np.ndarray:
    """The bytes or numbers of a weight in the file."""
    quants = package("gguf.quants")
    qtype = package("gguf").GGMLQuantizationType[kind.upper()]
    return quants.quantize(weight.numpy(), qtype)


def rounded(model: Transformer, wanted: GgufType) -> Transformer:
    """A copy of the model whose weights are what the file can hold of them."""
    gguf, twin = package("gguf"), copy.deepcopy(model)
    with torch.no_grad():
        for weight in twin.parameters():
            kind = type_of(weight, wanted)
            qtype = gguf.GGMLQuantizationType[kind.upper()]
            found = package("gguf.quants").dequantize(stored(weight.detach(), kind), qtype)
            weight.copy_(torch.from_numpy(found))
    return twin


def write_file(loaded: Loaded, file: Path, wanted: GgufType) -> dict[str, int]:
    """Write the GGUF file; returns how many tensors have which type."""
    gguf = package("gguf")
    config = loaded.config
    writer = gguf.GGUFWriter(file, "llama")
    add_shape(writer, config, loaded.path.parent.name)
    writer.add_file_type(
        {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16,
         "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}[wanted]
    )  # fmt: skip
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(writer, loaded)
    counts = add_weights(writer, loaded.model, wanted)
    finish(writer)
    return counts


def add_weights(writer: object, model: Transformer, wanted: GgufType) -> dict[str, int]:
    """All weights under llama.cpp's names; returns how many tensors have which type."""
    types = package("gguf").GGMLQuantizationType
    counts = dict.fromkeys(("f32", "f16", "q8_0"), 0)
    names, weights = gguf_names(model.config), model_weights(model)
    for name, weight in tqdm(weights.items(), desc="store weights", leave=False, disable=None):
        kind = type_of(weight, wanted)
        counts[kind] += 1
        data = stored(in_their_order(name, weight, model.config).contiguous(), kind)
        writer.add_tensor(names[name], data, raw_dtype=types[kind.upper()])
    return {kind: n for kind, n in counts.items() if n}


def finish(writer: object) -> None:
    """Write everything that was added to the file."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_shape(writer: object, config: ModelConfig, name: str) -> None:
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


def add_vocabulary(writer: object, loaded: Loaded) -> None:
    """Pieces with scores and kinds, the special ids, the chat template.

    GGUF numbers the kinds of pieces as SentencePiece does. "llama" means BPE by scores.
    """
    tokenizer = loaded.tokenizer
    proto = read_proto(tokenizer)
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
    writer.add_chat_template(chat_template())


def vocabulary_in(file: Path) -> tuple[sentencepiece.SentencePieceProcessor, str]:
    """A SentencePiece model made of nothing but what the file says, and the chat template."""
    fields = package("gguf").GGUFReader(file).fields
    read = {name: field.contents() for name, field in fields.items() if "tokenizer." in name}
    proto = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(
        *(read[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")),
        strict=True,
    ):
        proto.pieces.add(piece=text, score=score, type=kind)
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id = read["tokenizer.ggml.unknown_token_id"]
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = read["tokenizer.ggml.add_space_prefix"]
    proto.normalizer_spec.remove_extra_whitespaces = False
    model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    return model, read["tokenizer.chat_template"]
