"""Checkpoints: what a run leaves behind and what everything else starts from.

Saves a model with its training state, and loads it again: strictly, and only where shape, weights,
tokenizer and state belong together. `load_model` is the only way in. The files themselves, how
they are written, found and checked: checkpoint_files.py.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from babyllama import int8, lora
from babyllama.checkpoint_files import (
    INFO_FILES,
    MODEL_FILES,
    STATE_FILES,
    delete,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_info,
    read_tensors,
    verify,
    write_sums,
    write_whole,
)
from babyllama.cli import shown
from babyllama.errors import CheckpointError
from babyllama.optim import n_kept, state_shapes
from babyllama.parallel import World, share_of, whole
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


def save_checkpoint(
    run: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    extra: dict,
    kind: str,
    parent: str | None = None,
    keep: int = 2,
    world: World = ALONE,
) -> Path:
    """Write a checkpoint, whole or not at all, and delete all but the newest `keep`.

    All processes call it; shares of weights and state are put together and the main one writes.

    extra: what else resuming needs, as JSON
    raises: CheckpointError if the disk does not take it; earlier checkpoints are untouched
    """
    final = run / f"step-{step:06d}"
    info = _info(step, model, tokenizer, kind, parent)
    weights, state = model_weights(model), _optimizer_tensors(model, optimizer)

    def fill(place: Path) -> None:
        _write_model(place, model, weights, info, tokenizer)
        save_file(state, place / "train_state.safetensors")
        (place / "train_state.json").write_text(json.dumps({"step": step, **extra}), "utf-8")

    def write() -> None:
        write_whole(final, fill, (*weights.values(), *state.values()))
        for old in list_checkpoints(run)[:-keep]:
            delete(old)

    world.on_main(write)
    return final


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What the weights and the training state of a checkpoint take, all of them float32."""
    return 4 * (sum(w.numel() for w in lora.stored(model).values()) + n_kept(optimizer))


def require_space(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse a run whose first checkpoint would not fit on the disk.

    raises: CheckpointError with both sizes
    """
    wanted = checkpoint_bytes(model, optimizer)
    free = shutil.disk_usage(run).free
    if free < wanted:
        raise CheckpointError(
            f"{shown(run)}: a checkpoint takes {wanted / 1e6:.1f} MB, {free / 1e6:.1f} MB are free "
            f"on its disk; free some space and start the same command again"
        )


def save_best(
    run: Path,
    step: int,
    model: Transformer,
    tokenizer: Tokenizer,
    val_loss: float,
    kind: str,
    parent: str | None = None,
    world: World = ALONE,
) -> Path:
    """Write `run`/best, for use and not to resume from; arguments and errors as save_checkpoint."""
    info = {**_info(step, model, tokenizer, kind, parent), "val_loss": val_loss}
    weights = model_weights(model)
    world.on_main(
        lambda: write_whole(
            run / "best",
            lambda place: _write_model(place, model, weights, info, tokenizer),
            weights.values(),
        )
    )
    return run / "best"


def _info(
    step: int, model: Transformer, tokenizer: Tokenizer, kind: str, parent: str | None
) -> dict:
    return {
        "kind": kind,
        "step": step,
        "parent": parent,
        "tokenizer": tokenizer.path.stem,
        "fingerprint": tokenizer.fingerprint,
        "model": asdict(model.config),
        **getattr(model, "more_info", {}),  # of a model that holds more than a Transformer
    }


def _write_model(
    place: Path, model: Transformer, weights: dict, info: dict, tokenizer: Tokenizer
) -> None:
    if lora.is_adapted(model):
        lora.write(model, weights, place)
    else:
        save_file(weights, place / "model.safetensors")
    (place / "model.yaml").write_text(yaml.safe_dump(info, sort_keys=False), "utf-8")
    (place / "tokenizer.model").write_bytes(tokenizer.bytes)


def write_int8(place: Path, loaded: Loaded) -> None:
    """Fill an empty directory with a checkpoint for use, whose matrices are int8."""
    parent = shown(loaded.path)
    info = _info(loaded.step, loaded.model, loaded.tokenizer, loaded.kind, parent)
    weights = int8.narrow(model_weights(loaded.model))
    _write_model(place, loaded.model, weights, info | {"weights": "int8"}, loaded.tokenizer)
    write_sums(place)


def model_weights(model: Transformer) -> dict[str, Tensor]:
    """The weights as they are stored: whole, a tied head once, of an adapted model the adapter."""
    model.state_dict()  # FSDP2 shards again what the last evaluation gathered
    return {name: whole(w.detach()).contiguous() for name, w in lora.stored(model).items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name, and torch's random state."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors = {"rng": torch.get_rng_state()}
    for weight, state in optimizer.state.items():
        for key, tensor in state.items():
            tensors[f"{names[id(weight)]}:{key}"] = whole(tensor).contiguous()
    return tensors


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Loaded:
    """Load a checkpoint strictly, in evaluation mode.

    path: a checkpoint, or a run for its newest one
    raises: CheckpointError if it is missing, damaged, or does not fit itself
    """
    path = find_checkpoint(Path(path))
    if (path / lora.ADAPTER_FILES[1]).is_file():
        from babyllama.lora_files import load_adapted  # which loads the base with this function

        return load_adapted(path, device, dtype)
    info, tokenizer, weights = read_checkpoint(path)
    if info["kind"] == "vqa":
        raise CheckpointError(
            f"{shown(path)}: wanted a language model, found one that answers about pictures; use "
            f"python -m vqa.chat {shown(path)} --image FILE"
        )
    _require_fit(info["model"], weights, path)
    model = Transformer(info["model"])
    load_weights(model, weights, path)
    return Loaded(model.to(device, dtype).eval(), tokenizer, info["step"], path, info["kind"])


def load_answering(path: Path, device: torch.device | str = "cpu") -> Loaded:
    """load_model, and refuse what was never taught to answer.

    raises: CheckpointError as load_model, or for a base
    """
    loaded = load_model(path, device)
    if loaded.kind == "pretrain":
        raise CheckpointError(
            f"{shown(loaded.path)}: wanted a checkpoint that answers, found a base; fine-tune it "
            f"first with python sft.py"
        )
    return loaded


def _require_fit(config: ModelConfig, weights: dict[str, Tensor], where: Path) -> None:
    """Compare a shape with stored weights before memory is taken for it.

    raises: CheckpointError as load_weights
    """
    if config.n_layers > len(weights):
        raise CheckpointError(
            f"{shown(where)} does not fit the model: wanted {config.n_layers} layers, found "
            f"{len(weights)} tensors"
        )
    if config.n_parameters == sum(tensor.numel() for tensor in weights.values()):
        return  # it takes what the weights take; load_weights compares names and shapes
    try:
        with torch.device("meta"):  # to name the faults; loads torch's compiler, 1.4 s
            model = Transformer(config)
    except RuntimeError as error:
        raise CheckpointError(f"{shown(where)}: no model has this shape, {error}") from None
    _require_shapes(model, weights, where)


def load_weights(model: Transformer, weights: dict[str, Tensor], where: Path) -> None:
    """Put stored weights into a model.

    raises: CheckpointError with every name and shape that does not fit
    """
    _require_shapes(model, weights, where)
    with torch.no_grad():
        for name, weight in lora.stored(model).items():
            weight.copy_(share_of(weight, weights[name]))


def _require_shapes(model: Transformer, weights: dict[str, Tensor], where: Path) -> None:
    wanted = {name: tuple(weight.shape) for name, weight in lora.stored(model).items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    faults = [
        f"{name}: wanted {wanted.get(name)}, found {found.get(name)}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if faults:
        raise CheckpointError(f"{shown(where)} does not fit the model: " + "; ".join(faults[:10]))


def load_train_state(
    path: Path, model: Transformer, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer
) -> dict:
    """Restore weights, optimizer and random state; returns the JSON part, with `step`.

    raises: CheckpointError if the files are damaged or belong to another model or tokenizer
    """
    is_adapted = lora.is_adapted(model)
    verify(path, (INFO_FILES if is_adapted else MODEL_FILES) + STATE_FILES)
    info = read_info(path)
    if info["fingerprint"] != tokenizer.fingerprint:
        raise CheckpointError(
            f"{shown(path)} was trained with another tokenizer ({info['tokenizer']}, "
            f"{info['fingerprint'][:12]}…) than {shown(tokenizer.path)} is now "
            f"({tokenizer.fingerprint[:12]}…); set the file back or take another --name"
        )
    if is_adapted:
        from babyllama.lora_files import read_adapter  # which reads with this file's functions

        _, found, weights = read_adapter(path)
        lora.require_base(model, found, shown(path))
    else:
        weights = read_tensors(path / "model.safetensors")
    load_weights(model, weights, path)
    tensors = read_tensors(path / "train_state.safetensors")
    try:
        state = json.loads((path / "train_state.json").read_text("utf-8"))
        state = {**state, "step": int(state["step"]), "tokens": int(state["tokens"])}
        torch.set_rng_state(tensors.pop("rng"))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{shown(path)}: wanted a training state, found {error!r}") from None
    _put_optimizer_state(model, optimizer, tensors, path)
    return state


def _put_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], where: Path
) -> None:
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(":")
        kept.setdefault(name, {})[field] = tensor
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    shapes = state_shapes(optimizer)
    wanted = {name: shapes[weight] for name, weight in trained.items()}
    found = {name: {field: t.shape for field, t in state.items()} for name, state in kept.items()}
    # There is no state yet where no step had numbers that are finite.
    if found and found != wanted:
        raise CheckpointError(f"{shown(where)}: its optimizer state belongs to another model")
    for name, state in kept.items():
        weight = trained[name]
        optimizer.state[weight] = {
            field: share_of(weight, t) if t.dim() else t.to(weight.device)
            for field, t in state.items()
        }
