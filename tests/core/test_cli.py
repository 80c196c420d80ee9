"""The command line: settings in, one clear line and exit code 2 where they are wrong.

The scripts run in this process, from first to last line (`script`).
"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import yaml

import sft
from babyllama.config import REPO, from_repo, parse, plain, run, shown, to_yaml
from babyllama.errors import CheckpointError, ConfigError, DataError
from babyllama.log import read_metrics
from babyllama.optim import OptimConfig
from babyllama.run_dir import list_checkpoints
from babyllama.sources import SourceConfig
from conftest import contents, write_run
from pretrain import PretrainConfig
from sft import SftConfig, resolve
from tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path: Path, token_root: Path, tokenizer: Tokenizer) -> Path:
    return write_run(tmp_path / "run.yaml", token_root, tokenizer)


ABSENT = "mps" if torch.cuda.is_available() else "cuda"
WRONG_FLAGS = {
    "unknown": (["--optim.speed", "3"], "optim.speed"),
    "unknown section": (["--optimizer.lr", "3"], "optimizer.lr"),
    "text for a number": (["--optim.lr", "fast"], "optim.lr"),
    "fraction for a whole number": (["--model.n_layers", "2.5"], "model.n_layers"),
    "no such choice": (["--device.device", "tpu"], "device.device"),
    "no value": (["--optim.lr"], "optim.lr"),
    "a stray word": (["quickly"], "quickly"),
    "sizes that contradict": (["--model.n_heads", "5"], "dim 32 must be n_heads 5 times"),
    "heads that contradict": (["--model.n_kv_heads", "3"], "n_kv_heads 3"),
    "another vocabulary": (["--model.vocab_size", "77"], "model.vocab_size is 77"),
    "no layer": (["--model.n_layers", "0"], "at least 1"),
    "a batch of nothing": (["--train.batch_size", "0"], "train.batch_size wants 1 or more"),
    "a negative seed": (["--train.seed=-1"], "train.seed wants 0 or more"),
    "no length": (["--train.max_steps", "0", "--train.epochs", "0"], "train.epochs wants"),
    "a rate below 0": (["--optim.lr=-1"], "optim.lr"),
    "a beta above 1": (["--optim.beta1", "1.5"], "optim.beta1"),
    "no such device": (["--device.device", ABSENT], f"{ABSENT!r} is not available"),
    "a source of weight 0": (["--data.sources", "[{name: a, weight: 0}]"], "weight 0"),
    "a source without a name": (["--data.sources", "[{weight: 1}]"], "name"),
    "no validation": (["--data.max_val_rows", "0"], "data.max_val_rows"),
    "no sources": (["--data.sources", "[]"], "data.sources is empty"),
    "no such config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "a directory for a config": (["--config", "configs"], "configs"),
}


@pytest.mark.parametrize("wrong", WRONG_FLAGS)
def test_wrong_flags_are_one_line_and_change_no_file(wrong, config, tmp_path, script):
    flags, words = WRONG_FLAGS[wrong]
    before = contents(tmp_path)
    found = script("pretrain.py", "--config", config, *flags)
    assert words in found.error
    assert found.out == "" and len(found.err.splitlines()) == 1
    assert contents(tmp_path) == before


WRONG_YAML = {
    "no YAML": "optim: {lr: 1\n",
    "tabs": "optim:\n\tlr: 1\n",
    "a list": "- 1\n- 2\n",
    "a text": "hello\n",
    "empty": "",
    "unknown section": "optimizer: {lr: 1}\n",
    "unknown setting": "optim: {speed: 1}\n",
    "wrong type": "optim: {lr: [1]}\n",
    "wrong section": "model: 3\n",
    "list for a section": "train: [1, 2]\n",
    "null for a section": "optim: null\n",
    "misspelt source": "data: {sources: [{nam: x}]}\n",
    "text for sources": "data: {sources: wiki}\n",
    "no such file inside": "model: nowhere.yaml\n",
    "a name that is none": "name: [1]\n",
    "a tag that does not fit": "name: !!int x\n",
    "too many digits": "train: {seed: " + "1" * 5000 + "}\n",
    "a tag of another kind": "name: !!timestamp {}\n",
    "no angle": "model: {rope_theta: 0}\n",
}


@pytest.mark.parametrize("wrong", WRONG_YAML)
def test_a_wrong_config_file_is_one_line(wrong, config, tmp_path, script):
    (tmp_path / "wrong.yaml").write_text(WRONG_YAML[wrong])
    before = contents(tmp_path)
    found = script("pretrain.py", "--config", config, "--config", tmp_path / "wrong.yaml")
    assert found.error and len(found.err.splitlines()) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_a_config_that_is_not_utf8_is_said(encoding, config, tmp_path, script):
    (tmp_path / "wrong.yaml").write_bytes("name: 维基\n".encode(encoding))
    found = script("pretrain.py", "--config", config, "--config", tmp_path / "wrong.yaml")
    assert "UTF-8" in found.error


def test_a_missing_setting_is_named(tmp_path, script):
    (tmp_path / "run.yaml").write_text("tokenizer: x.model\n")
    assert "required: name" in script("pretrain.py", "--config", tmp_path / "run.yaml").error


def printed(script: Callable, *argv: object) -> dict:
    found = script(*argv, "--print_config")
    assert found.code == 0 and found.err == ""
    return yaml.safe_load(found.out)


def test_later_settings_win_over_earlier_ones(config, tmp_path, script):
    (tmp_path / "more.yaml").write_text("optim: {lr: 0.5}\ntrain: {seed: 4}\n")
    more = ("--config", tmp_path / "more.yaml")
    start = ("pretrain.py", "--config", config)
    assert printed(script, *start)["optim"]["lr"] == 0.01
    assert printed(script, *start, *more)["optim"]["lr"] == 0.5
    assert printed(script, *start, *more, "--optim.lr", "2e-3")["optim"]["lr"] == 0.002
    assert printed(script, *start, "--optim.lr", "2e-3", *more)["optim"]["lr"] == 0.5
    both = printed(script, *start, *more, "--train.keep=7")
    assert (both["train"]["seed"], both["train"]["keep"]) == (4, 7)
    assert both["optim"]["warmup_steps"] == 2  # what nobody changed


def test_a_later_list_takes_the_place_of_an_earlier_one():
    flags = ["--data.sources", "[{name: x, weight: 5}]", "--data.sources", "[{name: y}]"]
    assert parse(SftConfig, "", flags).data.sources == (SourceConfig("y", weight=1.0),)


def test_numbers_may_be_written_as_people_write_them(config, script):
    for text, value in (("1e-4", 1e-4), ("1E-4", 1e-4), (".5", 0.5), ("3", 3.0)):
        found = printed(script, "pretrain.py", "--config", config, "--optim.lr", text)
        assert found["optim"]["lr"] == value


@pytest.mark.parametrize("name", ["pretrain.py", "sft.py"])
def test_a_printed_config_is_read_back_as_itself(name, config, tmp_path, script):
    flags = ["--config", config] if name == "pretrain.py" else ["--data.sources", "[{name: a}]"]
    first = script(name, *flags, "--optim.lr", "3e-4", "--print_config").out
    (tmp_path / "printed.yaml").write_text(first)
    assert script(name, "--config", tmp_path / "printed.yaml", "--print_config").out == first


COMMITTED = [*REPO.glob("configs/pretrain/*"), *REPO.glob("configs/sft/*")]


@pytest.mark.parametrize(
    "path", sorted(path for path in COMMITTED if path.stem != "datasets"), ids=shown
)
def test_a_committed_config_is_read_and_survives_a_round_trip(path, tmp_path):
    kind = {"pretrain": PretrainConfig, "sft": SftConfig}[path.parent.name]
    cfg = parse(kind, "", ["--config", str(path)])
    (tmp_path / "again.yaml").write_text(to_yaml(cfg), "utf-8")
    assert plain(parse(kind, "", ["--config", str(tmp_path / "again.yaml")])) == plain(cfg)


def settings_of(config_class: type, prefix: str = "") -> list[str]:
    names = []
    for entry in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(entry.type):
            names += settings_of(entry.type, f"{prefix}{entry.name}.")
        else:
            names.append(prefix + entry.name)
    return names


@pytest.mark.parametrize("name, kind", [("pretrain.py", PretrainConfig), ("sft.py", SftConfig)])
def test_help_explains_every_setting(name, kind, script):
    found = script(name, "--help")
    assert found.code == 0 and found.err == ""
    assert "Ctrl-C saves first" in found.out  # the script's own words
    options = found.out.partition("\noptions:")[2]
    for setting in settings_of(kind):
        explained = options.partition(f"\n  --{setting} ")[2].split("\n  --")[0]
        words = explained.partition("(")[0].split()
        assert len([word for word in words if word.islower()]) >= 2, setting


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run=true"])
def test_a_dry_run_estimates_and_writes_nothing(flag, config, tmp_path, script):
    before = contents(tmp_path)
    found = script("pretrain.py", "--config", config, flag)
    assert found.code == 0 and found.err == ""
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()
    for words in ("53,664 parameters", "GB, computed", "10 steps of", "tokens/s", "hours"):
        assert words in found.out


def test_scripts_work_from_another_directory(config, tmp_path, tokenizer, script, monkeypatch):
    """Paths are taken from the working directory, and those of the project from its root."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    settings = yaml.safe_load(config.read_text())
    settings["tokenizer"] = "../here.model"
    settings["data"]["sources"] = [{"name": "../tokens/text"}]
    (elsewhere / "here.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "here.model").write_bytes(tokenizer.bytes)
    monkeypatch.chdir(elsewhere)
    assert script("pretrain.py", "--config=here.yaml", "--train.max_steps", "1").code == 0
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000001"]
    assert [p.name for p in elsewhere.iterdir()] == ["here.yaml"]
    assert printed(script, "sft.py", "--config=configs/sft/csl.yaml")["dataset"] == "csl"


def test_a_path_is_looked_for_here_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert from_repo("configs/sft") == REPO / "configs/sft"
    (tmp_path / "configs").mkdir()
    assert from_repo("configs") == Path("configs")
    assert from_repo(tmp_path) == tmp_path
    assert from_repo("~/x") == Path.home() / "x"
    assert (shown(REPO / "a/b"), shown(Path("/a/b"))) == ("a/b", "/a/b")


OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 5.80 GiB of "
    "which 9.00 MiB is free. Including non-PyTorch memory, this process has 5.00 GiB in use."
)


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ConfigError("no such thing"), 2, "error: no such thing"),
        (DataError("bad row"), 2, "error: bad row"),
        (CheckpointError("cut"), 2, "error: cut"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "(/x/y): Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device; free some space"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError(OUT_OF_MEMORY), 2, "5.80 GiB of which 9.00 MiB is free; take few"),
    ],
)
def test_an_error_becomes_a_line_and_an_exit_code(error, code, words, capfd):
    def fail() -> int:
        raise error

    with pytest.raises(SystemExit) as end:
        run(fail)
    err = capfd.readouterr().err
    assert end.value.code == code
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("returned, code", [(None, 0), (0, 0), (3, 3), (75, 75)])
def test_what_a_script_returns_is_its_exit_code(returned, code):
    with pytest.raises(SystemExit) as end:
        run(lambda: returned)
    assert end.value.code == code


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


@dataclass(frozen=True)
class Talk:
    """Settings of a script with a leading argument.

    Args:
        place: where to look
        optim: a section
    """

    place: Path | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)


def test_leading_arguments_are_settings_too():
    assert parse(Talk, "", ["out/x"], positional=["place"]).place == Path("out/x")
    assert parse(Talk, "", ["--optim.lr", "2"], positional=["place"]) == Talk(
        None, OptimConfig(lr=2.0)
    )


def test_a_set_brings_its_config_and_flags_win_over_it(script):
    csl = ["--config", str(REPO / "configs/sft/csl.yaml")]
    assert sft.settings_of(["--dataset", "csl"]) == sft.settings_of(["--dataset=csl:2,moss"]) == csl
    assert "--train.batch_size=128" in sft.settings_of(["--dataset", "moss"])
    for words in ("", "--dataset", "--dataset nowhere", "--name csl", "--dataset datasets",
                  "--config x.yaml --dataset csl"):  # fmt: skip
        assert sft.settings_of(words.split()) == []
    for name in ("csl", "moss"):
        found = printed(script, "sft.py", "--dataset", name, "--train.epochs", "2.5")
        assert found["dataset"] == name and found["train"]["epochs"] == 2.5
        assert found["train"]["batch_size"] == {"csl": 64, "moss": 128}[name]


def test_a_run_takes_the_name_of_its_set(tmp_path):
    """A directory of token files is never taken for the run's own."""
    for dataset, name in (("redgpt", "redgpt"), (str(tmp_path / "tokens/chat"), "chat")):
        cfg = resolve(SftConfig(dataset=dataset, base=tmp_path))
        assert (cfg.name, cfg.data.sources[0].name) == (name, dataset)
    assert resolve(SftConfig(dataset="redgpt", name="mine", base=tmp_path)).name == "mine"


SFT_FAULTS = {
    "nothing to train on": ([], "nothing to train on"),
    "no name": (["--data.sources", "[{name: x}]"], "no name"),
    "no such base": (["--dataset", "sample", "--base", "out/nowhere"], "out/nowhere"),
    "a file for a base": (["--dataset", "sample", "--base", "README.md"], "no such checkpoint"),
}


@pytest.mark.parametrize("fault", SFT_FAULTS)
def test_sft_says_what_it_lacks(fault, script):
    flags, words = SFT_FAULTS[fault]
    assert words in script("sft.py", *flags).error


def test_training_goes_from_base_to_chat_and_on_and_takes_the_shape_of_the_base(
    config, tmp_path, token_root, script
):
    """Pretraining, pretraining continued on other data, fine-tuning, fine-tuning continued."""
    short = ("--train.max_steps", "1")
    assert script("pretrain.py", "--config", config, *short).code == 0
    base = tmp_path / "run"
    more = ("--model.dim", "64", "--name", tmp_path / "more", "--base", base, "--train.seed", "5")
    assert script("pretrain.py", "--config", config, *short, *more).code == 0
    saved = yaml.safe_load((tmp_path / "more/config.yaml").read_text())
    assert saved["model"]["dim"] == 32 and saved["base"] == str(base)
    # Both evaluate the same weights on the same rows.
    last = [r["loss"] for r in read_metrics(base) if r["kind"] == "val"][-1]
    first = next(r["loss"] for r in read_metrics(tmp_path / "more"))
    assert first == pytest.approx(last, rel=1e-6)

    chat = write_run(tmp_path / "chat.yaml", token_root)
    found = script("sft.py", "--config", chat, *short, "--base", tmp_path / "more")
    assert found.code == 0
    again = ("--base", tmp_path / "chat/step-000001", "--name", tmp_path / "chat2")
    assert script("sft.py", "--config", chat, *short, *again).code == 0
    for name, kind, parent in (("more", "pretrain", "run"), ("chat", "sft", "more")):
        info = yaml.safe_load((list_checkpoints(tmp_path / name)[-1] / "model.yaml").read_text())
        assert (info["kind"], Path(info["parent"]).name) == (kind, parent)
        assert info["model"]["dim"] == 32


@dataclass(frozen=True)
class Inner:
    """Inside.

    Args:
        deep: a switch
    """

    deep: bool = False


@dataclass(frozen=True)
class Switches:
    """Settings.

    Args:
        files: leading words
        from_: a keyword of Python
        dry_run: a switch
        inner: more
    """

    files: tuple[str, ...] = ()
    from_: str = ""
    dry_run: bool = False
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a", "b", "--dry-run"], {"files": ("a", "b"), "dry_run": True}),
        (["--dry_run", "--from", "x"], {"dry_run": True, "from_": "x"}),
        (["--dry-run", "false", "--from=x"], {"from_": "x"}),
        (["--inner.deep", "--from_", "x"], {"inner": Inner(True), "from_": "x"}),
        (["a-b", "--inner.deep=no"], {"files": ("a-b",)}),
    ],
)
def test_switches_stand_alone_and_leading_words_are_a_list(words, wanted):
    assert parse(Switches, "", words, positional=("files",)) == Switches(**wanted)


def test_a_reader_that_has_seen_enough_ends_the_command_quietly():
    code = "from babyllama.config import run\nrun(lambda: [print(n) for n in range(10**6)] and 0)"
    command = f"{sys.executable} -c '{code}' | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")  # and it is no success


def test_an_error_that_nobody_can_read_still_gives_its_code():
    code = "from babyllama.config import run\ndef f(): raise OSError(28, 'full')\nrun(f)"
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, stderr=write_end)
    os.close(write_end)
    assert done.returncode == 2
