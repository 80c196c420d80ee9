"""Write an adapter in the layout of peft, and prove it.

    python -m export.peft out/csl_lora --out out/csl_lora-peft
    python -m export.peft DIR --base out/wiki --out out/csl-peft    the base lies elsewhere now

The folder holds adapter_config.json and adapter_model.safetensors (peft 0.10 and later), named as
for the LlamaForCausalLM that python -m export.hf makes of the base:
PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER). It is a renaming, and
parity.json tells what peft was compared on (logits, greedy replies); if anything differs, nothing
is written and the exit code is 2.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from babyllama.checkpoint import Loaded, find_adapter, load_adapter, load_model, read_adapter
from babyllama.config import from_repo, parse, run, shown
from babyllama.errors import ConfigError
from babyllama.run_dir import chosen_run
from export import parity
from export.hf import LAYER_NAMES, OUTER_NAMES, llama_of
from export.tools import TransformersModel

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")

# The parts of our dotted names in transformers.
HF_PARTS = {"output": OUTER_NAMES["output"]} | {
    part: their_part
    for ours, theirs in LAYER_NAMES.items()
    for part, their_part in zip(ours.split("."), theirs.split("."), strict=True)
}
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftConfig(parity.ExportConfig):
    """Source and target of an export.

    Args:
        checkpoint: a fine-tuning run or checkpoint that holds an adapter, or a saved adapter; if
            absent the newest run in out/
        base: the base of the adapter, if it is no longer where the adapter was trained
    """

    base: Path | None = None


def renamed(name: str) -> str:
    """A dotted name of ours with the parts that transformers calls otherwise exchanged."""
    return ".".join(HF_PARTS.get(part, part) for part in name.split("."))


def write_peft(found: dict, tensors: dict[str, Tensor], place: Path) -> None:
    """Write an adapter into a directory as PeftModel.from_pretrained reads it.

    found: what adapter.yaml says of it
    """
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "base_model_name_or_path": None,  # peft would look for it in a hub
        "r": found["rank"], "lora_alpha": found["alpha"], "lora_dropout": found["dropout"],
        "use_rslora": found["rslora"], "target_modules": list(map(renamed, found["targets"])),
    }  # fmt: skip
    renamed_tensors = {_peft_name(name): tensor for name, tensor in tensors.items()}
    save_file(renamed_tensors, place / PEFT_FILES[0], metadata={"format": "pt"})
    (place / PEFT_FILES[1]).write_text(json.dumps(config, indent=1), "utf-8")


def prove(base: Loaded, adapter: Path, place: Path, material: parity.Material) -> dict:
    """Compare the folder, as peft puts it on the base in transformers, with the adapter on ours.

    base: gets the adapter on the way
    """
    from peft import PeftModel

    twin = PeftModel.from_pretrained(llama_of(base), place)
    peer = TransformersModel(twin, base.tokenizer.eos_id)
    adapted = replace(base, model=load_adapter(base.model, adapter), path=adapter)
    return {
        **parity.origin_of(adapted, material, ["transformers", "peft"]),
        **parity.compare_model(adapted, peer, material),
    }


def _peft_name(name: str) -> str:
    """peft's name of one of our tensors: layers.0.attention.wq.a becomes
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    layer, _, part = renamed(name).rpartition(".")
    inside = "model." if layer.startswith("layers.") else ""
    return f"{_PREFIX}{inside}{layer}.lora_{part.upper()}.weight"


def main(cfg: PeftConfig) -> None:
    """Write the folder, prove it, put it in its place."""
    import peft  # noqa: F401  (if it is missing, that is said before the work)

    source = chosen_run(cfg.checkpoint)
    out = parity.check_out(cfg.out, cfg.force, source)
    adapter = find_adapter(source)
    _, found, tensors = read_adapter(adapter)
    where = from_repo(cfg.base or found["base"] or "")
    if not (cfg.base or (found["base"] and where.is_dir())):
        raise ConfigError(
            f"{shown(adapter)}: wanted its base to compare with peft, found none in "
            f"{found['base']!r}; name it with --base"
        )
    base, material = load_model(where), parity.read_material(cfg.text)
    with parity.new_folder(out, sum(tensor.nbytes for tensor in tensors.values())) as place:
        write_peft(found, tensors, place)
        report = prove(base, adapter, place, material)
        parity.settle(report, place, out)
    print(f"{shown(out)}: {len(tensors)} tensors for peft")
    parity.show(report, out)


if __name__ == "__main__":
    run(main, parse(PeftConfig, __doc__, positional=["checkpoint"]))
