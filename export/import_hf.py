"""Make a checkpoint of ours out of a plain Llama folder of Hugging Face, and prove it.

    python -m export.import_hf out/redgpt-hf --out out/redgpt-again
    python -m export.import_hf ~/models/tiny-llama --out out/tiny --tokenizer tokenizer.model
    python sft.py --base out/tiny --dataset redgpt

The folder needs config.json, safetensors (one file or several) and a SentencePiece model: its own
tokenizer.model or the one named. Weights are kept bit for bit; bfloat16 and float16 become float32,
which holds them exactly. What our model cannot be is refused with every reason: biases, rotary
scaling, another activation, a sliding window, quantised weights, heads that do not divide the
width. Logits and greedy replies are then compared with those of transformers on the same folder.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from babyllama.checkpoint import Loaded, Snapshot, load_model, load_weights, save_checkpoint
from babyllama.config import REPO, from_repo, parse, run, shown
from babyllama.errors import CheckpointError, ConfigError
from export import parity
from export.hf import hf_names, llama_of
from export.tools import TransformersModel
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

_EXACT = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ImportConfig:
    """Source and target of an import.

    Args:
        folder: a Hugging Face folder
        out: run directory to make, for example out/tiny; the checkpoint is its step-000000
        tokenizer: a SentencePiece .model; if absent the folder's tokenizer.model
        kind: pretrain for a base model, sft for one that knows our chat format
        force: replace an earlier import of that name as a whole
        text: UTF-8 file of which prompts are made; if absent built-in news
    """

    folder: Path | None = None
    out: Path | None = None
    tokenizer: Path | None = None
    kind: Literal["pretrain", "sft"] = "pretrain"
    force: bool = False
    text: Path | None = None


def read_config(folder: Path) -> dict:
    """config.json.

    raises: CheckpointError if there is none that can be read
    """
    try:
        if not (folder / "config.json").is_file():  # a pipe would be read for ever
            raise OSError("no such file")
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{shown(folder)}: wanted a Hugging Face folder with a config.json, found {error}"
        ) from None


def reasons_against(config: dict) -> list[str]:
    """What of a config.json our model cannot be, apart from what its sizes are together."""
    rope = rope_of(config)
    plain = {
        "model_type": ("llama",), "hidden_act": ("silu",), "attention_bias": (False,),
        "mlp_bias": (False,), "sliding_window": (), "quantization_config": (),
        "partial_rotary_factor": (1,),
    }  # fmt: skip
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")  # fmt: skip
    numbers = ("num_key_value_heads", "max_position_embeddings", "head_dim", "rope_theta",
               "rms_norm_eps")  # fmt: skip
    odd = [key for key, allowed in plain.items() if config.get(key) not in (None, *allowed)]
    odd += [key for key in sizes if type(config.get(key)) is not int]
    odd += [key for key in numbers if type(config.get(key)) not in (int, float, type(None))]
    if not odd and config["num_hidden_layers"] > 1000:
        odd.append("num_hidden_layers")
    reasons = [f"{key} {config.get(key)!r}" for key in odd]
    is_plain = rope.get("rope_type", rope.get("type", "default")) == "default"
    if not is_plain or rope.get("partial_rotary_factor", 1) != 1:
        reasons.append(f"rotary scaling {rope!r}")
    return reasons if "model_type" in config else ["no model_type", *reasons]


def rope_of(config: dict) -> dict:
    """The settings of the rotary embedding that are no default."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope if isinstance(rope, dict) else {"type": rope}


def shape_of(config: dict, where: Path) -> ModelConfig:
    """Our config of a Llama.

    raises: CheckpointError with everything that our model cannot be
    """
    reasons = reasons_against(config)
    if not reasons:
        dim, n_heads = config["hidden_size"], config["num_attention_heads"]
        shape = ModelConfig(
            dim=dim,
            n_layers=config["num_hidden_layers"],
            n_heads=n_heads,
            n_kv_heads=config.get("num_key_value_heads"),
            vocab_size=config["vocab_size"],
            multiple_of=1,
            max_seq_len=config.get("max_position_embeddings") or 2048,
            rope_theta=float(config.get("rope_theta") or rope_of(config).get("rope_theta", 10000)),
            norm_eps=config.get("rms_norm_eps") or 1e-6,
            tied=bool(config.get("tie_word_embeddings")),
        )
        if (config.get("head_dim") or shape.head_dim) != shape.head_dim:
            reasons.append(f"{n_heads} heads of width {config['head_dim']} for {dim} dimensions")
        rounded = with_width(shape, config["intermediate_size"])
        if rounded is None:
            reasons.append(
                f"intermediate_size {config['intermediate_size']}, less than the "
                f"{shape.hidden_dim} that are two thirds of 4 x {dim}"
            )
    if reasons or rounded is None:
        raise CheckpointError(
            f"{shown(where)}: wanted a plain Llama (no biases, no rotary scaling, silu, no "
            f"sliding window, no quantisation), found {'; '.join(reasons)}; there is no way to "
            f"hold this in our model"
        )
    return rounded if n_heads != rounded.kv_heads else replace(rounded, n_kv_heads=None)


def with_width(shape: ModelConfig, hidden_dim: int) -> ModelConfig | None:
    """The shape whose feed-forward layer has this width, or None if there is none.

    Several roundings may lead there; the largest power of two is taken, as in LLaMA (256).
    """
    for multiple_of in (*(1 << n for n in range(hidden_dim.bit_length(), -1, -1)), hidden_dim):
        found = replace(shape, multiple_of=max(multiple_of, 1))
        if found.hidden_dim == hidden_dim:
            return found
    return None


def read_weights(folder: Path, shape: ModelConfig) -> dict[str, Tensor]:
    """All weights under our names, as float32.

    raises: CheckpointError if a file or name is missing or foreign, or a type is not exact
    """
    ours = {theirs: name for name, theirs in hf_names(shape).items()}
    weights: dict[str, Tensor] = {}
    foreign, whole = [], folder / "model.safetensors"
    parts = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors")) or [whole]
    for file in parity.bar(parts, "read weights"):
        for name, tensor in load_shard(file).items():
            # Older files hold this table, which is computed from rope_theta.
            if name.endswith("rotary_emb.inv_freq"):
                continue
            if name not in ours or tensor.dtype not in _EXACT:
                foreign.append(f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
            else:
                weights[ours[name]] = tensor.float()
    if shape.tied and "output.weight" in weights:
        head = weights.pop("output.weight")
        if not torch.equal(head, weights.get("tok_embeddings.weight", torch.empty(0))):
            foreign.append("a head of its own beside tie_word_embeddings")
    if foreign:
        raise CheckpointError(
            f"{shown(folder)}: wanted the weights of a plain Llama in float32, bfloat16 or "
            f"float16, found besides {', '.join(foreign[:10])}"
            + f" and {len(foreign) - 10} more"
            * (len(foreign) > 10)
        )
    return weights


def load_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file; pickled weights (.bin) are not read."""
    try:
        return load_file(file)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{shown(file)}: wanted safetensors, found {' '.join(str(error).split())}; other "
            f"formats become such a folder with transformers' save_pretrained"
        ) from None


def vocabulary(cfg: ImportConfig, folder: Path, shape: ModelConfig, name: str) -> Tokenizer:
    """The SentencePiece model of the folder, under the name that token files know it by.

    raises: ConfigError if there is none, or its size is not that of the embedding
    """
    path = from_repo(cfg.tokenizer) if cfg.tokenizer else folder / "tokenizer.model"
    if not path.is_file():
        raise ConfigError(
            f"{shown(path)}: wanted a SentencePiece model, found none; name it with --tokenizer "
            f"(a tokenizer.json alone cannot become one)"
        )
    tokenizer = Tokenizer(path)
    if tokenizer.vocab_size != shape.vocab_size:
        raise ConfigError(
            f"{shown(path)} has {tokenizer.vocab_size} tokens, the embedding in {shown(folder)} "
            f"{shape.vocab_size} rows; name the model's own vocabulary with --tokenizer"
        )
    there = sorted((REPO / "data/tokenizers").glob("*.model"))
    known = (one for one in there if one.read_bytes() == tokenizer.bytes)
    tokenizer.path = next(known, path if cfg.tokenizer else Path(f"{name}.model"))
    tokenizer.name = tokenizer.path.stem
    return tokenizer


def prove(folder: Path, model: Transformer, loaded: Loaded, text: Path | None) -> dict:
    """Compare the checkpoint with transformers' model of the weights that were read.

    It is made of the settings that we know; transformers never reads a stranger's config.json,
    which may name kernels to load or ask for any amount of memory.
    """
    material = parity.read_material(text)
    peer = TransformersModel(llama_of(replace(loaded, model=model)), loaded.tokenizer.eos_id)
    return {
        **parity.origin_of(loaded, material, ["transformers"]),
        "source": shown(folder),
        **parity.compare_model(loaded, peer, material),
    }


def main(cfg: ImportConfig) -> None:
    """Read the folder, write a checkpoint, prove it, put its run in its place."""
    if cfg.folder is None:
        raise ConfigError("wanted a Hugging Face folder to import, found none; name it first")
    folder = from_repo(cfg.folder)
    out = parity.check_out(cfg.out, cfg.force, folder)
    shape = shape_of(read_config(folder), folder)
    tokenizer = vocabulary(cfg, folder, shape, out.name)
    weights = read_weights(folder, shape)
    if shape.n_layers > len(weights):  # before memory is taken for them
        raise CheckpointError(
            f"{shown(folder)}: wanted weights of {shape.n_layers} layers, found {len(weights)} "
            f"tensors; config.json and the weights are of different models"
        )
    model = Transformer(shape)
    load_weights(model, weights, folder)
    with parity.new_folder(out, 4 * model.n_parameters()) as place:
        save_checkpoint(Snapshot(place, model, tokenizer, cfg.kind, shown(folder)), 0)
        report = prove(folder, model, load_model(place), cfg.text)
        parity.settle(report, place, out)
    parity.show(report, out)


if __name__ == "__main__":
    run(main, parse(ImportConfig, doc=__doc__, positional=("folder",)))
