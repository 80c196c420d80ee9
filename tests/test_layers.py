"""Who may import whom (the table in README, section on the layout), and what importing may do."""

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
TOP = ("pretrain", "sft", "chat", "eval_rouge", "quickstart")
FLOOR_0 = (
    "model", "tokenizer", "babyllama.errors", "babyllama.language", "babyllama.language.letters"
)  # fmt: skip
# Folders of babyllama/ that can be deleted, and the other ones that each may import.
EXTRAS = {
    "cuda": (),
    "cpu": ("cuda",),  # whose chooser of a decoder knows both
    "retrieval": (),
    "scoring": ("cpu",),
    "chat": ("cpu", "retrieval", "scoring"),
    "tuning": ("cpu", "scoring"),
    "analysis": ("cpu", "cuda", "scoring"),
}
FLOOR_2 = ("data_process", "bench", "vqa", "serve", "export")
# The one module of floor 2 that may reach into another folder of it.
PASSAGE = ("serve.vision", "vqa")
TORCH_FREE = (
    "tokenizer",
    "babyllama.errors",
    "babyllama.language",
    "babyllama.language.letters",
    "babyllama.rows",
    "babyllama.token_file",
    "babyllama.scoring.rouge",
    "data_process",
)


def module_files() -> dict[str, Path]:
    """Every module of ours by its dotted name, tests and the scripts of benchmarks/ aside."""
    files = [*REPO.glob("*.py")]
    for package in ("babyllama", *FLOOR_2):
        files += (REPO / package).rglob("*.py")
    names = {}
    for path in files:
        parts = path.relative_to(REPO).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = module_files()


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, inside functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return {name for name in found if name in MODULES}


def room_of(module: str) -> str:
    """The folder that may be deleted, "core" or "floor 0", or "script" of a file at the root."""
    if module in FLOOR_0:
        return "floor 0"
    package, *inner = module.split(".")
    if package == "babyllama":
        return inner[0] if inner and inner[0] in EXTRAS else "core"
    return package if package in FLOOR_2 else "script"


def may_import(module: str, imported: str) -> bool:
    mine, other = room_of(module), room_of(imported)
    if mine == "floor 0":
        return other == "floor 0"
    if mine == "core":
        return other in ("core", "floor 0")
    if mine in EXTRAS:
        return other in ("core", "floor 0", mine, *EXTRAS[mine])
    if mine in FLOOR_2:
        return other not in ("script", *FLOOR_2) or other == mine or (module, other) == PASSAGE
    return other != "script"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module):
    found = imports_of(MODULES[module])
    assert not sorted(other for other in found if not may_import(module, other))


def test_no_imports_go_round_in_a_circle():
    needs = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(needs).prepare()


def test_the_server_reaches_pictures_through_one_function():
    module, folder = PASSAGE
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    (way,) = (node for node in tree.body if getattr(node, "name", "") == "image_tools")
    inside = {node for node in ast.walk(way) if isinstance(node, ast.ImportFrom)}
    all_ways = {
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == folder
    }
    assert inside == all_ways != set()


def test_the_core_is_flat_and_short():
    core = {name for name in MODULES if room_of(name) == "core"} - {"babyllama"}
    assert len(core) <= 16, sorted(core)  # and errors, floor 0


# The files of the main path, in the order in which they are read.
EVENING = (
    "model.py", "tokenizer.py", "pretrain.py", "babyllama/trainer.py", "babyllama/data.py",
    "babyllama/sources.py", "sft.py", "babyllama/sampling.py", "babyllama/generate.py", "chat.py",
    "eval_rouge.py",
)  # fmt: skip
# Lines at most, what was reached with a little room, to be lowered. The aims are 2,600
# for the main path, 4,200 for the core, and 27,500 in 150 files for all that is no test.
MOST_LINES = {"evening": 2_460, "core": 4_485, "product": 28_970}
MOST_FILES = 145


def n_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def test_the_house_grows_in_no_part():
    core = [p for p in (REPO / "babyllama").glob("*.py") if p.name != "__init__.py"]
    packages = [path for path in REPO.glob("*/**/*.py") if is_product(path)]
    product = [*REPO.glob("*.py"), *packages]
    found = dict(
        evening=n_lines(REPO / name for name in EVENING), core=n_lines(core),
        product=n_lines(product),
    )  # fmt: skip
    assert {part: n for part, n in found.items() if n > MOST_LINES[part]} == {}
    assert len(product) <= MOST_FILES


def is_product(path: Path) -> bool:
    """Whether a Python file is one of ours that is no test; data/ and out/ are not in git."""
    return path.relative_to(REPO).parts[0] in (
        "babyllama", *FLOOR_2, "benchmarks", "release"
    )  # fmt: skip


# Who reads pickles: one that allows no globals, and torch's own reader of tensors alone.
PICKLES = {"data_process.datasets.packages": {"pickle"}, "vqa.encoders": {"pickle", "torch.load"}}
ABLE = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")


def test_no_pickle_is_read_or_written():
    """But for two readers that run no code, each tested for that where it stands."""
    found = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            elif isinstance(node, ast.Call):
                call = ast.unparse(node)
                names = [n for n in ("torch.load", "torch.save") if call.startswith(f"{n}(")]
                assert "allow_pickle=True" not in call and "weights_only=False" not in call, module
            bad = {name for name in names if name in (*ABLE, "torch.load", "torch.save")}
            if bad:
                found.setdefault(module, set()).update(bad)
    assert found == PICKLES


def test_every_script_of_the_root_is_known():
    at_root = {name for name in MODULES if "." not in name and (REPO / f"{name}.py").is_file()}
    assert at_root == {"model", "tokenizer", *TOP}


def run_python(code: str, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-B", "-c", code, *words],
        cwd=cwd, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_what_a_cluster_worker_needs_imports_no_torch(tmp_path):
    free = [name for name in MODULES if name in TORCH_FREE or name.startswith("data_process.")]
    assert len(free) > 15
    code = """
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = run_python(code, *free, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


BARE = ("chat.py", "sft.py", "pretrain.py", "eval_rouge.py", "tokenizer.py", "-mdata_process.run",
        "-mserve.server", "-mbench.run", "-mvqa.train", "-mexport.release")  # fmt: skip


@pytest.mark.parametrize("script", BARE)
def test_where_nothing_is_installed_one_line_says_what_to_do(script):
    command = [sys.executable, "-S", "-E", script]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ") and (
        "quickstart.py" in done.stderr or ".venv" in done.stderr
    )


def test_importing_does_nothing_visible(tmp_path):
    """No output, no file written, no environment or working directory changed, no network."""
    code = """
import importlib, json, os
before, seen = dict(os.environ), []

def watch(event, args):
    writes = event == "open" and (
        any(c in str(args[1]) for c in "wax+") or args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    acts = event in ("os.mkdir", "os.rename", "os.remove", "os.chdir", "socket.connect",
                     "subprocess.Popen", "os.system", "os.fork")
    if writes or acts:
        seen.append([module, event, str(args[:2])])

module = "the libraries"
import numpy, torch, sentencepiece, jsonargparse, tqdm, yaml, safetensors  # their own business
torch.nn.functional.softmax(torch.ones(1), 0)
sys.addaudithook(watch)
for module in sys.argv[1:]:
    importlib.import_module(module)
print(json.dumps({"seen": seen, "same": dict(os.environ) == before, "cwd": os.getcwd()}))
"""
    done = run_python(code, *MODULES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    assert json.loads(line) == {"seen": [], "same": True, "cwd": str(tmp_path)}
    assert not list(tmp_path.iterdir())
