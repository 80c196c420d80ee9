"""The steps of the quick start: in order, continued where stopped, run again when outdated."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import quickstart
from quickstart import Step, plan, run_steps

REPO = Path(quickstart.__file__).parent
PYTHON = Path(sys.executable)

# Each step appends its name to a file, so that the file tells what ran.
WRITE = """
import os, signal, sys
from pathlib import Path
name, fate = sys.argv[1], Path(sys.argv[1] + ".fate")
with open("ran.txt", "a") as file:
    file.write(name)
Path("made").mkdir(exist_ok=True)
Path("made", name).touch()
if fate.exists():
    code = int(fate.read_text())
    fate.unlink()
    if code < 0:
        os.kill(os.getppid(), -code)
        if -code != signal.SIGKILL:
            signal.pause()  # until the signal is passed on
    sys.exit(code)
"""


def step(name: str, **changes) -> Step:
    return Step(name, name, f"python write.py {name}", makes=f"made/{name}")._replace(**changes)


ABC = (step("a"), step("b"), step("c"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "write.py").write_text(WRITE)
    return tmp_path


def ran(root: Path, steps=ABC, code: int = 0) -> str:
    """The names of the steps that one call runs."""
    (root / "ran.txt").write_text("")
    assert run_steps(steps, root, PYTHON) == code
    return (root / "ran.txt").read_text()


def ran_in_a_process(root: Path) -> tuple[str, int, str]:
    """As above, with the process's exit code and messages; all three in a process of their own."""
    (root / "ran.txt").write_text("")
    script = (
        "import signal, sys; from pathlib import Path; import quickstart as q\n"
        # A shell's background job ignores Ctrl-C, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "steps = [q.Step(n, n, f'python write.py {n}', f'made/{n}') for n in 'abc']\n"
        "sys.exit(q.run_steps(steps, Path(sys.argv[1]), Path(sys.executable)))"
    )
    done = subprocess.run(
        [PYTHON, "-c", script, root], cwd=REPO, capture_output=True, stdin=subprocess.DEVNULL
    )
    return (root / "ran.txt").read_text(), done.returncode, done.stderr.decode()


def test_finished_steps_are_not_run_again(root):
    assert ran(root) == "abc"
    assert ran(root) == ""


def test_a_failing_step_gives_its_exit_code_and_is_where_the_next_call_starts(root, capsys):
    (root / "b.fate").write_text("7")
    assert ran(root, code=7) == "ab"
    told = capsys.readouterr()
    assert "step 2 of 3" in told.out and "$ python write.py b" in told.out
    assert "exit code 7: python write.py b" in told.err
    assert ran(root) == "bc"


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
@pytest.mark.parametrize("signal, code", [(2, 130), (9, -9), (15, 143)])
def test_a_call_that_was_killed_is_continued(root, signal, code):
    (root / "b.fate").write_text(str(-signal))
    names, exit_code, message = ran_in_a_process(root)
    assert (names, exit_code) == ("ab", code)
    assert ("python quickstart.py" in message) == (signal != 9)
    assert ran(root) == "bc"


def test_a_step_that_stopped_with_everything_saved_passes_75_on(root, capsys):
    (root / "b.fate").write_text("75")
    assert ran(root, code=75) == "ab"
    assert "python quickstart.py" in capsys.readouterr().err


def test_a_changed_command_runs_again_with_all_after_it(root):
    ran(root)
    changed = (ABC[0], step("b", command="python write.py b again"), ABC[2])
    assert ran(root, changed) == "bc"
    assert ran(root, changed) == ""


def test_a_changed_file_runs_its_step_again_with_all_after_it(root):
    steps = (ABC[0], step("b", depends=("b.yaml",)), ABC[2])
    (root / "b.yaml").write_text("lr: 1")
    assert ran(root, steps) == "abc"
    (root / "b.yaml").write_text("lr: 2")
    assert ran(root, steps) == "bc"


def test_a_lost_result_is_made_again_with_all_after_it(root):
    ran(root)
    (root / "made/b").unlink()
    assert ran(root) == "bc"


def test_an_outdated_run_is_moved_aside_and_an_interrupted_one_is_not(root):
    steps = (ABC[0], step("b", makes="made", is_run=True))
    (root / "b.fate").write_text("75")
    ran(root, steps, code=75)
    (root / "made/b").write_text("half of it")
    assert ran(root, steps) == "b"
    assert (root / "made/b").read_text() == "half of it"
    ran(root, (step("a", command="python write.py a again"), steps[1]))
    assert (root / "made/b").read_text() == ""
    assert [path.read_text() for path in root.glob("out/quickstart/made-*/b")] == ["half of it"]


def test_the_output_of_a_quiet_step_is_folded_away_unless_it_fails(root, capfd):
    (root / "talk.py").write_text("import sys; print('a word of it'); sys.exit(int(sys.argv[1]))")
    quiet = step("a", command="python talk.py 0", makes="", is_quiet=True)
    assert run_steps([quiet], root, PYTHON) == 0
    assert "a word of it" not in capfd.readouterr().out
    assert run_steps([quiet._replace(command="python talk.py 7")], root, PYTHON) == 7
    assert "a word of it" in capfd.readouterr().out


def test_the_scores_of_both_acts_stand_beside_what_copying_scores(tmp_path, capsys):
    for made, found in (
        ("sample_sft", {"sample_sft/step-000588": 8.0, "first sentence": 27.7}),
        (
            "headlines",
            {"headlines/step-000942": 31.5, "release": 14.7, "first sentence": 27.7},
        ),
    ):
        scores = {
            name: {"rouge": {"ours": {"rouge-1": {"mean": r1}}}} for name, r1 in found.items()
        }
        (tmp_path / "out" / made).mkdir(parents=True)
        path = tmp_path / "out" / made / "predictions.scores.json"
        path.write_text(json.dumps({"scores_x100": scores}))
    assert quickstart.show_scores(tmp_path, PYTHON) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["8.0", "14.7", "27.7", "31.5"]
    for word, line in zip(["第一幕", "release/", "第一句", "第二幕"], lines, strict=True):
        assert word in line


def scores_of(act: int, tmp_path: Path) -> tuple[dict[str, float], str]:
    """The scores that the steps of an act print in a fresh clone, and all that they print."""
    clone = tmp_path / "babyllama"
    subprocess.run(["git", "clone", "-q", str(REPO), str(clone)], check=True)
    (clone / "go.py").write_text(
        "import sys; from pathlib import Path; import quickstart as q\n"
        "steps = q.plan()['steps']\n"
        "second = [each.name for each in steps].index('tokens_release')\n"
        "steps = steps[:second] if sys.argv[1] == '1' else (steps[0], *steps[second:])\n"
        "sys.exit(q.run_steps(steps, Path(q.__file__).parent, Path(sys.executable)))"
    )
    done = subprocess.run(
        [PYTHON, "go.py", str(act)], cwd=clone, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^ +([0-9.]+)  █* +(release/|第.幕|照抄第一句)", done.stdout, re.M)
    return {name: float(score) for score, name in found}, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_a_fresh_clone_the_first_act_ends_with_scores(tmp_path):
    scores, _ = scores_of(1, tmp_path)
    assert 4 < scores["第一幕"] < scores["照抄第一句"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_in_a_fresh_clone_the_second_act_beats_the_first_sentence_and_makes_a_character(tmp_path):
    scores, printed = scores_of(2, tmp_path)
    (before, after), *_ = re.findall(r"前：(.*)\n    后：(.*)", printed)
    assert "石榴" in after and "石榴" not in before
    assert scores["release/"] < scores["照抄第一句"] < scores["第二幕"]


def test_the_steps_are_commands_of_this_repository():
    steps = plan()["steps"]
    assert len({each.name for each in steps}) == len(steps)
    for each in steps:
        first, second, *rest = each.command.split()
        assert first == "python"
        path = rest[0].replace(".", "/") + ".py" if second == "-m" else second
        assert (REPO / path).is_file(), f"{each.command}: no {path}"
        for name in each.depends:
            assert (REPO / name).is_file(), f"{each.command}: no {name}"


def test_an_old_python_can_read_the_file_and_says_what_it_wants():
    text = (REPO / "quickstart.py").read_text(encoding="utf-8")
    ast.parse(text, feature_version=(3, 8))
    script = "import sys; sys.version_info = (3, 8, 10); import quickstart as q; q.main()"
    done = subprocess.run([PYTHON, "-X", "utf8", "-c", script], cwd=REPO, capture_output=True)
    assert done.returncode == 1
    (line,) = done.stderr.decode().splitlines()
    assert "Python 3.11" in line


def test_the_constraints_pin_every_requirement():
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", text_of("constraints.txt"), re.MULTILINE))
    n_lines = sum(line[:1] not in ("", "#") for line in text_of("constraints.txt").splitlines())
    assert len(pins) == n_lines
    assert pins["torch"] == "2.13.0"
    assert not [name for name in pins if "nvidia" in name]
    for path in ("requirements.txt", *(f"requirements/{p.name}" for p in requirement_files())):
        for line in re.findall(r"^\w.*$", text_of(path), re.MULTILINE):
            wanted = Requirement(line)
            pin = pins.get(canonicalize_name(wanted.name))
            assert pin and pin in wanted.specifier, f"{path}: {line} has the pin {pin}"


def requirement_files() -> list[Path]:
    return sorted((REPO / "requirements").glob("*.txt"))


def text_of(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")
