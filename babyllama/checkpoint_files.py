"""A checkpoint as files: written whole or not at all, found again, checked before it is read.

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
renamed. No pickle is read or written. Format of the weights: safetensors 0.4 and later. Knows of
no model: checkpoint.py turns models into files and back.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from babyllama import int8
from babyllama.cli import REPO, shown
from babyllama.errors import CheckpointError, ConfigError
from model import ModelConfig
from tokenizer import Tokenizer

INFO_FILES = ("model.yaml", "tokenizer.model")
MODEL_FILES = ("model.safetensors", *INFO_FILES)
STATE_FILES = ("train_state.safetensors", "train_state.json")

# Places of the context times width of a head: a larger rotary table than this (1 GB) is a mistake
# or malice. It is not among the weights, so their size does not bound it.
_LARGEST_TABLE = 2**27


def write_whole(final: Path, fill: Callable[[Path], None], tensors: Iterable[Tensor]) -> None:
    """Fill a directory under another name, add checksums, flush it to the disk and rename it.

    tensors: what `fill` will write, all but small files: says what was wanted where it fails
    raises: CheckpointError with path, bytes wanted, written and free, and the last good checkpoint
    """
    run, temporary = final.parent, final.with_name(f"tmp-{final.name}")
    for left_over in (*run.glob("tmp-*step-*"), *run.glob("tmp-*best")):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        write_sums(temporary)
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        if final.exists():
            delete(final)
        os.replace(temporary, final)
        _flush(run)
    except (OSError, SafetensorError) as error:
        wanted = sum(tensor.nbytes for tensor in tensors)
        written = sum(path.stat().st_size for path in temporary.glob("*"))
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_cannot_save(final, wanted, written, error)) from None


def write_sums(place: Path) -> None:
    sums = {path.name: sha256(path) for path in sorted(place.iterdir())}
    (place / "checksums.json").write_text(json.dumps(sums, indent=1), "utf-8")


def delete(path: Path) -> None:
    """Delete a checkpoint; killed on the way, this leaves nothing that looks like one."""
    doomed = path.with_name(f"tmp-old-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


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


def _flush(path: Path) -> None:
    """Make sure that a file or a directory has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a directory to flush
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        if steps and (kind is None or read_info(steps[-1])["kind"] == kind):
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


def kind_of(path: Path) -> str:
    """What made a checkpoint, or a run's newest one: pretrain, sft, vqa …; errors as load_model."""
    return read_info(find_checkpoint(Path(path)))["kind"]


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
            bad = [name for name in names if sha256(path / name) != sums[name]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            bad = [f"checksums.json ({error})"]
        if not bad:
            return
        fault = f"fails its checksum in {', '.join(bad)}"
    steps = list_checkpoints(path.parent)
    older = steps[: steps.index(path)] if path in steps else []
    advice = f"use {shown(older[-1])}" if older else "there is no older one in this run"
    raise CheckpointError(f"{shown(path)} {fault}: it was cut or altered; delete it; {advice}")


def read_info(path: Path) -> dict:
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
    if wrong or config.max_seq_len * config.head_dim > _LARGEST_TABLE:
        table = f"model.max_seq_len {config.max_seq_len} with heads {config.head_dim} wide"
        found = ", ".join(wrong) or table
        raise CheckpointError(f"{shown(path)}: model.yaml cannot be, found {found}")
    return {**info, "model": config}


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{shown(path)}: wanted safetensors, found {error}") from None


def read_checkpoint(path: Path) -> tuple[dict, Tokenizer, dict[str, Tensor]]:
    """What model.yaml says, with the shape as a ModelConfig; the tokenizer; the full weights.

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
            f"{shown(path)}: its tokenizer.model ({tokenizer.vocab_size} pieces, "
            f"{tokenizer.fingerprint[:12]}…) is not the one it was trained with "
            f"({info['model'].vocab_size} pieces, {info['fingerprint'][:12]}…)"
        )
    # The copy keeps the name of the original, by which token files are found.
    tokenizer.path = Path("data/tokenizers") / f"{info['tokenizer']}.model"
    return info, tokenizer, int8.widen(read_tensors(path / "model.safetensors"), shown(path))
