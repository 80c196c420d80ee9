"""The commands of the READMEs and of docs/ are accepted as they stand, and what they name exists.

Each command is read by its own script, which prints its settings instead of acting on them; what
the commands do is tested with the scripts.
"""

import re
import shlex
from pathlib import Path

import pytest

from babyllama.config import REPO
from commands import refused

READMES = ("README.md", "README_en.md")
PAGES = ("CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md")))
# Shown by the README, made by the user.
MADE = ("data/", "out/")


def blocks_and_spans(text: str) -> list[str]:
    """Lines of code blocks, and code inside sentences."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()] + re.findall(
        r"`([^`\n]+)`", rest
    )


def commands(name: str) -> list[list[str]]:
    """The words of each command that starts a script of ours, the launcher in front taken off."""
    found = []
    for line in blocks_and_spans((REPO / name).read_text("utf-8")):
        if re.match(r"([A-Z_]+=\w+ )?(python|torchrun|sbatch) ", line):
            words = shlex.split(line.partition(" < ")[0], comments=True)
            while words[-1] != words[0] and "torchrun" in words[1:]:
                words = words[words.index("torchrun", 1) :]  # behind the supervisor
            start = next((i for i, w in enumerate(words) if w == "-m" or w.endswith(".py")), None)
            if start is not None:
                found.append(words[start:])
    return found


ALL = sorted({tuple(words) for name in READMES + PAGES for words in commands(name)})


def test_both_languages_show_the_same_commands():
    """The same scripts with the same flags; values may be words of the language."""
    shown = [
        {(*words[: 1 + (words[0] == "-m")], *(w for w in words if w.startswith("--")))
         for words in commands(name)}
        for name in READMES
    ]  # fmt: skip
    only = [shown[0] - shown[1], shown[1] - shown[0]]
    assert not any(only), only


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_a_command_is_accepted(words):
    name, *arguments = words[words[0] == "-m" :]
    arguments = [word.split("|")[0] for word in arguments]  # one of several
    if any(word.startswith(MADE) and word.endswith(".yaml") for word in arguments):
        return  # a config that an earlier command makes
    assert not refused(name, *arguments)


@pytest.mark.parametrize("name", READMES + PAGES)
def test_links_pictures_and_files_that_are_named_exist(name):
    text = (REPO / name).read_text("utf-8")
    linked = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    named = re.findall(r"`((?:configs|requirements|babyllama|tests)/[\w./-]+)`", text)
    missing = [path for path in linked if not ((REPO / name).parent / path).exists()]
    missing += [path for path in named if not (REPO / path).exists()]
    assert len(linked) > 10 or name in PAGES
    assert not missing


@pytest.mark.parametrize("name", READMES)
def test_every_script_and_folder_stands_in_the_layout(name):
    layout = "\n".join(blocks_and_spans((REPO / name).read_text("utf-8")))
    at_root = [path.name for path in REPO.glob("*.py")]
    folders = [f"{path.parent.name}/" for path in REPO.glob("*/__init__.py")]
    assert not [path for path in (*at_root, *folders) if path not in layout]


def test_the_container_is_made_of_what_is_there():
    text = (REPO / "Dockerfile").read_text("utf-8")
    named = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    named += re.findall(r" -[rc] ([\w./-]+\.txt)", text) + re.findall(
        r"python ([\w./-]+\.py)", text
    )
    assert len(named) > 7 and not [name for name in named if not (REPO / name).exists()]
    assert not set(named) & set((REPO / ".dockerignore").read_text("utf-8").split())
    server = re.search(r"python -m (serve.server) (.*)", text)
    assert server and not refused(server[1], *shlex.split(server[2]))
    assert "--api-key-file" in server[2]  # without one it serves its own machine alone


def test_the_words_for_a_launcher_are_taken_off():
    assert ("pretrain.py",) in ALL
    assert ("pretrain.py", "--config", "configs/pretrain/wiki.yaml") in ALL
    assert len(ALL) > 50 and not [w for w in ALL if Path(w[0]).suffix != ".py" and w[0] != "-m"]
