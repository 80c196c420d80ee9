"""Whether a command of ours is accepted as it stands: read by its own script, which then prints its
settings or its help instead of acting."""

import contextlib
import io
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest

from babyllama.config import REPO

# Scripts of several commands, which print their help instead of their settings.
NAMED = ("tokenizer.py", "data_process.vocabulary")


def is_ours(name: str) -> bool:
    """Whether a module's or a script's name is one of the repository's."""
    return name.endswith(".py") or (REPO / name.partition(".")[0]).is_dir()


def call(name: str, *arguments: str) -> tuple[int, str]:
    """The exit code of a script or module that runs in this process, and what it said."""
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(REPO)
        patch.setattr(sys, "argv", [name, *arguments])
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
            for module in (name, "data_process.vocabulary"):  # else runpy warns
                patch.delitem(sys.modules, module, raising=False)
            if name.endswith(".py"):
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    said.seek(0)
    return end.value.code or 0, said.read()


def refused(name: str, *arguments: str) -> str:
    """What a script has against a command line; empty where it accepts it."""
    if name == "quickstart.py":
        ours = arguments[: arguments.index("--")] if "--" in arguments else arguments
        return "" if all(word in ("--tests", "--slow") for word in ours) else f"found {ours}"
    if name.startswith("tests/"):
        return "" if (REPO / name).is_file() else "no such file"
    if name in NAMED:
        return unknown_flags(name, *arguments)
    code, said = call(name, *arguments, "--print_config")
    return said if code else ""


@cache
def help_of(name: str, *command: str) -> str:
    code, said = call(name, *command, "--help")
    assert code == 0, said
    return said


def unknown_flags(name: str, *arguments: str) -> str:
    """The flags of a command line that its script's help does not know."""
    path = REPO / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
    if not Path(path).is_file():
        return f"no script {name}"
    flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    known = help_of(name, *arguments[: name in NAMED]) if flags else ""
    return " ".join(
        flag
        for flag in flags
        if not re.search(rf"{flag[:2]}{flag[2:].replace('-', '[-_]')}\b", known)
    )
