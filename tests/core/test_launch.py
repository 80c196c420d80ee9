"""A command that dies is started again, as often as was said, and what ended for good is not.

The last tests kill one of two training processes: the job ends, goes on, and comes to the same
weights as if nothing had happened.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from babyllama.config import REPO
from babyllama.run_dir import list_checkpoints
from conftest import Outcome, write_run, write_token_files
from tokenizer import Tokenizer

# Notes that it was started, and ends with the next of the codes it was given.
PROGRAM = """
import os, sys
from pathlib import Path
log = Path(sys.argv[1])
codes = sys.argv[2].split(",")
number = len(log.read_text()) if log.exists() else 0
log.write_text("x" * (number + 1))
code = int(codes[min(number, len(codes) - 1)])
os.kill(os.getpid(), -code) if code < 0 else os._exit(code)
"""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., tuple[Outcome, int]]:
    """Supervises a program with these exit codes; what was said, and how often it was started."""

    def call(codes: str, *options: str) -> tuple[Outcome, int]:
        (tmp_path / "log").unlink(missing_ok=True)
        found = subprocess.run(
            [sys.executable, "-m", "babyllama.analysis.supervise", *options, "--",
             sys.executable, "-c", PROGRAM, tmp_path / "log", codes],
            cwd=REPO, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return Outcome(found.returncode, found.stdout, found.stderr), len(
            (tmp_path / "log").read_text()
        )

    return call


@pytest.mark.parametrize(
    "codes, ends, starts",
    [
        ("0", 0, 1),
        ("2", 2, 1),
        ("75", 75, 1),
        ("130", 130, 1),
        ("1,3,0", 0, 3),
        ("-9,-11,75", 75, 3),
        ("1", 1, 4),
        ("-9", 137, 4),
    ],
)
def test_what_dies_is_started_again_and_what_ended_for_good_is_not(codes, ends, starts, launch):
    found, n_starts = launch(codes, "--retries", "3", "--min-uptime", "0")
    assert (found.code, n_starts) == (ends, starts), found.err
    assert found.err.count("launch: again") == starts - 1


def test_what_breaks_at_once_is_not_started_again(launch):
    found, n_starts = launch("1", "--min-uptime", "60")
    assert (found.code, n_starts) == (1, 1)
    assert "sooner than 60 s" in found.err


def test_mistakes_are_one_line(launch):
    base = [sys.executable, "-m", "babyllama.analysis.supervise"]
    for words, said in (
        ([], "nothing to start"),
        (["--", "/no/such/program"], "cannot start '/no/such/program'"),
        (["--retries=-1", "--", "true"], "retries and min_uptime want 0 or more"),
        (["--retriez=1", "--", "true"], "retriez"),
    ):
        found = subprocess.run([*base, *words], cwd=REPO, capture_output=True, text=True)
        assert said in Outcome(found.returncode, found.stdout, found.stderr).error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_handed_on_once_and_ends_the_retries(number, tmp_path):
    program = (
        "import signal, sys, time\n"
        "def stop(number, _):\n    print('got', number, flush=True); sys.exit(1)\n"
        "for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(kind, stop)\n"
        "print('ready', flush=True)\nwhile True: time.sleep(0.01)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "babyllama.analysis.supervise", "--min-uptime", "0", "--",
         sys.executable, "-c", program],
        cwd=REPO, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=30)[0] == f"got {int(number)}\n"
    assert process.returncode == 1


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def command(root: Path, name: str, tokenizer: Tokenizer, n_steps: int) -> list[str]:
    """A run of two processes that saves each step."""
    train = {"max_steps": n_steps, "eval_every": 10, "save_every": 1}
    config = write_run(root / f"{name}.yaml", root / "tokens", tokenizer, **train)
    return [*TORCHRUN, str(REPO / "pretrain.py"), "--config", str(config)]


def training(parent: int) -> list[psutil.Process]:
    """The training processes below another."""
    return [
        child
        for child in psutil.Process(parent).children(recursive=True)
        if any(word.endswith("pretrain.py") for word in child.cmdline())
        and "torch.distributed.run" not in child.cmdline()
    ]


def kill_ranks(root: Path, tokenizer: Tokenizer, n_kills: int, seed: int) -> None:
    """Kill one of two processes at random moments under a supervisor, as often as was said, and
    compare what comes out with a run that nobody disturbed."""
    write_token_files(root, tokenizer)
    straight = subprocess.run(
        command(root, "straight", tokenizer, 10 * n_kills), capture_output=True, text=True
    )
    assert straight.returncode == 0, straight.stderr
    assert straight.stderr.count("2 process(es) on cpu") == 1  # one of them speaks
    chance = random.Random(seed)
    kills, killed_at, slowest, said = 0, 0.0, 0.0, ""
    alive = False  # whether the launch that writes these lines was not killed yet
    with subprocess.Popen(
        [sys.executable, "-m", "babyllama.analysis.supervise", "--retries", str(n_kills),
         "--min-uptime", "0",
         "--", *command(root, "killed", tokenizer, 10 * n_kills)],
        cwd=REPO, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        for line in process.stderr:
            said += line
            if line.startswith("launch: ended with"):
                slowest = max(slowest, time.monotonic() - killed_at)
            if "starts: " in line or "continues at" in line:
                alive, steps = True, chance.randrange(1, 6)
            if line.startswith("train step") and alive and kills < n_kills:
                steps -= 1
                if not steps:
                    chance.choice(training(process.pid)).kill()
                    kills, killed_at, alive = kills + 1, time.monotonic(), False
    assert process.returncode == 0, said
    assert kills == n_kills and slowest < 60
    wanted, found = (list_checkpoints(root / name)[-1] for name in ("straight", "killed"))
    assert wanted.name == found.name == f"step-{10 * n_kills:06d}"
    for name in ("model.safetensors", "train_state.safetensors"):
        one, other = load_file(wanted / name), load_file(found / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    print(f"{kills} kills, the slowest job ended after {slowest:.1f} s")


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_a_killed_rank_costs_nothing_but_time(tmp_path, tokenizer):
    kill_ranks(tmp_path, tokenizer, 1, seed=int(time.time()))


# As srun: the command once on every machine, here side by side; where one fails, all end.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
nodes = [subprocess.Popen(words) for _ in range(int(os.environ["SLURM_NNODES"]))]
def hand_on(number, _=None):
    for node in nodes:
        node.send_signal(number)
signal.signal(signal.SIGTERM, hand_on)
code = 0
for _ in nodes:
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status and not code:
        code = status
        hand_on(signal.SIGTERM)
sys.exit(code % 256)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Slurm")
def test_the_slurm_script_trains_on_two_machines_and_outlives_a_killed_process(tmp_path, tokenizer):
    """Slurm is played by a few lines, and its machines are this one twice; the rest is real."""
    write_token_files(tmp_path, tokenizer)
    straight = command(tmp_path, "straight", tokenizer, 40)
    assert subprocess.run(straight, capture_output=True).returncode == 0
    for name, lines in (("srun", SRUN), ("scontrol", "print('127.0.0.1')")):
        (tmp_path / name).write_text(f"#!{sys.executable}\n{lines}")
        (tmp_path / name).chmod(0o755)
    script = (REPO / "configs/slurm/train.sh").read_text("utf-8")
    assert "--retries 10 --" in script and ":29500" in script
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = script.replace("--retries 10 --", "--retries 10 --min-uptime 0 --")
    (tmp_path / "train.sh").write_text(script.replace(":29500", f":{port}"))
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    *_, config = command(tmp_path, "slurm", tokenizer, 40)
    said, killed, stopped = "", False, False

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", tmp_path / "train.sh", "pretrain.py", "--config", config],
            cwd=REPO, stderr=subprocess.PIPE, text=True, env=os.environ | slurm | {"PATH": path},
        )  # fmt: skip

    with start() as process:
        for line in process.stderr:
            said += line
            if line.startswith("train step 5/") and not killed:
                next(p for p in training(process.pid) if "-u" in p.cmdline()).kill()
                killed = True
            if line.startswith("train step 20/") and not stopped:
                process.send_signal(signal.SIGTERM)  # the job's time is nearly over
                stopped = True
    assert "launch: again" in said and said.count("saved; the same command continues") == 1, said
    assert "2 process(es)" in said and process.returncode != 0
    with start() as process:
        said = process.communicate()[1]
    assert process.returncode == 0, said
    wanted, found = (list_checkpoints(tmp_path / name)[-1] for name in ("straight", "slurm"))
    assert wanted.name == found.name == "step-000040"
    one, other = (load_file(path / "model.safetensors") for path in (wanted, found))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_bad_input_ends_both_processes_with_code_2(tmp_path, tokenizer):
    """torchrun itself then ends with 1; what the processes said stands above its report."""
    words = [*command(tmp_path, "wrong", tokenizer, 1), "--optim.lr=-1"]
    found = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert found.returncode == 1
    assert "error: optim.lr wants a number above 0, found -1.0" in found.stderr
    assert "exitcode  : 2" in found.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_ten_killed_ranks_cost_nothing_but_time(tmp_path, tokenizer):
    kill_ranks(tmp_path, tokenizer, 10, seed=0)


def test_a_supervisor_whose_reader_has_gone_goes_on(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "babyllama.analysis.supervise", "--min-uptime", "0", "--",
         sys.executable, "-c", PROGRAM, tmp_path / "log", "1,0"],
        cwd=REPO, stderr=write_end,
    )  # fmt: skip
    os.close(write_end)
    assert (done.returncode, (tmp_path / "log").read_text()) == (0, "xx")
