"""The directory of a run: out/<name>, held by one run at a time, with the config it began with.

    out/<name>/config.yaml   the resolved config; a run goes on only with the same
               lock          empty; held while a run trains (config.py)
               lock.txt      who holds it, for the message to whoever comes second

Finds the checkpoints of a run (checkpoint.py) and compares them with their checksums.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from babyllama.config import (
    REPO,
    Settings,
    atomic_write,
    from_repo,
    lock,
    plain,
    read_yaml,
    shown,
    similar,
    to_yaml,
)
from babyllama.distributed import World
from babyllama.errors import CheckpointError, ConfigError
from model import ModelConfig

# Settings that a run may be continued with although they differ: they change no weight beyond
# rounding.
FREE = (
    "train.micro_batch_size", "train.log_every", "train.eval_every", "train.save_every",
    "train.keep", "train.keep_best", "train.compile", "train.recompute", "train.blocks",
    "train.samples", "train.track", "device.device", "parallel.engine", "parallel.timeout_s",
    "dry_run", "rows", "text",
)  # fmt: skip

# Settings that are no more, and the value at which a run has not used them: it can go on.
REMOVED = {
    "data.weight_by": "token", "optim.ema": 0.0, "regularise.label_smoothing": 0.0,
    "regularise.noise": 0.0, "dpo_nll": 0.0, "device.force": False,
}  # fmt: skip


@contextlib.contextmanager
def open_run(name: str, config: Settings, world: World) -> Iterator[Path]:
    """The directory of a run, new or to be continued with the same config, for this run alone.

    config: resolved, which is saved as config.yaml

    raises: ConfigError if another run is at work there, or, with the differences, if it belongs
        to another config
    """
    run = REPO / "out" / name
    with contextlib.ExitStack() as held:

        def begin() -> None:
            require_same(name, config)  # before anything is written
            run.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(run))
            require_same(name, config)  # no other run can change it from here on
            text, saved = to_yaml(config), run / "config.yaml"
            if not saved.is_file() or saved.read_text("utf-8") != text:
                with atomic_write(saved) as path:
                    path.write_text(text, "utf-8")

        world.on_main(begin)
        yield run


def require_same(name: str, config: Settings) -> None:
    """Refuse to go on with a run whose config is another; a run that is not there is no fault.

    raises: ConfigError with a line for each setting that differs
    """
    run = REPO / "out" / name
    saved = run / "config.yaml"
    if saved.is_file():
        before = _with_defaults(read_config(saved), config)
        lines = differences(before, plain(config), FREE)
        if lines:
            raise ConfigError(
                f"{shown(run)} holds a run of another config; take another --name, delete it, or "
                f"set back:\n  " + "\n  ".join(lines)
            )
    elif list_checkpoints(run):
        raise ConfigError(f"{shown(run)} has checkpoints but no config.yaml; take another --name")


def differences(old: object, new: object, free: tuple[str, ...] = (), at: str = "") -> list[str]:
    """Differences between two configs made of dicts, one line a setting.

    free: settings that may differ
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            where = f"{at}.{key}" if at else key
            lines += differences(old.get(key), new.get(key), free, where)
        return lines
    is_unused = new is None and at in REMOVED and old in (None, REMOVED[at])
    is_same = old == new or at in free or is_unused
    return [] if is_same else [f"{at}: saved {old!r}, now {new!r}"]


def read_config(path: Path) -> dict:
    """The settings that a run has saved, or a ConfigError; its origin need not be trusted."""
    try:
        found = read_yaml(path)
    except ValueError as error:
        found = error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{shown(path)}: wanted the settings of a run, found {str(found)[:200]}; set the file "
            f"right, or take another --name"
        )
    return found


def _with_defaults(found: dict, config: Settings) -> dict:
    """A saved config with the settings it does not know yet, at their defaults."""
    complete = dict(found)
    for name, field in config.__dataclass_fields__.items():
        section = getattr(config, name)
        if hasattr(section, "__dataclass_fields__"):
            saved = found.get(name) or {}
            complete[name] = plain(type(section)()) | saved if isinstance(saved, dict) else saved
        elif field.default is not MISSING:
            complete.setdefault(name, plain(field.default))
    return complete


INFO_FILES = ("model.yaml", "tokenizer.model")
MODEL_FILES = ("model.safetensors", *INFO_FILES)
STATE_FILES = ("train_state.safetensors", "train_state.json")

# Places of the context times width of a head: a larger rotary table than this (1 GB) is a mistake
# or malice. It is not among the weights, so their size does not bound it.
_LARGEST_TABLE = 2**27

# What a model may be trained for: titles of abstracts, and keywords when asked after the title;
# answers from a reference text (资料); conversation; to continue a text.
TASKS = ("title", "keywords", "reference", "chat", "continue")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (p for p in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir())
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


def chosen_run(named: Path | None, kind: str | None = None) -> Path:
    """The run that the user named, else the newest in out/ (of a kind, as newest_run).

    raises: CheckpointError if nothing is named and there is none
    """
    found = from_repo(named) if named else newest_run(kind=kind)
    if found is None:
        what = {"sft": "SFT run", "pretrain": "base"}.get(kind or "", "run")
        raise CheckpointError(
            f"wanted a checkpoint, found no {what} in out/; name one (out/<run> or one of its "
            f"steps), or make one with `python quickstart.py`"
        )
    return found


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's directory, given itself or its run (whose newest step is taken).

    raises: CheckpointError if there is none
    """
    if not path.is_dir():
        raise CheckpointError(
            f"{shown(path)}: no such checkpoint; wanted a run (out/<name>) or one of its steps"
            f"{similar(path)}"
        )
    if (path / "model.yaml").is_file():
        return path
    steps = list_checkpoints(path)
    if not steps:
        raise CheckpointError(f"{shown(path)}: no complete checkpoint in this directory")
    return steps[-1]


def read_base(base: Path | None) -> tuple[Path, Path, ModelConfig]:
    """The base of one's own data, release/ if nothing is named; its checkpoint, its shape."""
    place = from_repo(base or "release").resolve()
    checkpoint = find_checkpoint(place)
    return place, checkpoint, read_info(checkpoint)["model"]


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
        except OSError as error:
            raise CheckpointError(
                f"{shown(path)}: {error.filename} could not be read ({error.strerror}); get the "
                f"right to read it, or copy the checkpoint to another place"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
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
        info = read_yaml(path / "model.yaml")
        config = ModelConfig(**info["model"])
        wanted: dict[str, Any] = {"kind": str, "tokenizer": str, "fingerprint": str, "step": int}
        typed = [(key, info[key], kind) for key, kind in wanted.items()]
        typed += [(f"model.{f.name}", getattr(config, f.name), f.type) for f in fields(config)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise CheckpointError(
            f"{shown(path)}: wanted the model.yaml of a babyllama checkpoint, found {reason}"
        ) from None
    wrong = [
        f"{name} {value!r}"
        for name, value, kind in typed
        if not isinstance(value, (int | float) if kind is float else kind)
    ]
    tasks = info.get("tasks", [])
    if not isinstance(tasks, list) or not all(task in TASKS for task in tasks):
        wrong.append(f"tasks {tasks!r} (some of {', '.join(TASKS)})")
    if not wrong and config.max_seq_len * config.head_dim > _LARGEST_TABLE:
        wrong.append(f"model.max_seq_len {config.max_seq_len} with heads {config.head_dim} wide")
    if wrong:
        raise CheckpointError(f"{shown(path)}: model.yaml cannot be, found {', '.join(wrong)}")
    return {**info, "model": config}
