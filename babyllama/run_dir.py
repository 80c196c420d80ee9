"""The directory of a run: out/<name>, held by one run at a time, with the config it began with.

    out/<name>/config.yaml   the resolved config; a run goes on only with the same
               lock          empty; held while a run trains
               lock.txt      who holds it, for the message to whoever comes second

The lock is that of an SQLite transaction on an empty database: the system itself ends it with the
process that holds it, whatever kills that, on Linux, macOS and Windows alike.
"""

import contextlib
import errno
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import MISSING
from pathlib import Path

import yaml

from babyllama.checkpoint_files import list_checkpoints
from babyllama.cli import REPO, plain, shown, to_yaml
from babyllama.errors import ConfigError
from babyllama.log import written_whole
from babyllama.parallel import World

# Settings that a run may be continued with although they differ: they change no weight beyond
# rounding.
FREE = (
    "train.micro_batch_size", "train.log_every", "train.eval_every", "train.save_every",
    "train.keep", "train.keep_best", "train.compile", "train.recompute", "train.blocks",
    "train.samples", "train.track", "device.device", "parallel.engine", "parallel.timeout_s",
    "dry_run",
)  # fmt: skip


def beside(checkpoint: Path) -> Path:
    """Where reports on a checkpoint go: to its run; for one without a run (release/) to out/."""
    run = checkpoint.resolve().parent
    return REPO / "out" if run == REPO.resolve() else run


def checksums(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint: says in a report which one was measured."""
    return json.loads((checkpoint / "checksums.json").read_text("utf-8"))


@contextlib.contextmanager
def open_run(name: str, config: object, world: World) -> Iterator[Path]:
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
            with written_whole(run / "config.yaml") as path:
                path.write_text(to_yaml(config), "utf-8")

        world.on_main(begin)
        yield run


@contextlib.contextmanager
def lock(run: Path) -> Iterator[None]:
    """Hold a run's directory for as long as the block runs.

    raises: ConfigError that names the holder if it is held already
    """
    with open(run / "lock", "ab"):
        pass  # an OSError says more than SQLite does
    connection = sqlite3.connect(run / "lock", timeout=0, isolation_level=None)
    holder = run / "lock.txt"
    try:
        connection.execute("PRAGMA journal_mode = MEMORY")  # no file beside it
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise OSError(errno.EIO, str(error), str(run / "lock")) from None
        who = holder.read_text("utf-8").strip() if holder.is_file() else "by another process"
        raise ConfigError(
            f"{shown(run)} is in use ({who}); wait for that run to end, stop it, or take another "
            f"--name"
        ) from None
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        yield
    finally:
        holder.unlink(missing_ok=True)
        connection.close()


def require_same(name: str, config: object) -> None:
    """Refuse to go on with a run whose config is another; a run that is not there is no fault.

    raises: ConfigError with a line for each setting that differs
    """
    run = REPO / "out" / name
    saved = run / "config.yaml"
    if saved.is_file():
        lines = differences(_with_defaults(_read_config(saved), config), plain(config), FREE)
        if lines:
            raise ConfigError(
                f"{shown(run)} holds a run of another config; take another --name, delete it, or "
                f"set back:\n  " + "\n  ".join(lines)
            )
    elif list_checkpoints(run):
        raise ConfigError(f"{shown(run)} has checkpoints but no config.yaml; take another --name")


def differences(old: object, new: object, free: tuple[str, ...] = (), at: str = "") -> list[str]:
    """What differs between two configs made of dicts, one line a setting.

    free: settings that may differ
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            where = f"{at}.{key}" if at else key
            lines += differences(old.get(key), new.get(key), free, where)
        return lines
    return [] if old == new or at in free else [f"{at}: saved {old!r}, now {new!r}"]


def _read_config(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found = error
    if not isinstance(found, dict):
        raise ConfigError(
            f"{shown(path)}: wanted the settings of a run, found {' '.join(str(found).split())}; "
            f"take another --name, or delete this run"
        )
    return found


def _with_defaults(found: dict, config: object) -> dict:
    """A saved config with the settings it does not know yet, at their defaults."""
    complete = dict(found)
    for name, field in config.__dataclass_fields__.items():
        section = getattr(config, name)
        if hasattr(section, "__dataclass_fields__"):
            complete[name] = plain(type(section)()) | (found.get(name) or {})
        elif field.default is not MISSING:
            complete.setdefault(name, plain(field.default))
    return complete
