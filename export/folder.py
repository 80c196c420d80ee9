"""Where an export goes: a directory that appears whole, or not at all.

It is built beside its place under another name and renamed when it is finished and proven. What
stood in its place before is touched only then, and only if it is an export itself.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from babyllama.config import atomic_dir, from_repo, shown
from babyllama.errors import CheckpointError, ConfigError

# Every export holds it, and nothing without it is ever replaced.
REPORT = "parity.json"


class NotEqualError(CheckpointError):
    """The exported model does not behave like the checkpoint."""


def check_out(out: Path | None, force: bool, source: Path) -> Path:
    """The directory to make; every reason against it is found before anything is loaded.

    raises: ConfigError if it is missing, stands already, or holds what is exported
    """
    if out is None:
        raise ConfigError(
            "--out: wanted a directory to write, found none; for example --out out/hf"
        )
    out = from_repo(out)
    if source.resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--out {shown(out)} holds {shown(source)}, which is read; name another")
    if out.is_dir() and not any(out.iterdir()):
        return out
    if out.exists() and not force:
        raise ConfigError(
            f"--out {shown(out)} exists; name another directory, or replace it with --force"
        )
    if out.exists() and not (out / REPORT).is_file():
        raise ConfigError(
            f"--out {shown(out)} is no export (it holds no {REPORT}), so --force does not replace "
            f"it; delete it yourself or name another directory"
        )
    return out


@contextmanager
def new_folder(out: Path, n_bytes: int) -> Iterator[Path]:
    """A temporary directory that takes the place of `out` if the block succeeds.

    n_bytes: about what will be written
    raises: ConfigError if the disk does not take it; nothing has changed then
    """
    try:
        with atomic_dir(out) as temporary:
            total, _, free = shutil.disk_usage(temporary)
            if total and free < n_bytes:
                raise OSError(f"{n_bytes / 1e6:.1f} MB are wanted, {free / 1e6:.1f} MB are free")
            yield temporary
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"could not write {shown(out)}: {error}; nothing that stood there was changed; free "
            f"some space or name another --out, then start the same command again"
        ) from None


def write_json(path: Path, value: dict) -> None:
    """A dict as readable JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")


def settle(report: dict, place: Path, out: Path) -> None:
    """Write the report into the new directory, or refuse the whole export because of it.

    raises: NotEqualError if a check failed; the report then lies beside the place of the export
    """
    checks = {name: value for name, value in report.items() if isinstance(value, dict)}
    failed = {name: check for name, check in checks.items() if check.get("passed") is False}
    report["passed"] = not failed
    if not failed:
        write_json(place / REPORT, report)
        return
    beside = out.with_name(f"{out.name}.failed-{REPORT}")
    write_json(beside, report)
    reasons = "; ".join(f"{name} ({_figures(check)})" for name, check in failed.items())
    raise NotEqualError(
        f"{shown(out)} was not written: it would not behave like {report['source']} in {reasons}; "
        f"the first differences are in {shown(beside)}"
    )


def _figures(check: dict) -> str:
    numbers = {k: v for k, v in check.items() if k != "passed" and isinstance(v, int | float)}
    return ", ".join(f"{k} {v:.3g}" if v % 1 else f"{k} {v}" for k, v in numbers.items())


def show(report: dict, out: Path) -> None:
    """What was compared, one line each."""
    for name, check in report.items():
        if isinstance(check, dict) and "passed" in check:
            print(f"{'equal' if check['passed'] else 'counted':<8} {name}: {_figures(check)}")
        elif isinstance(check, str) and name in ("llama_cpp", "note"):
            print(f"note     {check}")
    print(f"{shown(out)}: done; the proof is {shown(out / REPORT)}")
