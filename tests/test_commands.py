"""No command that the project prints is stale: in errors and advice, and in docstrings.

The commands are collected from the strings of the sources, whatever stands for a value in them, and
held against the help of the script that they start. Those of the Markdown pages: test_readme.py.
"""

import ast
import re
from pathlib import Path

import pytest

from babyllama.config import REPO
from commands import is_ours, refused, unknown_flags
from data_process import own

ROOMS = ("babyllama", "data_process", "serve", "bench", "vqa", "export", "benchmarks", "release")
SOURCES = [*REPO.glob("*.py"), *(path for room in ROOMS for path in (REPO / room).rglob("*.py"))]
# A script, and what follows it up to the end of the line or of the clause.
COMMAND = re.compile(
    r"python (?:-m ([a-z_0-9.]*[a-z_0-9])|([\w/]+\.py))((?: [^\n;`,()，；（）。]*)?)"
)


def strings_of(tree: ast.AST) -> list[str]:
    """Every string, with VALUE where something is put in."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (n.value if isinstance(n, ast.Constant) else "VALUE" for n in node.values)
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def commands_in(path: Path) -> set[tuple[str, ...]]:
    """Script and flags of each command that a source prints, with the files that it names."""
    found = set()
    for text in strings_of(ast.parse(path.read_text("utf-8"))):
        for module, script, rest in COMMAND.findall(text):
            words = re.split(r"\s{2,}| #| -- ", rest.strip())[0].split()
            kept = words[:1] * (script == "tokenizer.py")
            kept += [word for word in words if word.startswith(("--", "configs/"))]
            if is_ours(module or script):
                found.add((module or script, *(word for word in kept if "VALUE" not in word)))
    return found


FOUND = {path: commands_in(path) for path in SOURCES}
ALL = sorted(set().union(*FOUND.values()))


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_command_in_the_sources_is_known_to_its_script(words):
    if words[0] == "quickstart.py":
        assert not refused(*words)
        return
    assert not unknown_flags(*words)
    assert not [w for w in words if w.startswith("configs/") and not (REPO / w).exists()]


def test_commands_are_found_where_errors_print_them():
    wanted = {
        "babyllama/token_file.py": ("data_process.run", "--tokenizer"),
        "tokenizer.py": ("pretrain.py", "--dry-run"),
        "data_process/pipeline.py": ("data_process.fetch",),
    }
    for name, command in wanted.items():
        assert command in FOUND[REPO / name], (name, FOUND[REPO / name])
    assert len(ALL) > 60


@pytest.mark.parametrize("command", own.COMMANDS.values())
def test_the_script_that_is_advised_instead_takes_the_file(command):
    assert not refused(*command.split(), "configs/persona.jsonl")
