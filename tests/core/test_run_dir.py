"""A run's directory: one run at a time, the same config, and no trace of those that died."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import yaml

from babyllama.config import REPO
from babyllama.distributed import World
from babyllama.errors import ConfigError
from babyllama.optim import OptimConfig
from babyllama.run_dir import lock, open_run
from babyllama.scoring.test_sets import beside
from conftest import contents, write_run

WORLD = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Settings:
    name: str = "x"
    optim: OptimConfig = field(default_factory=OptimConfig)


def test_a_second_run_in_a_directory_is_refused_in_one_line(
    tmp_path, token_root, tokenizer, script
):
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer, max_steps=1)
    assert script("pretrain.py", "--config", config).code == 0
    assert not (tmp_path / "run/lock.txt").exists()
    with lock(tmp_path / "run"):
        before = contents(tmp_path)
        for _ in range(5):
            found = script("pretrain.py", "--config", config)
            assert "run is in use" in found.error and f"process {os.getpid()} on" in found.error
            assert len(found.err.splitlines()) == 1
        assert contents(tmp_path) == before
    assert script("pretrain.py", "--config", config).code == 0


def in_a_fork(act: Callable[[], object]) -> int:
    """Act in another process; its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except ConfigError:
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_lock_of_a_dead_process_does_not_block(tmp_path):
    def hold_and_die() -> None:
        with lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    def take() -> None:
        with lock(tmp_path):
            pass

    for _ in range(5):
        assert in_a_fork(hold_and_die) == -signal.SIGKILL
        assert (tmp_path / "lock.txt").exists()  # what it left says nothing
        with lock(tmp_path):
            assert str(os.getpid()) in (tmp_path / "lock.txt").read_text()
            assert in_a_fork(take) == 2
        assert in_a_fork(take) == 0


def test_a_failure_in_the_main_process_ends_the_others_without_a_word():
    def fail() -> None:
        raise ConfigError("wrong")

    with pytest.raises(ConfigError, match="wrong"):
        WORLD.on_main(fail)

    class Other(World):
        def any(self, flag: bool, patient: bool = False) -> bool:
            assert patient and not flag
            return True  # as the main process reports it

    with pytest.raises(SystemExit) as end:
        Other(1, 2, torch.device("cpu")).on_main(fail)
    assert end.value.code == 2


def test_a_setting_that_a_saved_config_does_not_know_yet_is_taken_at_its_default(tmp_path):
    with open_run(str(tmp_path), Settings(), WORLD) as run:
        saved = yaml.safe_load((run / "config.yaml").read_text())
        with pytest.raises(ConfigError, match="in use"), lock(run):
            pass  # held until the block ends
    del saved["optim"]["beta1"], saved["name"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with open_run(str(tmp_path), Settings(), WORLD):
        pass
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    changed = Settings(optim=OptimConfig(beta1=0.5))
    with (
        pytest.raises(ConfigError, match=r"optim\.beta1: saved 0\.9, now 0\.5"),
        open_run(str(tmp_path), changed, WORLD),
    ):
        pass
    with lock(tmp_path):  # a refusal holds nothing
        pass


def test_a_setting_that_is_no_more_is_passed_over_where_the_run_has_not_used_it(tmp_path):
    with open_run(str(tmp_path), Settings(), WORLD):
        saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for ema in (0.0, 0.9):
        old = {**saved, "optim": {**saved["optim"], "ema": ema}, "dpo_nll": 0.0, "regularise": None}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
        refused = pytest.raises(ConfigError, match=r"optim\.ema: saved 0\.9, now None")
        with (
            refused if ema else contextlib.nullcontext(),
            open_run(str(tmp_path), Settings(), WORLD),
        ):
            pass


MUTATIONS = {
    "train.batch_size": 3, "model.dim": 64, "model.n_layers": 3, "model.n_heads": 2,
    "model.n_kv_heads": 2, "model.multiple_of": 32, "model.max_seq_len": 64,
    "model.rope_theta": 500.0, "model.norm_eps": 1e-6, "model.tied": True,
}  # fmt: skip


def test_every_setting_that_differs_from_the_run_is_named(tmp_path, token_root, tokenizer, script):
    """Before memory is taken for a model; some alone, then all together with a line for each."""
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer, max_steps=1)
    assert script("pretrain.py", "--config", config).code == 0
    flags = {name: f"--{name}={str(value).lower()}" for name, value in MUTATIONS.items()}
    for name in ("model.rope_theta", "train.batch_size"):
        found = script("pretrain.py", "--config", config, flags[name])
        assert found.code == 2 and f"  {name}: saved" in found.err
    found = script("pretrain.py", "--config", config, *flags.values())
    assert found.code == 2
    assert [line.split(":")[0].strip() for line in found.err.splitlines()[1:]] == list(MUTATIONS)
    # A width of which one matrix would take four terabytes.
    found = script("pretrain.py", "--config", config, "--model.dim", 2**20)
    assert found.code == 2 and "  model.dim: saved 32, now 1048576" in found.err


def test_reports_go_to_the_run_and_never_to_the_repository_itself(tmp_path):
    assert beside(tmp_path / "run/step-000007") == tmp_path / "run"
    assert beside(REPO / "out/run/best") == REPO / "out/run"
    assert beside(REPO / "release") == REPO / "out"


def test_a_holder_whose_name_is_in_another_encoding_is_still_named(tmp_path):
    with lock(tmp_path):
        (tmp_path / "lock.txt").write_bytes("process 1 on 张三的电脑".encode("gbk"))
        with pytest.raises(ConfigError, match=r"is in use \(process 1 on "), lock(tmp_path):
            pass


def test_a_config_that_stays_the_same_is_not_written_again(tmp_path):
    with open_run(str(tmp_path), Settings(), WORLD) as run:
        before = (run / "config.yaml").stat()
    with open_run(str(tmp_path), Settings(), WORLD) as run:
        assert (run / "config.yaml").stat() == before
