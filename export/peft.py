"""Adapters in the layout of peft, both ways.

    python -m export.peft out/csl_lora --out out/csl_lora-peft      ours to theirs
    python -m export.peft out/wiki --from DIR --out out/title       theirs, for the base out/wiki
    python -m export.peft DIR --base out/wiki --out out/csl-peft    the base lies elsewhere now

Theirs is a folder with adapter_config.json and adapter_model.safetensors (peft 0.10 and later),
named as for the LlamaForCausalLM that python -m export.hf makes of the base:
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER). It is a renaming, and
parity.json tells what peft was compared on (logits, greedy replies); if anything differs, nothing
is written and the exit code is 2. The folder knows nothing of the base's weights; theirs becomes an
adapter of exactly the base named.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from babyllama import lora
from babyllama.checkpoint import (
    Loaded,
    attach,
    find_adapter,
    load_adapter,
    load_model,
    model_weights,
    read_adapter,
    read_tensors,
    save_adapter,
)
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.lora import LoraConfig
from babyllama.run_dir import chosen_run
from export.hf import LAYER_NAMES, OUTER_NAMES, hf_names, model_config
from export.parity import (
    ExportConfig,
    Material,
    check_out,
    compare_model,
    new_folder,
    origin_of,
    read_material,
    settle,
    show,
)
from export.tools import PeftFolder, package
from model import Transformer

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")

# The parts of our dotted names in transformers, and back.
HF_PARTS = {"output": OUTER_NAMES["output"]} | {
    part: their_part
    for ours, theirs in LAYER_NAMES.items()
    for part, their_part in zip(ours.split("."), theirs.split("."), strict=True)
}
OUR_PARTS = {theirs: ours for ours, theirs in HF_PARTS.items()}

_PREFIX = "base_model.model."
# Settings of peft that change no result of an adapter that is loaded for use.
_HARMLESS = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "init_lora_weights", "exclude_modules", "megatron_core", "qalora_group_size",
}  # fmt: skip
_VALUES_THAT_CHANGE_NOTHING = (None, False, [], {}, "none")


@dataclass(frozen=True)
class PeftConfig(ExportConfig):
    """What is exported, and where to.

    Args:
        checkpoint: a fine-tuning run or checkpoint that holds an adapter, or a saved adapter; with
            --from the base that the adapter is for; if absent the newest run in out/
        from_: a folder of peft to read
        base: the base of an adapter of ours, if it is no longer where the adapter was trained
    """

    from_: Path | None = None
    base: Path | None = None


def renamed(name: str, parts: dict[str, str]) -> str:
    """A dotted name with the parts that a table knows exchanged."""
    return ".".join(parts.get(part, part) for part in name.split("."))


def write_peft(found: dict, tensors: dict[str, Tensor], place: Path) -> None:
    """Write an adapter into a directory as PeftModel.from_pretrained reads it.

    found: what adapter.yaml says of it
    """
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
    renamed_tensors = {_peft_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed_tensors, place / PEFT_FILES[0], metadata={"format": "pt"})
    (place / PEFT_FILES[1]).write_text(json.dumps(config, indent=1), "utf-8")


def _n_bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def prove(base: Loaded, adapter: Path, place: Path, material: Material) -> dict:
    """Compare the folder, as peft puts it on the base in transformers, with the adapter on ours.

    base: gets the adapter on the way
    """
    names = hf_names(base.config)
    weights = {names[name]: weight for name, weight in model_weights(base.model).items()}
    peer = PeftFolder(place, model_config(base.config, base.tokenizer), weights)
    model = load_adapter(base.model, adapter)
    adapted = Loaded(model, base.tokenizer, base.step, adapter, base.kind)
    return {
        **origin_of(adapted, material, ["transformers", "peft"]),
        **compare_model(adapted, peer, material),
    }


def _peft_name(name: str) -> str:
    """peft's name of one of our tensors: layers.0.attention.wq.a becomes
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    layer, _, part = renamed(name, HF_PARTS).rpartition(".")
    inside = "model." if layer.startswith("layers.") else ""
    return f"{_PREFIX}{inside}{layer}.lora_{part.upper()}.weight"


def _our_name(name: str) -> str | None:
    """Our name of one of peft's tensors, or None if it is no adapter's."""
    layer, is_a, _ = name.partition(".lora_A.weight")
    if not is_a:
        layer, is_b, _ = name.partition(".lora_B.weight")
        if not is_b:
            return None
    layer = layer.removeprefix(_PREFIX).removeprefix("model.")
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
    for key, tensor in read_tensors(path / PEFT_FILES[0]).items():
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
    return attach(model, cfg, tensors, path, name)


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
        unlike = {k: v for k, v in found.items() if k not in _HARMLESS
                  and v not in _VALUES_THAT_CHANGE_NOTHING}  # fmt: skip
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


def to_peft(cfg: PeftConfig, source: Path, out: Path) -> None:
    """Ours to theirs, proven."""
    adapter = find_adapter(source)
    _, found, tensors = read_adapter(adapter)
    package("peft")
    where = from_repo(cfg.base or found["base"] or "")
    if not (cfg.base or (found["base"] and where.is_dir())):
        raise ConfigError(
            f"{shown(adapter)}: wanted its base to compare with peft, found none in "
            f"{found['base']!r}; name it with --base"
        )
    base, material = load_model(where), read_material(cfg.text)
    with new_folder(out, _n_bytes(tensors)) as place:
        write_peft(found, tensors, place)
        report = prove(base, adapter, place, material)
        settle(report, place, out)
    print(f"{shown(out)}: {len(tensors)} tensors for peft")
    show(report, out)


def to_ours(cfg: PeftConfig, source: Path, out: Path) -> None:
    """Theirs to ours, for the base that is named."""
    base = load_model(source)
    model = import_peft(base.model, from_repo(cfg.from_))
    model.lora.base = shown(base.path)
    save_adapter(model, out)
    print(f"{shown(out)}: an adapter for {shown(base.path)}\n{lora.describe(model)}")


def main(cfg: PeftConfig) -> None:
    """Turn one layout into the other."""
    source = chosen_run(cfg.checkpoint)
    out = check_out(cfg.out, cfg.force, source)
    (to_peft if cfg.from_ is None else to_ours)(cfg, source, out)


if __name__ == "__main__":
    run(main, parse(PeftConfig, __doc__, positional=["checkpoint"]))
