"""Checkpoints: what a run leaves behind and what everything else starts from.

Saves a model with its training state, and loads it again: strictly, and only where shape, weights,
tokenizer and state belong together. `load_model` is the only way in. How checkpoints are found and
checked: run_dir.py.

    out/<run>/config.yaml                 the resolved config
              step-000500/model.safetensors       full weights; in their place, where an adapter
                                                  trains, adapter.safetensors and adapter.yaml
                          model.yaml              shape, step, tokenizer name and fingerprint
                          tokenizer.model         a copy
                          train_state.safetensors optimizer and random state, to resume only
                          train_state.json        step, scaler
                          checksums.json          SHA-256 of the files above, checked on load
              best/                 the step of the lowest validation loss, without training state

    adapter.safetensors   "layers.0.attention.wq.a" (rank, in) and ".b" (out, rank) of each layer
    adapter.yaml          rank, alpha, dropout, targets, rslora; name and fingerprint of the base

A released model (export.release) has int8 matrices in model.safetensors and no training state.
Checkpoints are written atomically: under a temporary name, flushed to the disk and renamed. No
pickle is read or written. Format of the weights: safetensors 0.4 and later; the layout of peft:
export/peft.py.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from babyllama import lora
from babyllama.config import atomic_dir, from_repo, read_yaml, recover_dir, remove, shown
from babyllama.distributed import World, gathered, share_of
from babyllama.errors import CheckpointError
from babyllama.lora import ADAPTER_FILES, LoraConfig
from babyllama.optim import n_kept, state_shapes
from babyllama.run_dir import (
    INFO_FILES,
    MODEL_FILES,
    STATE_FILES,
    find_checkpoint,
    list_checkpoints,
    read_info,
    sha256,
    verify,
)
from model import ModelConfig, Transformer
from tokenizer import Tokenizer


@dataclass
class Loaded:
    """A checkpoint, ready to use: the model is on its device and in evaluation mode."""

    model: Transformer
    tokenizer: Tokenizer
    step: int
    path: Path
    kind: str  # "pretrain" or "sft"

    @property
    def config(self) -> ModelConfig:
        return self.model.config


ALONE = World(0, 1, torch.device("cpu"))


@dataclass
class Snapshot:
    """Contents of a checkpoint and its place; trainer.Run is one that trains on.

    directory: of the run
    parent: what it started from
    optimizer: without one there is nothing to resume from
    extra: what else resuming needs, as JSON
    keep: so many of the newest checkpoints stay
    """

    directory: Path
    model: Transformer
    tokenizer: Tokenizer
    kind: str
    parent: str | None = None
    optimizer: torch.optim.Optimizer | None = None
    extra: dict = field(default_factory=dict)
    keep: int = 2
    world: World = ALONE


def save_checkpoint(run: Snapshot, step: int, best: float | None = None) -> Path:
    """Write a checkpoint, whole or not at all, and delete all but the newest `keep`.

    All processes call it; shares of weights and state are put together and the main one writes.

    best: the lowest validation loss; then best/ is written, for use and not to resume from
    raises: CheckpointError if the disk does not take it; earlier checkpoints are untouched
    """
    final, info, state = run.directory / f"step-{step:06d}", info_of(run, step), None
    if best is not None:
        final, info = run.directory / "best", {**info, "val_loss": best}
    elif run.optimizer is not None:
        state = _optimizer_tensors(run, run.optimizer)
    weights = model_weights(run.model, run.world.is_main)

    def fill(place: Path) -> None:
        write_model(place, run, weights, info)
        if state is not None:
            save_file(state, place / "train_state.safetensors")
            text = json.dumps({"step": info["step"], **run.extra})
            (place / "train_state.json").write_text(text, "utf-8")

    def write() -> None:
        write_whole(final, fill, (*weights.values(), *(state or {}).values()))
        for old in list_checkpoints(run.directory)[: -run.keep] if state is not None else ():
            delete(old)

    run.world.on_main(write)
    return final


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Size of the weights and the training state of a checkpoint, all of them float32."""
    return 4 * (sum(w.numel() for w in lora.stored(model).values()) + n_kept(optimizer))


def require_space(run: Snapshot) -> None:
    """Refuse a run whose first checkpoint would not fit on the disk.

    raises: CheckpointError with both sizes
    """
    wanted = checkpoint_bytes(run.model, run.optimizer)
    total, _, free = shutil.disk_usage(run.directory)
    if total and free < wanted:  # some network file systems do not say how large they are
        raise CheckpointError(
            f"{shown(run.directory)}: a checkpoint takes {wanted / 1e6:.1f} MB, "
            f"{free / 1e6:.1f} MB are free on its disk; free some space and start the same "
            f"command again"
        )


def info_of(run: Snapshot, step: int) -> dict:
    return {
        "kind": run.kind,
        "step": step,
        "parent": run.parent,
        "tokenizer": run.tokenizer.name,
        "fingerprint": run.tokenizer.fingerprint,
        "model": asdict(run.model.config),
        **getattr(run.model, "more_info", {}),  # of a model that holds more than a Transformer
    }


def write_model(place: Path, run: Snapshot, weights: dict[str, Tensor], info: dict) -> None:
    if lora.is_adapted(run.model):
        lora.write(run.model, weights, place)
    else:
        save_file(weights, place / "model.safetensors")
    (place / "model.yaml").write_text(yaml.safe_dump(info, sort_keys=False), "utf-8")
    (place / "tokenizer.model").write_bytes(run.tokenizer.bytes)


def model_weights(model: Transformer, keep: bool = True) -> dict[str, Tensor]:
    """The weights as they are stored: whole, a tied head once, of an adapted model the adapter.

    keep: as distributed.gathered
    """
    model.state_dict()  # FSDP2 shards again what the last evaluation gathered
    return gathered(lora.stored(model), keep)


def _optimizer_tensors(run: Snapshot, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name, and torch's random state."""
    state = {
        f"{name}:{key}": tensor
        for name, weight in run.model.named_parameters()
        for key, tensor in optimizer.state.get(weight, {}).items()
    }
    return gathered({"rng": torch.get_rng_state(), **state}, run.world.is_main)


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a checkpoint strictly, in evaluation mode.

    path: a checkpoint, or a run for its newest one
    raises: CheckpointError if it is missing, damaged, or does not fit itself
    """
    path = find_checkpoint(Path(path))
    if (path / lora.ADAPTER_FILES[1]).is_file():
        return load_adapted(path, device, dtype)
    info, tokenizer, weights = read_checkpoint(path)
    if info["kind"] == "vqa":
        raise CheckpointError(
            f"{shown(path)}: wanted a language model, found one that answers about images; use "
            f"python -m vqa.chat {shown(path)} --image FILE"
        )
    wanted, found = info["model"].n_parameters, sum(weight.numel() for weight in weights.values())
    if wanted != found:  # before memory is taken for it; names and shapes are compared below
        raise CheckpointError(
            f"{shown(path)} does not fit the model: wanted {wanted:,} parameters, found {found:,}"
        )
    model = Transformer(info["model"])
    load_weights(model, weights, path)
    return Loaded(model.to(device, dtype).eval(), tokenizer, info["step"], path, info["kind"])


def load_weights(model: Transformer, weights: dict[str, Tensor], where: Path) -> None:
    """Put stored weights into a model.

    raises: CheckpointError with every name and shape that does not fit
    """
    stored = lora.stored(model)
    require_shapes({name: tuple(w.shape) for name, w in stored.items()}, weights, where)
    with torch.no_grad():
        for name, weight in stored.items():
            weight.copy_(share_of(weight, weights[name]))


def require_shapes(
    wanted: dict, tensors: dict[str, Tensor], where: Path | str, advice: str = ""
) -> None:
    """raises: CheckpointError with the names and shapes that do not fit"""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [
        f"{name}: wanted {wanted.get(name)}, found {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if faults:
        some = "; ".join(faults[:10]) + advice
        raise CheckpointError(f"{shown(where)} does not fit the model: {some}")


def load_train_state(path: Path, run: Snapshot) -> dict:
    """Restore weights, optimizer and random state; returns the JSON part, with `step`.

    raises: CheckpointError if the files are damaged or belong to another model or tokenizer
    """
    is_adapted = lora.is_adapted(run.model)
    verify(path, (INFO_FILES if is_adapted else MODEL_FILES) + STATE_FILES)
    info = read_info(path)
    require_tokenizer(path, info, run.tokenizer, shown(run.tokenizer.path))
    if is_adapted:
        _, found, weights = read_adapter(path)
        lora.require_base(run.model, found, shown(path))
    else:
        weights = read_tensors(path / "model.safetensors")
    load_weights(run.model, weights, path)
    tensors = read_tensors(path / "train_state.safetensors")
    try:
        state = json.loads((path / "train_state.json").read_text("utf-8"))
        state = {**state, "step": int(state["step"]), "tokens": int(state["tokens"])}
        state["scaler"] = dict(state["scaler"])
        torch.set_rng_state(tensors.pop("rng"))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{shown(path)}: wanted a training state, found {error!r}") from None
    _put_optimizer_state(run, tensors, path)
    return state


def require_tokenizer(path: Path, info: dict, tokenizer: Tokenizer, there: str) -> None:
    """raises: CheckpointError if a checkpoint belongs to another tokenizer than stands there"""
    if info["fingerprint"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{shown(path)} was trained with another tokenizer ({info['tokenizer']}, "
            f"{info['fingerprint'][:12]}…) than that of {there} now "
            f"({tokenizer.fingerprint[:12]}…); put back what was there, or take another --name"
        )


def _put_optimizer_state(run: Snapshot, tensors: dict[str, Tensor], where: Path) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(":")
        kept.setdefault(name, {})[part] = tensor
    trained = {name: w for name, w in run.model.named_parameters() if w.requires_grad}
    assert run.optimizer is not None  # what is resumed trains
    shapes = state_shapes(run.optimizer)
    wanted = {name: shapes[weight] for name, weight in trained.items()}
    found = {name: {part: t.shape for part, t in state.items()} for name, state in kept.items()}
    # There is no state yet where no step had numbers that are finite.
    if found and found != wanted:
        raise CheckpointError(f"{shown(where)}: its optimizer state belongs to another model")
    for name, state in kept.items():
        weight = trained[name]
        run.optimizer.state[weight] = {
            part: share_of(weight, t) if t.dim() else t.to(weight.device)
            for part, t in state.items()
        }


def write_whole(final: Path, fill: Callable[[Path], None], tensors: Iterable[Tensor]) -> None:
    """Fill a directory under another name, add checksums, flush it to the disk and rename it.

    tensors: what `fill` will write, all but small files: says what was wanted where it fails
    raises: CheckpointError with path, bytes wanted, written and free, and the last good checkpoint
    """
    tidy(final.parent)
    wanted, written = sum(tensor.nbytes for tensor in tensors), 0
    try:
        with atomic_dir(final) as place:
            try:
                fill(place)
                write_sums(place)
            finally:
                written = sum(path.stat().st_size for path in place.glob("*"))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(_cannot_save(final, wanted, written, error)) from None


def tidy(run: Path) -> None:
    """Delete what saves that were killed have left."""
    for old in run.glob("old-*"):
        recover_dir(old.with_name(old.name[4:]))
    for left_over in run.glob("tmp-*"):
        remove(left_over)


def write_sums(place: Path) -> None:
    sums = {path.name: sha256(path) for path in sorted(place.iterdir())}
    (place / "checksums.json").write_text(json.dumps(sums, indent=1), "utf-8")


def delete(path: Path) -> None:
    """Delete a checkpoint; killed on the way, this leaves nothing that looks like one."""
    remove(path.rename(path.with_name(f"tmp-old-{path.name}")))


def _cannot_save(final: Path, wanted: int, written: int, error: Exception) -> str:
    run = final.parent
    there = next(place for place in (run, *run.parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e6
    older = list_checkpoints(run)
    last = f"{older[-1].name} is intact" if older else "no earlier checkpoint exists"
    return (
        f"could not save {shown(final)}: {error}; it takes {wanted / 1e6:.1f} MB, "
        f"{written / 1e6:.1f} MB were written, {free:.1f} MB are free now; {last}; free some space "
        f"and start the same command again"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{shown(path)}: wanted safetensors, found {error}") from None


def read_checkpoint(path: Path) -> tuple[dict, Tokenizer, dict[str, Tensor]]:
    """Contents of model.yaml, with the shape as a ModelConfig; the tokenizer; the full weights.

    path: a checkpoint
    raises: CheckpointError if it is missing, damaged, or its parts are of different ones
    """
    verify(path, MODEL_FILES)
    info = read_info(path)
    tokenizer = Tokenizer(path / "tokenizer.model")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (
        info["fingerprint"],
        info["model"].vocab_size,
    ):
        raise CheckpointError(
            f"{shown(path)}: its tokenizer.model (vocabulary size {tokenizer.vocab_size}, "
            f"{tokenizer.fingerprint[:12]}…) is not the one it was trained with "
            f"(vocabulary size {info['model'].vocab_size}, {info['fingerprint'][:12]}…)"
        )
    return info, tokenizer, widen(read_tensors(path / "model.safetensors"), shown(path))


# In a file, what stands behind the name of an int8 matrix in the name of its scales.
SCALES = ".scales"


def widen(weights: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights of a small file (export/release.py), in float32; others as they are.

    int8.quantise gives the same int8 values again, so both ways to run such a file are one model.

    raises: CheckpointError if the scales of a matrix are missing or not one an output
    """
    held = {name for name, weight in weights.items() if weight.dtype == torch.int8}
    found = {}
    for name in weights.keys() - {name + SCALES for name in held}:
        weight, scales = weights[name], weights.get(name + SCALES)
        if name not in held:
            found[name] = weight
        elif scales is None or weight.dim() != 2 or scales.shape != weight.shape[:1]:
            raise CheckpointError(
                f"{where}: wanted {name}{SCALES} with a number for each row of "
                f"{tuple(weight.shape)}, found {None if scales is None else tuple(scales.shape)}; "
                f"the file is no int8 checkpoint of ours, get it again"
            )
        else:
            found[name] = weight.float() * scales.float()[:, None]
    return found


def read_adapter(path: Path) -> tuple[LoraConfig, dict, dict[str, Tensor]]:
    """A stored adapter: its config, all that adapter.yaml says, and its tensors.

    raises: CheckpointError if it is missing, damaged or altered
    """
    verify(path, ADAPTER_FILES)
    try:
        found = read_yaml(path / "adapter.yaml")
        values = {f.name: found[f.name] for f in fields(LoraConfig)}
        cfg = LoraConfig(**values | {"targets": tuple(values["targets"])})
        if not isinstance(found["fingerprint"], str) or not isinstance(found["base"], str | None):
            raise TypeError(f"fingerprint {found['fingerprint']!r}, base {found['base']!r}")
    except (ValueError, KeyError, TypeError) as error:
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
    require_shapes(lora.shapes(model, cfg), tensors, path)  # before the model is touched
    lora.apply_lora(model, cfg, name, found["base"])
    load_weights(model, tensors, path)
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
    require_tokenizer(path, info, base.tokenizer, found["base"])
    model = lora.bake(load_adapter(base.model, path)).to(device, dtype).eval()
    return Loaded(model, base.tokenizer, info["step"], path, info["kind"])
