"""Checkpoints: what a run leaves behind and what everything else starts from.

    out/<run>/config.yaml                 the resolved config
              step-000500/model.safetensors       full weights
                          model.yaml              shape, step, tokenizer name and fingerprint
                          tokenizer.model         a copy
                          train_state.safetensors optimizer and random state, to resume only
                          train_state.json        step, scaler
                          checksums.json          SHA-256 of the files above, checked on load
              best/                 the step of the lowest validation loss, without training state

A released model (export.release) has int8 matrices in model.safetensors and no training state.
A run that trains an adapter stores it alone, adapter.safetensors and adapter.yaml in place of
model.safetensors (lora_files.py).

A checkpoint is complete or absent: it is written under a temporary name, flushed to the disk and
renamed. No pickle is read or written. `load_model` is the only way in. Format of the weights:
safetensors 0.4 and later.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from babyllama import int8, lora
from babyllama.cli import REPO, shown
from babyllama.errors import CheckpointError, ConfigError
from babyllama.optim import n_kept, state_shapes
from babyllama.parallel import World, share_of, whole
from model import ModelConfig, Transformer
from tokenizer import Tokenizer

INFO_FILES = ("model.yaml", "tokenizer.model")
MODEL_FILES = ("model.safetensors", *INFO_FILES)
STATE_FILES = ("train_state.safetensors", "train_state.json")

# A longer context than this is a mistake or malice: its rotary table would take the memory.
_LONGEST = 2**20


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
        _write_whole(final, fill)
        for old in list_checkpoints(run)[:-keep]:
            _delete(old)

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
        lambda: _write_whole(
            run / "best", lambda place: _write_model(place, model, weights, info, tokenizer)
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


def _write_whole(final: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory under another name, add checksums, flush it to the disk and rename it."""
    run, temporary = final.parent, final.with_name(f"tmp-{final.name}")
    for left_over in (*run.glob("tmp-*step-*"), *run.glob("tmp-*best")):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        _write_sums(temporary)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if final.exists():
            _delete(final)
        os.replace(temporary, final)
        _flush(run)
    except (OSError, SafetensorError) as error:
        wanted = sum(path.stat().st_size for path in temporary.glob("*"))
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_cannot_save(final, wanted, error)) from None


def _write_sums(place: Path) -> None:
    sums = {path.name: _sha256(path) for path in sorted(place.iterdir())}
    (place / "checksums.json").write_text(json.dumps(sums, indent=1), "utf-8")


def write_int8(place: Path, loaded: Loaded) -> None:
    """Fill an empty directory with a checkpoint for use, whose matrices are int8."""
    parent = shown(loaded.path)
    info = _info(loaded.step, loaded.model, loaded.tokenizer, loaded.kind, parent)
    weights = int8.narrow(model_weights(loaded.model))
    _write_model(place, loaded.model, weights, info | {"weights": "int8"}, loaded.tokenizer)
    _write_sums(place)


def _delete(path: Path) -> None:
    """Delete a checkpoint; killed on the way, this leaves nothing that looks like one."""
    doomed = path.with_name(f"tmp-old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _cannot_save(final: Path, written: int, error: Exception) -> str:
    run = final.parent
    there = next(place for place in (run, *run.parents) if place.exists())
    free = shutil.disk_usage(there).free / 1e6
    older = list_checkpoints(run)
    last = f"{older[-1].name} is intact" if older else "no earlier checkpoint exists"
    return (
        f"could not save {shown(final)}: {error}; of what it takes {written / 1e6:.1f} MB were "
        f"written, {free:.1f} MB are free; {last}; free some space and start the same command again"
    )


def _flush(path: Path) -> None:
    """Make sure that a file or a directory has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a directory to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [
        path
        for path in run.glob("step-*")
        if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name[5:]))


def newest_run(out: Path | None = None, kind: str | None = None) -> Path | None:
    """The run whose newest checkpoint is the youngest, or None.

    kind: only runs of this kind, "pretrain" or "sft"
    """
    newest = {}
    for run in (out or REPO / "out").glob("*"):
        steps = list_checkpoints(run)
        if steps and (kind is None or _read_info(steps[-1])["kind"] == kind):
            newest[steps[-1].stat().st_mtime] = run
    return newest[max(newest)] if newest else None


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's directory, given itself or its run (whose newest step is taken).

    raises: CheckpointError if there is none
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{shown(path)}: no such checkpoint; wanted a run (out/<name>) or one of its steps"
        )
    if (path / "model.yaml").is_file():
        return path
    steps = list_checkpoints(path)
    if not steps:
        raise CheckpointError(f"{shown(path)}: no complete checkpoint in this directory")
    return steps[-1]


def verify(path: Path, names: tuple[str, ...]) -> None:
    """Compare files of a checkpoint with their checksums.

    raises: CheckpointError that names the file, and an older checkpoint where there is one
    """
    # is_file() also keeps pipes and devices out, which might be read for ever.
    missing = [name for name in ("checksums.json", *names) if not (path / name).is_file()]
    if missing:
        fault = f"lacks {', '.join(missing)}"
    else:
        try:
            sums = json.loads((path / "checksums.json").read_text("utf-8"))
            bad = [name for name in names if _sha256(path / name) != sums[name]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            bad = [f"checksums.json ({error})"]
        if not bad:
            return
        fault = f"fails its checksum in {', '.join(bad)}"
    steps = list_checkpoints(path.parent)
    older = steps[: steps.index(path)] if path in steps else []
    advice = f"use {shown(older[-1])}" if older else "there is no older one in this run"
    raise CheckpointError(f"{shown(path)} {fault}: it was cut or altered; delete it; {advice}")


def _read_info(path: Path) -> dict:
    """model.yaml with the shape as a ModelConfig.

    raises: CheckpointError if a key is missing, unknown, or of a wrong type
    """
    try:
        info = yaml.safe_load((path / "model.yaml").read_text("utf-8"))
        config = ModelConfig(**info["model"])
        typed = [(key, info[key], str) for key in ("kind", "tokenizer", "fingerprint")]
        typed += [("step", info["step"], int)]
        typed += [
            (f"model.{field.name}", getattr(config, field.name), field.type)
            for field in fields(config)
        ]
    except (
        OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, RecursionError,
        ConfigError,
    ) as error:  # fmt: skip
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(
            f"{shown(path)}: wanted the model.yaml of a babyllama checkpoint, found {reason}"
        ) from None
    wrong = [
        f"{name} {value!r}"
        for name, value, kind in typed
        if not isinstance(value, (int | float) if kind is float else kind)
    ]
    if wrong or config.max_seq_len > _LONGEST:
        found = ", ".join(wrong) or f"model.max_seq_len {config.max_seq_len}"
        raise CheckpointError(f"{shown(path)}: model.yaml cannot be, found {found}")
    return {**info, "model": config}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{shown(path)}: wanted safetensors, found {error}") from None


def kind_of(path: Path) -> str:
    """What made a checkpoint, or a run's newest one: pretrain, sft, vqa …; errors as load_model."""
    return _read_info(find_checkpoint(Path(path)))["kind"]


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


def read_checkpoint(path: Path) -> tuple[dict, Tokenizer, dict[str, Tensor]]:
    """What model.yaml says, with the shape as a ModelConfig; the tokenizer; the full weights.

    path: a checkpoint
    raises: CheckpointError if it is missing, damaged, or its parts are of different ones
    """
    verify(path, MODEL_FILES)
    info = _read_info(path)
    tokenizer = Tokenizer(path / "tokenizer.model")
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (
        info["fingerprint"],
        info["model"].vocab_size,
    ):
        raise CheckpointError(
            f"{shown(path)}: its tokenizer.model ({tokenizer.vocab_size} pieces, "
            f"{tokenizer.fingerprint[:12]}…) is not the one it was trained with "
            f"({info['model'].vocab_size} pieces, {info['fingerprint'][:12]}…)"
        )
    # The copy keeps the name of the original, by which token files are found.
    tokenizer.path = Path("data/tokenizers") / f"{info['tokenizer']}.model"
    return info, tokenizer, int8.widen(_read_tensors(path / "model.safetensors"), shown(path))


def _require_fit(config: ModelConfig, weights: dict[str, Tensor], where: Path) -> None:
    """Compare a shape with stored weights before memory is taken for it.

    raises: CheckpointError as load_weights
    """
    if config.n_layers > len(weights):
        raise CheckpointError(
            f"{shown(where)} does not fit the model: wanted {config.n_layers} layers, found "
            f"{len(weights)} tensors"
        )
    try:
        with torch.device("meta"):
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
    info = _read_info(path)
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
        weights = _read_tensors(path / "model.safetensors")
    load_weights(model, weights, path)
    tensors = _read_tensors(path / "train_state.safetensors")
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
