"""Adapters on the disk: saved alone, and put back on the base that they belong to.

    adapter.safetensors   "layers.0.attention.wq.a" (rank, in) and ".b" (out, rank) of each layer
    adapter.yaml          rank, alpha, dropout, targets, rslora; base and its fingerprint
    checksums.json        SHA-256 of the files above, checked on load

A checkpoint of a fine-tuning run holds these in place of model.safetensors; load_model finds the
base by its name and knows it by its fingerprint. The layout of peft: export/peft.py.
"""

from dataclasses import fields
from pathlib import Path

import torch
import yaml
from torch import Tensor

from babyllama import lora
from babyllama.checkpoint import Loaded, load_model
from babyllama.checkpoint_files import (
    INFO_FILES,
    find_checkpoint,
    read_info,
    read_tensors,
    verify,
    write_whole,
)
from babyllama.cli import from_repo, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.lora import ADAPTER_FILES, LoraConfig
from model import Transformer


def save_adapter(model: Transformer, path: Path) -> Path:
    """Write the active adapter alone, whole or not at all.

    raises: CheckpointError if the disk does not take it
    """
    weights = on_cpu(model)
    write_whole(path, lambda place: lora.write(model, weights, place), weights.values())
    return path


def on_cpu(model: Transformer) -> dict[str, Tensor]:
    """Copies of the active adapter's tensors."""
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
    return cfg, found, read_tensors(path / "adapter.safetensors")


def find_adapter(path: Path) -> Path:
    """A directory with an adapter, given itself or a fine-tuning run (its newest step).

    raises: CheckpointError if there is none
    """
    place = path if (path / ADAPTER_FILES[1]).is_file() else find_checkpoint(path)
    if not (place / ADAPTER_FILES[1]).is_file():
        raise CheckpointError(
            f"{shown(place)}: wanted an adapter, found whole weights; name a run of "
            f"`python sft.py` with a lora section"
        )
    return place


def load_adapter(model: Transformer, path: Path, name: str = "default") -> Transformer:
    """The model with a stored adapter more, which is active.

    path: an adapter, or a fine-tuning run or checkpoint that holds one
    raises: CheckpointError if it is damaged, or the model is not the base that it belongs to
    """
    path = find_adapter(path)
    cfg, found, tensors = read_adapter(path)
    lora.require_base(model, found, shown(path))
    return attach(model, cfg, tensors, path, name, found["base"])


def attach(
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
    info, (_, found, _) = read_info(path), read_adapter(path)
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
