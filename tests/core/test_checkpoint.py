"""Checkpoints: the same after as before, written atomically, refused when altered or foreign."""

import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from babyllama import run_dir
from babyllama.chat.session import tasks_of
from babyllama.checkpoint import (
    Snapshot,
    checkpoint_bytes,
    load_model,
    load_train_state,
    load_weights,
    require_space,
    save_checkpoint,
)
from babyllama.config import REPO
from babyllama.errors import CheckpointError, ConfigError
from babyllama.lora import LoraConfig, apply_lora
from babyllama.optim import OptimConfig, make_optimizer
from babyllama.run_dir import (
    MODEL_FILES,
    STATE_FILES,
    chosen_run,
    differences,
    find_checkpoint,
    list_checkpoints,
    newest_run,
    verify,
)
from conftest import TEXTS, contents, small_config, write_run
from data_process.vocabulary import train_vocabulary
from export.release import write_small
from model import Transformer
from tokenizer import Tokenizer

TOKENS = torch.arange(3, 67).view(2, 32)
ALL_FILES = (*MODEL_FILES, *STATE_FILES, "checksums.json")


def trained(
    tokenizer: Tokenizer, tied: bool = False, steps: int = 2
) -> tuple[Transformer, torch.optim.AdamW]:
    """A model and its optimizer after a few updates."""
    torch.manual_seed(steps)
    model = Transformer(small_config(tokenizer.vocab_size, tied=tied))
    optimizer = make_optimizer(model, OptimConfig(lr=1e-2))
    for _ in range(steps):
        update(model, optimizer)
    return model, optimizer


def update(model: Transformer, optimizer: torch.optim.AdamW) -> None:
    model(TOKENS, TOKENS).loss_sum.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(run: Path, tokenizer: Tokenizer, step: int = 2, **changes: object) -> Path:
    model, optimizer = trained(tokenizer, steps=2)
    extra = {"tokens": 64 * step, "scaler": {}}
    return save_checkpoint(
        Snapshot(
            run, model, tokenizer, optimizer=optimizer, extra=extra, **{"kind": "sft"} | changes
        ),
        step,
    )


def load_all(path: Path, tokenizer: Tokenizer) -> None:
    """Read every file of a checkpoint, as resuming does."""
    model = Transformer(small_config(tokenizer.vocab_size))
    load_train_state(
        path,
        Snapshot(path, model, tokenizer, "sft", optimizer=make_optimizer(model, OptimConfig())),
    )


def seal(path: Path) -> Path:
    """Make the checksums fit altered files, as whoever alters them on purpose would."""
    sums = json.loads((path / "checksums.json").read_text())
    for name in sums:
        if (path / name).is_file() and not str((path / name).resolve()).startswith("/dev"):
            sums[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "checksums.json").write_text(json.dumps(sums))
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_loaded_is_what_was_saved(tied, tmp_path, tokenizer):
    model, optimizer = trained(tokenizer, tied)
    saved = save_checkpoint(
        Snapshot(
            tmp_path / "run",
            model,
            tokenizer,
            "pretrain",
            "out/other",
            optimizer=optimizer,
            extra={"tokens": 128, "scaler": {"scale": 2.0}},
        ),
        2,
    )
    for path in (saved, tmp_path / "run"):
        loaded = load_model(path)
        assert (loaded.step, loaded.kind, loaded.path) == (2, "pretrain", saved)
        assert loaded.config == model.config and not loaded.model.training
        assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
        assert loaded.tokenizer.name == tokenizer.name
        assert torch.equal(loaded.model(TOKENS), model(TOKENS))
    assert ("output.weight" in load_file(saved / "model.safetensors")) is not tied

    again, other = trained(tokenizer, tied, steps=0)
    torch.rand(5)
    random_state = torch.get_rng_state()
    torch.rand(5)
    state = load_train_state(saved, Snapshot(saved, again, tokenizer, "sft", optimizer=other))
    assert state == {"step": 2, "tokens": 128, "scaler": {"scale": 2.0}}
    assert not torch.equal(torch.get_rng_state(), random_state)
    for _ in range(2):
        update(model, optimizer)
        update(again, other)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_a_checkpoint_states_what_it_was_trained_for(tmp_path, tokenizer):
    model = Transformer(small_config(tokenizer.vocab_size))
    optimizer = make_optimizer(model, OptimConfig())

    def saved(name: str, kind: str = "sft") -> Path:
        return save_checkpoint(
            Snapshot(tmp_path / name, model, tokenizer, kind, optimizer=optimizer), 1
        )

    for kind, usual in (("sft", ("chat", "reference", "title")), ("pretrain", ("continue",))):
        assert tasks_of(saved(kind, kind)) == usual
    model.more_info = {"tasks": ["title", "chat"]}
    path = saved("stated")
    assert tasks_of(path) == ("title", "chat")
    (tmp_path / "int8").mkdir()
    write_small(tmp_path / "int8", load_model(path))
    assert tasks_of(tmp_path / "int8") == ("title", "chat")
    for wrong in (["poems"], "title", [["title"]], 7):
        model.more_info = {"tasks": wrong}
        path = saved("wrong")
        with pytest.raises(CheckpointError, match="tasks"):
            tasks_of(path)


def test_a_model_may_be_loaded_in_another_format(tmp_path, tokenizer):
    loaded = load_model(save(tmp_path, tokenizer), dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}


def test_loading_does_not_wait_for_torchs_compiler(checkpoint):
    """Which takes longer to import than all else that `chat.py --prompt` does before its reply."""
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        f"from babyllama.checkpoint import load_model; load_model({str(checkpoint)!r})\n"
        f"sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_is_pickled(tmp_path, tokenizer):
    path = save(tmp_path, tokenizer)
    assert sorted(p.name for p in path.iterdir()) == sorted(ALL_FILES)
    for file in path.iterdir():
        data = file.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # a zip as torch.save makes it; a pickle
        if file.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            ends = [t["data_offsets"][1] for key, t in header.items() if key != "__metadata__"]
            assert max(ends) == len(data) - 8 - length  # numbers and nothing else
        elif file.suffix == ".json":
            json.loads(data)
        elif file.suffix == ".yaml":
            yaml.safe_load(data)


def test_the_newest_checkpoints_are_kept_and_nothing_else(tmp_path, tokenizer):
    (tmp_path / "tmp-step-000001").mkdir()  # as a kill leaves it
    (tmp_path / "tmp-old-step-000001").mkdir()
    (tmp_path / "step-000009").write_text("a file is no checkpoint")
    for step in (1, 2, 999_999, 1_000_000):
        save(tmp_path, tokenizer, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    assert find_checkpoint(tmp_path).name == "step-1000000"
    assert not list(tmp_path.glob("tmp-*"))
    save(tmp_path, tokenizer, 2_000_000, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-2000000"]


def test_the_youngest_run_is_the_newest_of_its_kind(tmp_path, tokenizer):
    assert newest_run(tmp_path) is None
    for age, (name, kind) in enumerate([("a", "sft"), ("b", "pretrain"), ("c", "sft")]):
        path = save(tmp_path / name, tokenizer, step=10 - age, kind=kind)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "empty").mkdir()
    assert newest_run(tmp_path) == newest_run(tmp_path, "sft") == tmp_path / "a"
    assert newest_run(tmp_path, "pretrain") == tmp_path / "b"
    assert newest_run(tmp_path / "a") is None


def flip(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def refuse_damage(
    harm: Callable[[bytes, random.Random], bytes], tries: int, run: Path, tokenizer: Tokenizer
) -> None:
    save(run, tokenizer, step=1)
    path = save(run, tokenizer, step=2)
    load_all(path, tokenizer)
    chance = random.Random(tries)
    for number in range(tries):
        file = path / ALL_FILES[number % len(ALL_FILES)]
        whole = file.read_bytes()
        file.write_bytes(harm(whole, chance))
        with pytest.raises(CheckpointError, match=r"checksum.*delete it; use .*step-000001"):
            load_all(path, tokenizer)
        if file.name in MODEL_FILES:
            with pytest.raises(CheckpointError, match=file.name):
                load_model(run)
        file.write_bytes(whole)
    load_all(path, tokenizer)


def test_a_flipped_bit_is_refused(tmp_path, tokenizer):
    refuse_damage(flip, 60, tmp_path, tokenizer)


def test_a_cut_file_is_refused(tmp_path, tokenizer):
    refuse_damage(cut, 30, tmp_path, tokenizer)


@pytest.mark.slow
def test_each_of_500_flipped_bits_is_refused(tmp_path, tokenizer):
    refuse_damage(flip, 500, tmp_path, tokenizer)


@pytest.mark.slow
def test_each_of_300_cuts_is_refused(tmp_path, tokenizer):
    refuse_damage(cut, 300, tmp_path, tokenizer)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_named(name, tmp_path, tokenizer):
    path = save(tmp_path, tokenizer)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}.*no older one"):
        load_all(path, tokenizer)


def test_what_is_no_checkpoint_is_refused(tmp_path, checkpoint):
    for path, words in [
        (tmp_path / "nowhere", "no such checkpoint"),
        (checkpoint / "model.yaml", "no such checkpoint"),
        (tmp_path, "no complete checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            load_model(path)


def test_another_tokenizer_is_refused(tmp_path, tokenizer):
    path = save(tmp_path / "run", tokenizer)
    for size, texts in ((400, TEXTS), (420, [text[::-1] for text in TEXTS])):
        file = tmp_path / f"{size}.model"
        train_vocabulary(texts * 5, file, size)
        with pytest.raises(CheckpointError, match="trained with another tokenizer"):
            load_all_with(path, tokenizer, Tokenizer(file))
        shutil.copy(file, path / "tokenizer.model")
        with pytest.raises(CheckpointError, match=r"checksum in tokenizer\.model"):
            load_model(path)
        seal(path)
        with pytest.raises(CheckpointError, match=rf"model \(vocabulary size {size},.* size 420"):
            load_model(path)
        (path / "tokenizer.model").write_bytes(tokenizer.bytes)
        seal(path)


def load_all_with(path: Path, shape: Tokenizer, tokenizer: Tokenizer) -> None:
    model = Transformer(small_config(shape.vocab_size))
    load_train_state(
        path,
        Snapshot(path, model, tokenizer, "sft", optimizer=make_optimizer(model, OptimConfig())),
    )


def test_weights_that_do_not_fit_are_named_with_their_shapes(tmp_path, tokenizer):
    model, _ = trained(tokenizer)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights.pop("layers.1.ffn_norm.weight")
    weights["layers.7.ffn_norm.weight"] = torch.ones(32)
    weights["norm.weight"] = torch.ones(31)
    with pytest.raises(CheckpointError) as error:
        load_weights(model, weights, tmp_path)
    for words in (
        "layers.1.ffn_norm.weight: wanted (32,), found None",
        "layers.7.ffn_norm.weight: wanted None, found (32,)",
        "norm.weight: wanted (32,), found (31,)",
    ):
        assert words in str(error.value)


def set_shape(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        info = yaml.safe_load((path / "model.yaml").read_text())
        info["model"] |= changes
        (path / "model.yaml").write_text(yaml.safe_dump(info))

    return change


def write(name: str, data: str | bytes) -> Callable[[Path], None]:
    data = data.encode() if isinstance(data, str) else data
    return lambda path: (path / name).write_bytes(data) and None


def link(name: str, target: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        (path / name).symlink_to(target)

    return change


def pipe(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return change


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("exploded"),))


def pickled(path: Path) -> None:
    torch.save({"x": _Bomb()}, path / "model.safetensors")
    (path / "model.pt").write_bytes(pickle.dumps(_Bomb()))


def change_tensors(
    name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / name)
        change(tensors)
        save_file(tensors, path / name)

    return apply


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


WEIGHTS, STATE = "model.safetensors", "train_state.safetensors"
OVERLAP = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'  # noqa: E501
MALICE = {
    "header of an exabyte": write(WEIGHTS, header("{}", 2**60)),
    "header over the limit": write(WEIGHTS, header("{}", 100_000_001) + b" " * 1000),
    "header that is no JSON": write(WEIGHTS, header("{{{{")),
    "tensors beyond the end": write(WEIGHTS, header(OVERLAP)),
    "tensors that overlap": write(WEIGHTS, header(OVERLAP) + bytes(8)),
    "no tensor": write(WEIGHTS, header("{}")),
    "an empty file": write(WEIGHTS, b""),
    "a pickle": pickled,
    "a bare pickle": write(WEIGHTS, pickle.dumps(_Bomb())),
    "a pickle for a shape": write("model.yaml", pickle.dumps(_Bomb())),
    "a pickle for a tokenizer": write("tokenizer.model", pickle.dumps(_Bomb())),
    "a pickle for an optimizer": write(STATE, pickle.dumps(_Bomb())),
    "a pickle for the training state": write("train_state.json", pickle.dumps(_Bomb())),
    "a link to a device": link(WEIGHTS, "/dev/zero"),
    "a link to another file": link(WEIGHTS, "/etc/passwd"),
    "a link to nowhere": link("model.yaml", "/nowhere"),
    "a link to itself": link("tokenizer.model", "tokenizer.model"),
    "a pipe": pipe("tokenizer.model"),
    "checksums that are a list": write("checksums.json", "[1]"),
    "checksums nested deeply": write("checksums.json", "[" * 100_000),
    "weights of a strange name": change_tensors(
        WEIGHTS, lambda t: t.update({"../../x": torch.ones(1)})
    ),
    "a missing weight": change_tensors(WEIGHTS, lambda t: t.pop("norm.weight")),
    "a weight of another shape": change_tensors(
        WEIGHTS, lambda t: t.update({"norm.weight": torch.ones(3)})
    ),
    "weights of the same size and another shape": change_tensors(
        WEIGHTS, lambda t: t.update({"norm.weight": t["norm.weight"].view(2, 16)})
    ),
    "yaml that is a list": write("model.yaml", "- 1"),
    "yaml that is empty": write("model.yaml", ""),
    "yaml that is none": write("model.yaml", "a: [b\nc"),
    "yaml that is not UTF-8": write("model.yaml", b"kind: \xff"),
    "yaml with a command": write("model.yaml", "!!python/object/apply:os.system [touch exploded]"),
    "yaml nested deeply": write("model.yaml", "[" * 5000),
    "yaml without a shape": write("model.yaml", "kind: sft\nstep: 1\n"),
    "an unknown setting": set_shape(n_experts=8),
    "a text for a number": set_shape(dim="32"),
    "a fraction": set_shape(dim=32.0),
    "a list": set_shape(n_heads=[4]),
    "null": set_shape(n_layers=None),
    "sizes that contradict": set_shape(n_heads=5),
    "a negative size": set_shape(n_layers=-1),
    "another width": set_shape(dim=64),
    "a billion layers": set_shape(n_layers=10**9),
    "a huge width": set_shape(dim=2**40, n_heads=2),
    "an endless context": set_shape(max_seq_len=10**12),
    "another vocabulary": set_shape(vocab_size=421),
    "no vocabulary": set_shape(vocab_size=0),
    "training state that is a list": write("train_state.json", "[]"),
    "training state without a step": write("train_state.json", '{"tokens": 1, "scaler": {}}'),
    "training state nested deeply": write("train_state.json", "[" * 100_000),
    "a step that is a text": write("train_state.json", '{"step": "x", "tokens": 1, "scaler": {}}'),
    "no random state": change_tensors(STATE, lambda t: t.pop("rng")),
    "a short random state": change_tensors(STATE, lambda t: t.update(rng=t["rng"][:9].clone())),
    "an optimizer of another model": change_tensors(
        STATE, lambda t: t.update({"other:exp_avg": torch.ones(3)})
    ),
    "an optimizer of another shape": change_tensors(
        STATE, lambda t: t.update({"norm.weight:exp_avg": torch.ones(3)})
    ),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("malice", MALICE)
def test_a_malicious_checkpoint_is_refused_and_runs_nothing(
    malice, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "run", tokenizer)
    MALICE[malice](path)
    if "checksums" not in malice:
        seal(path)
    of_state = "training state" in malice or "random" in malice or "optimizer" in malice
    with pytest.raises((CheckpointError, ConfigError)) as error:
        if of_state or malice == "a step that is a text":
            load_all(path, tokenizer)
        else:
            load_model(path)
    assert "step-000002" in str(error.value)
    assert len(str(error.value)) < 2000 and "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_context_that_would_take_the_memory_is_refused(checkpoint):
    """Whatever the width of a head, and before the weights are compared."""
    for width, length in ((32, 2**23), (8192, 2**15)):
        set_shape(dim=width, n_heads=1, max_seq_len=length)(checkpoint)
        with pytest.raises(CheckpointError, match=f"max_seq_len {length} with heads {width} wide"):
            load_model(seal(checkpoint))


def test_a_link_to_a_checkpoint_may_be_used_and_is_all_that_is_deleted(tmp_path, tokenizer):
    elsewhere = save(tmp_path / "elsewhere", tokenizer, step=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/step-000001").symlink_to(elsewhere)
    assert load_model(tmp_path / "run").step == 1
    save(tmp_path / "run", tokenizer, step=2, keep=1)
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-000002"]
    verify(elsewhere, MODEL_FILES + STATE_FILES)


def killed_at(number: int, act: Callable[[], object]) -> bool:
    """Act in another process that is killed before its n-th use of the file system; whether it
    got so far."""
    child = os.fork()
    if child == 0:
        left = number

        def count(event: str, _: tuple) -> None:
            nonlocal left
            left -= event.startswith(("open", "os.", "shutil."))
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_anywhere_while_saving_leaves_whole_checkpoints(tmp_path, tokenizer):
    """Every use of the file system in turn: the new checkpoint is whole or not there, the one
    before it is there, and the next save cleans up."""
    run = tmp_path / "run"
    for step in (1, 2):
        save(run, tokenizer, step)
    before = shutil.copytree(run, tmp_path / "before")
    model, optimizer = trained(tokenizer)
    extra = {"tokens": 0, "scaler": {}}

    def save_third() -> Path:
        return save_checkpoint(
            Snapshot(run, model, tokenizer, "sft", optimizer=optimizer, extra=extra), 3
        )

    kills = 0
    while killed_at(kills + 1, save_third):
        kills += 1
        names = [path.name for path in list_checkpoints(run)]
        assert names[-1] in ("step-000002", "step-000003") and "step-000002" in names
        for path in list_checkpoints(run):
            load_all(path, tokenizer)
        save_third()
        assert sorted(p.name for p in run.iterdir()) == ["step-000002", "step-000003"]
        shutil.rmtree(run)
        shutil.copytree(before, run)
    print(f"{kills} kills")
    assert kills > 20


@contextmanager
def largest_file(n_bytes: int) -> Iterator[None]:
    """As a full disk: no file of this process may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_saving_leaves_everything_as_it_was(tmp_path, tokenizer):
    path = save(tmp_path, tokenizer, step=1)
    before = contents(tmp_path)
    largest = max(file.stat().st_size for file in path.iterdir())
    takes = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6
    model, optimizer = trained(tokenizer)
    for share in range(20):
        with (
            largest_file(largest * share // 20),
            pytest.raises(CheckpointError, match=r"step-000002.*step-000001 is intact") as error,
        ):
            save_checkpoint(
                Snapshot(
                    tmp_path, model, tokenizer, "sft", optimizer=optimizer, extra={"tokens": 0}
                ),
                2,
            )
        wanted, written, _free = map(float, re.findall(r"([\d.]+) MB", str(error.value)))
        assert wanted == pytest.approx(takes, abs=0.1) and written <= wanted
        assert contents(tmp_path) == before
        assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    load_all(path, tokenizer)


def test_too_little_space_is_said_before_the_first_step(tmp_path, monkeypatch):
    model = Transformer(small_config())
    usage = shutil.disk_usage(tmp_path)
    optimizer = make_optimizer(model, OptimConfig())
    require_space(Snapshot(tmp_path, model, None, "sft", optimizer=optimizer))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000))
    with pytest.raises(CheckpointError, match=r"takes 0.4 MB, 0.3 MB are free"):
        require_space(Snapshot(tmp_path, model, None, "sft", optimizer=optimizer))


@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_space_that_is_asked_for_is_what_a_checkpoint_takes(name, adapts, tmp_path, tokenizer):
    model = Transformer(small_config(tokenizer.vocab_size))
    if adapts:
        apply_lora(model, LoraConfig(rank=2), base="the seed", seed=1)
    optimizer = make_optimizer(model, OptimConfig(name))
    wanted = checkpoint_bytes(model, optimizer)
    update(model, optimizer)
    path = save_checkpoint(
        Snapshot(tmp_path, model, tokenizer, "sft", optimizer=optimizer, extra={"tokens": 0}), 1
    )
    tensors = [load_file(file) for file in path.glob("*.safetensors")]
    found = {key: tensor.nbytes for part in tensors for key, tensor in part.items()}
    assert wanted == sum(found.values()) - found["rng"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.4 MB; a checkpoint of `write_run` takes 0.7, and best/ 0.2."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1400k", "none", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount command")
def test_a_full_file_system_leaves_earlier_checkpoints_and_one_line(
    small_disk, tmp_path, token_root, tokenizer, script
):
    config = write_run(tmp_path / "run.yaml", token_root, tokenizer)
    run = small_disk / "run"
    found = script("pretrain.py", "--config", config, "--name", run)
    assert "could not save" in found.error
    assert [p.name for p in list_checkpoints(run)] == ["step-000005"]
    assert not list(run.glob("tmp-*"))
    before = contents(run)
    with open(small_disk / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="28"):
        for size in (1 << 16, 1 << 12):
            while file.write(bytes(size)):
                pass
    found = script("pretrain.py", "--config", config, "--name", run)  # not a byte is left
    assert "free some space" in found.error
    assert contents(run) == before
    (small_disk / "filler").unlink()
    load_all(run / "step-000005", tokenizer)


def test_differences_are_named_by_their_place_and_free_ones_left_out():
    old = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 3}
    new = {"a": 1, "b": {"c": [2], "d": 5}, "new": "x"}
    assert differences(old, new, free=("b.d",)) == [
        "b.c: saved [1], now [2]",
        "gone: saved 3, now None",
        "new: saved None, now 'x'",
    ]
    config = asdict(small_config())
    assert differences(config, config) == []


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tokenizer):
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = save(Path(place) / "run", tokenizer)
        (path / "model.safetensors").chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(CheckpointError, match=r"model\.safetensors could not be read") as e:
                load_model(path)
        finally:
            os.seteuid(user)
        assert "Permission denied" in str(e.value) and "delete" not in str(e.value)


def test_where_no_checkpoint_is_named_the_newest_run_is_meant(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(run_dir, "REPO", tmp_path)
    with pytest.raises(CheckpointError, match=r"found no SFT run in out/; name one"):
        chosen_run(None, "sft")
    run = save(tmp_path / "out/a", tokenizer).parent
    assert chosen_run(None) == run
    assert chosen_run(tmp_path / "other") == tmp_path / "other"
