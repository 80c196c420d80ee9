"""Adapters on the disk: ours, beside which the base is found again, and the layout of peft.

    adapter.safetensors   "layers.0.attention.wq.a" (rank, in) and ".b" (out, rank) of each layer
    adapter.yaml          rank, alpha, dropout, targets, rslora; base and its fingerprint
    checksums.json        SHA-256 of the files above, checked on load

A checkpoint of a fine-tuning run holds these in place of model.safetensors. peft's layout is
adapter_config.json with adapter_model.safetensors, named as for LlamaForCausalLM in transformers
(peft 0.10 and later): a renaming, since model.py pairs rotary halves as transformers does. It
knows nothing of the base's weights, so only shapes are compared there.
"""

import json
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from babyllama import lora
from babyllama.checkpoint import (
    Loaded,
    _read_info,
    _read_tensors,
    _write_whole,
    find_checkpoint,
    load_model,
    verify,
)
from babyllama.cli import from_repo, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.lora import ADAPTER_FILES, LoraConfig
from model import Transformer

INFO_FILES = ("model.yaml", "tokenizer.model")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")

# The parts of our parameter names in transformers.
HF_PARTS = {
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "feed_forward": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    "output": "lm_head",
}  # fmt: skip
OUR_PARTS = {theirs: ours for ours, theirs in HF_PARTS.items()}

_PEFT_PREFIX = "base_model.model."
# Settings of peft that change no result of an adapter that is loaded for use.
_PEFT_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "init_lora_weights", "exclude_modules", "megatron_core", "qalora_group_size",
}  # fmt: skip
_PEFT_VALUES_THAT_CHANGE_NOTHING = (None, False, [], {}, "none")


def save_adapter(model: Transformer, path: Path) -> Path:
    """Write the active adapter alone, whole or not at all.

    raises: CheckpointError if the disk does not take it
    """
    _write_whole(path, lambda place: lora.write(model, _on_cpu(model), place))
    return path


def _on_cpu(model: Transformer) -> dict[str, Tensor]:
    weights = lora.stored(model).items()
    return {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights}


def read_adapter(path: Path) -> tuple[LoraConfig, dict, dict[str, Tensor]]:
    """A stored adapter: its config, all that adapter.yaml says, and its tensors.

    raises: CheckpointError if it is missing, damaged or altered
    """
    verify(path, ADAPTER_FILES)
    try:
        found = yaml.safe_load((path / "adapter.yaml").read_text("utf-8"))
        values = {f.name: found[f.name] for f in fields(LoraConfig)}
        cfg = LoraConfig(**values | {"targets": tuple(values["targets"])})
        if not isinstance(found["fingerprint"], str) or not isinstance(found["base"], str | None):
            raise TypeError(f"fingerprint {found['fingerprint']!r}, base {found['base']!r}")
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(
            f"{shown(path)}: wanted the adapter.yaml of an adapter, found {reason}"
        ) from None
    return cfg, found, _read_tensors(path / "adapter.safetensors")


def load_adapter(model: Transformer, path: Path, name: str = "default") -> Transformer:
    """The model with a stored adapter more, which is active.

    path: an adapter, or a fine-tuning run or checkpoint that holds one
    raises: CheckpointError if it is damaged, or the model is not the base that it belongs to
    """
    path = path if (path / "adapter.yaml").is_file() else find_checkpoint(path)
    cfg, found, tensors = read_adapter(path)
    lora.require_base(model, found, shown(path))
    return _attach(model, cfg, tensors, path, name, found["base"])


def _attach(
    model: Transformer,
    cfg: LoraConfig,
    tensors: dict[str, Tensor],
    where: Path,
    name: str,
    base: str | None = None,
) -> Transformer:
    """Put on an adapter with these values; a misfit is found before the model is touched."""
    wanted = lora.shapes(model, cfg)
    got = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    faults = [
        f"{key}: wanted {wanted.get(key)}, found {got.get(key)}"
        for key in sorted(wanted.keys() | got.keys())
        if wanted.get(key) != got.get(key)
    ]
    if faults:
        raise CheckpointError(f"{shown(where)} does not fit the model: {'; '.join(faults[:10])}")
    lora.apply_lora(model, cfg, name, base)
    with torch.no_grad():
        for key, weight in lora.stored(model).items():
            weight.copy_(tensors[key])
    return model


def load_adapted(path: Path, device: torch.device | str, dtype: torch.dtype) -> Loaded:
    """A checkpoint that holds an adapter, as load_model gives it: its base with the adapter in
    its weights, a plain model.

    raises: CheckpointError if checkpoint or base is missing or damaged or they do not belong
        together
    """
    verify(path, (*ADAPTER_FILES, *INFO_FILES))
    info, (_, found, _) = _read_info(path), read_adapter(path)
    where = from_repo(found["base"] or "")
    if not found["base"] or not where.is_dir():
        raise CheckpointError(
            f"{shown(path)} holds an adapter alone, and its base {found['base']!r} (weights "
            f"{found['fingerprint'][:12]}…) is not there; put the base back in that place"
        )
    base = load_model(where)
    if info["fingerprint"] != base.tokenizer.fingerprint:
        raise CheckpointError(
            f"{shown(path)} was trained with another tokenizer ({info['tokenizer']}, "
            f"{info['fingerprint'][:12]}…) than its base {found['base']} "
            f"({base.tokenizer.fingerprint[:12]}…); put the base back in that place"
        )
    model = lora.bake(load_adapter(base.model, path)).to(device, dtype).eval()
    return Loaded(model, base.tokenizer, info["step"], path, info["kind"])


def renamed(name: str, parts: dict[str, str]) -> str:
    """A dotted name with the parts that a table knows exchanged."""
    return ".".join(parts.get(part, part) for part in name.split("."))


def export_peft(model: Transformer, path: Path) -> Path:
    """Write the active adapter as peft's PeftModel.from_pretrained reads it.

    raises: CheckpointError if the disk does not take it
    """
    found = lora.settings(model)
    tensors = {_peft_name(name): weight for name, weight in _on_cpu(model).items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # peft would look for it in a hub
        "r": found["rank"],
        "lora_alpha": found["alpha"],
        "lora_dropout": found["dropout"],
        "use_rslora": found["rslora"],
        "target_modules": [renamed(target, HF_PARTS) for target in found["targets"]],
        "bias": "none",
        "inference_mode": True,
    }

    def fill(place: Path) -> None:
        save_file(tensors, place / PEFT_FILES[0], metadata={"format": "pt"})
        (place / PEFT_FILES[1]).write_text(json.dumps(config, indent=1), "utf-8")

    _write_whole(path, fill)
    return path


def _peft_name(name: str) -> str:
    """peft's name of one of our tensors: layers.0.attention.wq.a becomes
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    layer, _, part = renamed(name, HF_PARTS).rpartition(".")
    inside = "model." if layer.startswith("layers.") else ""
    return f"{_PEFT_PREFIX}{inside}{layer}.lora_{part.upper()}.weight"


def _our_name(name: str) -> str | None:
    """Our name of one of peft's tensors, or None if it is no adapter's."""
    layer, is_a, _ = name.partition(".lora_A.weight")
    if not is_a:
        layer, is_b, _ = name.partition(".lora_B.weight")
        if not is_b:
            return None
    layer = layer.removeprefix(_PEFT_PREFIX).removeprefix("model.")
    return f"{renamed(layer, OUR_PARTS)}.{'a' if is_a else 'b'}"


def import_peft(model: Transformer, path: Path, name: str = "default") -> Transformer:
    """The model with an adapter that peft has saved, which is active.

    raises: CheckpointError if files are missing or damaged, if it is no plain LoRA, or if it fits
        no layer of the model
    """
    missing = [file for file in PEFT_FILES if not (path / file).is_file()]
    if missing:
        raise CheckpointError(f"{shown(path)}: wanted an adapter of peft, it lacks {missing}")
    cfg = _peft_config(path / PEFT_FILES[1])
    tensors, others = {}, []
    for key, tensor in _read_tensors(path / PEFT_FILES[0]).items():
        ours = _our_name(key)
        if ours is not None:
            tensors[ours] = tensor
        elif not _is_copy(model, key, tensor):
            others.append(key)
    if others:
        raise CheckpointError(
            f"{shown(path)}: wanted adapters alone, found also {', '.join(others[:5])}; merge them "
            f"with peft first"
        )
    return _attach(model, cfg, tensors, path, name)


def _is_copy(model: Transformer, key: str, tensor: Tensor) -> bool:
    """Whether a tensor is the base's own: peft adds both tables where the head has an adapter."""
    ours = {"lm_head": model.output.weight, "embed_tokens": model.tok_embeddings.weight}
    weight = next((w for part, w in ours.items() if f".{part}." in key), None)
    return weight is not None and torch.equal(weight.detach().to("cpu", tensor.dtype), tensor)


def _peft_config(path: Path) -> LoraConfig:
    """peft's settings as ours; its dropout, which works in peft's own training alone, is left.

    raises: CheckpointError naming what is no plain LoRA
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        kind, targets, start = (
            found["peft_type"], found["target_modules"], found.get("init_lora_weights", True),
        )  # fmt: skip
        unlike = {k: v for k, v in found.items() if k not in _PEFT_HARMLESS
                  and v not in _PEFT_VALUES_THAT_CHANGE_NOTHING}  # fmt: skip
        if kind != "LORA" or not isinstance(targets, list):
            unlike |= {"peft_type": kind, "target_modules": targets}
        # Such a start has changed the base's weights, which are not in these files.
        if start not in (True, False, "gaussian", "orthogonal", "eva"):
            unlike["init_lora_weights"] = start
        if unlike:
            raise CheckpointError(
                f"{shown(path)}: wanted a plain LoRA of named layers, found {unlike}; merge it "
                f"with peft and export the whole model"
            )
        return LoraConfig(
            rank=found["r"],
            alpha=found["lora_alpha"],
            targets=tuple(renamed(target, OUR_PARTS) for target in sorted(targets)),
            rslora=found.get("use_rslora", False),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{shown(path)}: wanted peft's settings, found {error!r}") from None
