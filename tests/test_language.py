"""Every message has its Chinese in babyllama/language/zh.po, and the Chinese is the right one.

    python tests/test_language.py [PATH ...]     # what the catalogue lacks, to be filled in there
    python tests/test_language.py --drop         # take out what nobody says any more

Messages are found in the source: what is raised or printed, other texts of two English words or
more, what --help shows. A msgstr that equals its msgid is a text to be left as it is.
"""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from docstring_parser import parse as docstring
from rich.cells import cell_len

REPO = Path(__file__).parent.parent
sys.path.insert(0, str(REPO))

from babyllama.language import (  # noqa: E402
    CATALOGUE,
    COMMANDS,
    REMARK,
    Catalogue,
    Door,
    is_chinese,
    read_catalogue,
)  # fmt: skip

# These speak both languages, or there is no door yet, or answer in JSON, in OpenAI's English.
NOT_SHOWN = ("quickstart.py", "babyllama/__init__.py")
API = "answers app documents engine guard page_routes prompt scheduler schema"
NOT_SHOWN += tuple(f"serve/{name}.py" for name in API.split())
SAYERS = ("print", "say", "warn", "confirm", "error", "tqdm", "_complain", "note", "tell", "label")
CELLS = ("lines", "head", "_NATURE", "LABELS")  # so are tables called, and labels of plots
TWO_WORDS = re.compile(r"[a-z]{2,}[,;:]? [a-z]{2,}")
WORD_AND_SPACE = re.compile(r"\b[a-z]{2,}[,;:]? | [a-z]{2,}\b")
CHINESE = re.compile("[\u4e00-\u9fff]")


def sources() -> list[Path]:
    """The product's files that speak to a terminal."""
    files = [*REPO.glob("*.py"), *REPO.glob("[a-z]*/**/*.py")]
    files.append(REPO / "data_process/datasets/catalog.yaml")  # what the list of sets shows
    names = {path.relative_to(REPO).as_posix(): path for path in files}
    skipped = ("tests/", "out/", "data/", "docs/")
    return [names[n] for n in sorted(names) if not n.startswith(skipped) and n not in NOT_SHOWN]


def template(node: ast.AST) -> str | None:
    """A string, an f-string or a sum of them, with {} for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.replace("{", "{{").replace("}", "}}").replace("{{}}", "{}")
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        both = template(node.left), template(node.right)
        return None if both == (None, None) else "".join("{}" if t is None else t for t in both)
    return None


def filled_in(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions that stand for {} in a template."""
    if isinstance(node, ast.BinOp):
        for side in (node.left, node.right):
            yield from [side] if template(side) is None else filled_in(side)
    elif isinstance(node, ast.JoinedStr):
        yield from (part.value for part in node.values if isinstance(part, ast.FormattedValue))


def is_message(text: str, is_constant: bool, is_said: bool) -> bool:
    words = re.findall("[A-Za-z]{2,}", text)
    if not any(re.search("[a-z]{2}", word) for word in words):
        return False
    if len(CHINESE.findall(text)) > len(words) or text.startswith(("python ", "curl ")):
        return False
    pattern = TWO_WORDS if is_constant else WORD_AND_SPACE
    return is_said or bool(pattern.search(text.replace("{}", "…")))


def written(node: ast.AST, is_said: bool = False) -> Iterator[str]:
    """The messages in a piece of code."""
    text = template(node)
    if text is not None:
        if is_message(text, isinstance(node, ast.Constant), is_said):
            yield re.sub(r"(\{\})+", "{}", text)
        for part in filled_in(node):
            yield from written(part, isinstance(part, ast.Constant))
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
        return  # a regular expression
    said = spoken(node)
    if is_said and isinstance(node, ast.List | ast.Tuple | ast.Dict | ast.keyword):
        said = node.values if isinstance(node, ast.Dict) else [*ast.iter_child_nodes(node)]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        yield from written(child, child in said)


def spoken(node: ast.AST) -> list[ast.AST]:
    """The parts of a call, or of a table's first lines, that the user will read."""
    if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in CELLS:
        return [node.value]
    call = node.exc if isinstance(node, ast.Raise) else node
    if not isinstance(call, ast.Call):
        return []
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if name in SAYERS or name.endswith(("Error", "Warning")):
        named = [word for word in call.keywords if word.arg in ("desc", "unit", "message")]
        return [*call.args, *named]
    return [word for word in call.keywords if word.arg in ("help", "title")]


def explained(tree: ast.Module) -> Iterator[str]:
    """What --help says of a file: docstrings of settings, and its own where it is shown."""
    for node in ast.walk(tree):
        is_documented = isinstance(node, ast.ClassDef | ast.FunctionDef)
        text = ast.get_docstring(node) if is_documented else None
        if text and "Args:" in text:
            found = docstring(text)
            title = found.short_description
            yield title.rstrip(".") if isinstance(node, ast.ClassDef) else title
            yield from (" ".join(one.description.split()) for one in found.params)
    if "__doc__" in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
        for paragraph in ast.get_docstring(tree, clean=False).split("\n\n"):
            if paragraph.startswith(COMMANDS):
                yield from (found[2] for found in REMARK.finditer(paragraph))
            else:
                yield " ".join(paragraph.split())


def messages(path: Path) -> set[str]:
    if path.suffix == ".yaml":
        values = [entry.get(key) for entry in yaml.safe_load(path.read_text("utf-8")).values()
                  for key in ("license", "home", "rows", "size", "manual")]  # fmt: skip
        texts = (template(ast.Constant(value)) for value in values if value)
        return {text for text in texts if text and is_message(text, True, False)}
    tree = ast.parse(path.read_text("utf-8"))
    help_texts = {text.replace("{", "{{").replace("}", "}}") for text in explained(tree)}
    return set(written(tree)) | {text for text in help_texts if re.search("[a-z]{2}", text)}


def unsaid(text: str) -> list[str]:
    """The entries of a catalogue that nobody says, or that come twice; those of libraries stay."""
    said, seen = set().union(*map(messages, sources())), set()
    found = []
    for mark, key in re.findall(r'^(#, library\n)?msgid (".*")$', text, re.M):
        if json.loads(key) in seen or not (mark or json.loads(key) in said):
            found.append(key)
        seen.add(json.loads(key))
    return found


def test_every_message_has_its_chinese():
    """Else: python tests/test_language.py lists them as they go into the catalogue."""
    known = read_catalogue(CATALOGUE)
    found = {path.name: messages(path) for path in sources()}
    assert sum(map(len, found.values())) > 1000
    assert {name: lacks for name in found if (lacks := found[name] - known.keys())} == {}


def test_no_translation_lies_unused():
    """Else: python tests/test_language.py --drop takes them out."""
    assert unsaid(CATALOGUE.read_text("utf-8")) == []


def marked(text: str, marks: str) -> str:
    """A message with a mark in place of each {}."""
    return text.format(*(f"⟨{mark}⟩" for mark in marks))


@pytest.mark.parametrize("is_part", [False, True])
def test_each_message_comes_out_as_its_own_chinese(is_part):
    """None is taken for another one, and all that is filled in stands in it."""
    entries = read_catalogue(CATALOGUE)
    catalogue = Catalogue(entries)
    wrong = {}
    for key, translation in entries.items():
        numbers = "".join(str(n) if n < 10 else "x" for n in range(len(re.findall(r"\{\}", key))))
        said = marked(translation, numbers)
        assert sorted(set(re.findall("⟨.⟩", said))) == [f"⟨{n}⟩" for n in sorted(set(numbers))], key
        is_open = key.startswith(tuple(" ,;:(")) or key.endswith(tuple(" ,;:("))
        if is_part == is_open and (found := catalogue.say(marked(key, numbers), is_part)) != said:
            wrong[key] = found
    assert wrong == {}


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in Chinese; the doors go when the test ends."""
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")


def test_an_error_is_chinese_with_what_is_filled_in(chinese, script):
    done = script("chat.py", "out/nothing")
    assert done.code == 2
    assert done.err.startswith("错误：out/nothing：没有这个检查点；应为一次训练")


def test_a_flag_chooses_the_language(chinese, script, monkeypatch):
    wrong = ("--optim.lr", "-1")
    assert script("pretrain.py", *wrong).err.startswith("错误：optim.lr 应为大于 0 的数，实为 -1.0")
    assert script("pretrain.py", "--lang", "en", *wrong).error.startswith("error: optim.lr wants")
    monkeypatch.setenv("LC_ALL", "C")
    assert script("pretrain.py", "--lang=zh", *wrong).err.startswith("错误：")
    assert "'fr'" in script("pretrain.py", "--lang=fr").error


def test_help_is_chinese_to_the_last_word(chinese, script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = script("chat.py", "--help").out
    assert "（类型：int，默认：256）" in said
    assert max(map(cell_len, said[said.index("选项") :].splitlines())) <= 80
    prose = re.sub(r"\S*[/=<>\[{(-]\S*|[A-Z_]{2,}", "", said)  # names, types, commands
    assert not re.findall("[a-z]{2,},? [a-z]{2,},? [a-z]{2,}", prose)


@pytest.mark.parametrize("locales, wanted", [
    ({"LANG": "zh_CN.UTF-8"}, True), ({"LANG": "zh_TW"}, True), ({"LANG": "en_US.UTF-8"}, False),
    ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, False), ({"LANG": "C", "LC_MESSAGES": "zh_CN"}, True),
])  # fmt: skip
def test_the_first_locale_that_is_set_decides(locales, wanted):
    assert is_chinese(locales) is wanted


class Kept:
    """A stream that keeps what is written."""

    text = ""

    def write(self, text: str) -> None:
        self.text += text


def printed(text: str) -> str:
    kept = Kept()
    Door(kept, Catalogue(read_catalogue(CATALOGUE))).write(text)
    return kept.text


def test_what_is_no_message_of_ours_passes():
    for text in (
        '{"error": "interrupted"}\n', "The quick brown fox, 12 times: no message", "今天天气很好",
        "Traceback (most recent call last):\n  File x\nValueError: 3\n", "loss 3.21  ppl 24.8\n",
    ):  # fmt: skip
        assert printed(text) == text


def test_bars_tables_colours_and_messages_in_messages():
    assert printed("\x1b[2minterrupted\x1b[0m\n") == "\x1b[2m已中断\x1b[0m\n"
    assert (
        printed("train step 3/10  loss 2.5  left 0:07") == "train 第 3/10 步  loss 2.5  剩余 0:07"
    )
    said = printed(
        "error: no such setting: --lx; did you mean --lr?; --help explains every setting"
    )
    assert said == "错误：没有这项设置：--lx；是不是想用 --lr？；--help 说明每项设置"
    table = printed("first sentence  12.5\nours             7.1")
    assert {cell_len(line) for line in table.splitlines()} == {20}


def main() -> None:
    if sys.argv[1:] == ["--drop"]:
        text = CATALOGUE.read_text("utf-8")
        for key in unsaid(text):  # of two the second one goes
            before, _, after = text.rpartition(f"msgid {key}\n")
            text = before + after.partition("\n\n")[2]
        CATALOGUE.write_text(text, "utf-8")
        return
    known = read_catalogue(CATALOGUE)
    wanted = [path.resolve() for path in map(Path, sys.argv[1:])] or [REPO]
    n = n_known = 0
    for path in sources():
        if not any(path == place or place in path.parents for place in wanted):
            continue
        found = messages(path)
        n, n_known = n + len(found), n_known + len(found & known.keys())
        if found - known.keys():
            print(f"\n# {path.relative_to(REPO)}")
        for text in sorted(found - known.keys()):
            print(f'\nmsgid {json.dumps(text, ensure_ascii=False)}\nmsgstr ""')
            known[text] = ""
    print(f"\n# {n_known} of {n} messages are there")


if __name__ == "__main__":
    sys.exit(main())
