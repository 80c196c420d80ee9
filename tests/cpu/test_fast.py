"""Laws of fast steps: float32 ones equal the model's, int8 ones those of the rounded weights."""

import copy
import ctypes
import os

import pytest
import torch
from torch import Tensor

from babyllama.cpu import compile, int8
from babyllama.cpu.decoder import make_decoder
from babyllama.decoder import Decoder, plain_decoder
from babyllama.errors import CheckpointError, ConfigError
from babyllama.generate import generate
from babyllama.sampling import SamplingConfig
from conftest import small_config
from model import KVCache, Transformer

needs_compiler = pytest.mark.skipif(not compile.compiler(), reason="there is no C compiler")
KINDS = ["float32", pytest.param("int8", marks=needs_compiler)]
SHAPES = {
    "plain": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"tied": True},
    "odd": {"dim": 40, "n_heads": 5, "n_kv_heads": 1, "multiple_of": 7, "norm_eps": 0.01},
}
LENGTHS = (5, 1, 17, 30, 8)


def lively_model(**changes: object) -> Transformer:
    """Random weights, those of the norms included, whose layers change what is said."""
    torch.manual_seed(0)
    model = Transformer(small_config(**changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(6)
            else:
                weight.uniform_(0.5, 2)
    return model


def rounded(model: Transformer) -> Transformer:
    """The model whose matrices are what int8 holds, but for the embedding: the reference of its
    steps."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        embedding = model.tok_embeddings.weight.clone()
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and (model.config.tied or name != "tok_embeddings.weight"):
                values, scales = int8.quantise(weight)
                weight.copy_(values.float() * scales[:, None])
        model.tok_embeddings.weight = torch.nn.Parameter(embedding)
    return model


def prompts_and_cache(model: Transformer, lengths: tuple[int, ...]) -> tuple[Tensor, KVCache]:
    """Random prompts filled up on the left, read by the model."""
    width = max(lengths)
    tokens = torch.randint(97, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    cache = KVCache(model.config, torch.tensor([width - n for n in lengths]), width + 12)
    model.hidden(tokens, cache=cache)
    return tokens, cache


def logits_of(decoder: Decoder, model: Transformer, lengths: tuple[int, ...]) -> Tensor:
    """Logits after the prompts and of ten steps, with rows that leave on the way: (rows of all
    steps, V)."""
    tokens, _ = prompts_and_cache(model, lengths)
    width = max(lengths)
    cache = decoder.new_cache(torch.tensor([width - n for n in lengths]), width + 12)
    generator = torch.Generator().manual_seed(2)
    found = [decoder.read(tokens, cache)]
    for number in range(10):
        if number == 6 and len(lengths) > 1:
            cache.keep(torch.tensor([1, 3]))
        ids = torch.randint(97, (len(cache.start),), generator=generator)
        found.append(decoder.step(ids, cache))
    return torch.cat(found)


@pytest.mark.parametrize("lengths", [(9,), LENGTHS], ids=["one", "ragged"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_a_float32_step_is_the_models(changes, lengths):
    model = lively_model(**changes)
    wanted = logits_of(plain_decoder(model), model, lengths)
    found = logits_of(make_decoder(model, "float32"), model, lengths)
    assert wanted.std() > 0.5
    assert torch.allclose(found, wanted, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("lengths", [(9,), LENGTHS], ids=["one", "ragged"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
@torch.inference_mode()
def test_an_int8_step_is_that_of_the_rounded_weights(changes, lengths):
    model = lively_model(**changes)
    wanted = logits_of(plain_decoder(rounded(model)), model, lengths)
    found = logits_of(make_decoder(model, "int8"), model, lengths)
    plain = logits_of(plain_decoder(model), model, lengths)
    assert (found - wanted).abs().max() < 5e-3 * wanted.std()
    # What rounding changes is small, and larger than what the step adds to it.
    assert 4 * (found - wanted).std() < (plain - wanted).std() < 0.05 * wanted.std()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_rows_of_a_batch_do_not_see_each_other(kind):
    model = lively_model()
    decoder = make_decoder(model, kind)
    tokens, cache = prompts_and_cache(model, LENGTHS)
    together = decoder.step(torch.arange(5), cache)
    for row, n in enumerate(LENGTHS):
        alone = KVCache(model.config, torch.tensor([0]), n + 5)
        model.hidden(tokens[row : row + 1, -n:], cache=alone)
        found = decoder.step(torch.tensor([row]), alone)
        assert torch.allclose(found[0], together[row], atol=2e-3 if kind == "int8" else 1e-4)


@needs_compiler
def test_sums_of_the_largest_numbers_do_not_overflow():
    config = small_config(dim=1024, n_heads=2, n_layers=1)
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)  # every sum has terms of one sign, all as large as can be
        wanted = rounded(model)(torch.tensor([[3, 4]]))[:, -1]
        cache = KVCache(config, torch.tensor([0]), 4)
        model.hidden(torch.tensor([[3]]), cache=cache)
        found = make_decoder(model, "int8").step(torch.tensor([4]), cache)
    assert torch.allclose(found, wanted, rtol=1e-3)


@needs_compiler
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@torch.inference_mode()
def test_a_number_that_is_not_finite_spoils_its_row_and_no_other(bad):
    model = lively_model()
    decoder = make_decoder(model, "int8")
    model.tok_embeddings.weight[3, 5] = bad
    caches = [decoder.new_cache(torch.zeros(n, dtype=torch.int64), 4) for n in (2, 1)]
    both = decoder.step(torch.tensor([3, 4]), caches[0])
    assert both[0].isnan().all() and both[1].isfinite().all()
    assert torch.equal(both[1:], decoder.step(torch.tensor([4]), caches[1]))


@needs_compiler
@torch.inference_mode()
def test_threads_and_the_way_a_prompt_is_cut_change_no_bit(monkeypatch):
    model = lively_model()
    decoder = make_decoder(model, "int8")
    wanted = logits_of(decoder, model, LENGTHS)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(logits_of(decoder, model, LENGTHS), wanted)
    finally:
        torch.set_num_threads(n_threads)
    monkeypatch.setattr(int8, "_MOST_ROWS", 7)  # one column of five rows at a time
    assert torch.equal(logits_of(decoder, model, LENGTHS), wanted)


@pytest.mark.parametrize("alone, together, best", [(2.0, 8.0, 1), (2.0, 1.4, 2)])
def test_the_number_of_threads_is_the_faster_one_and_changes_with_the_machine(
    alone, together, best
):
    team, picked = int8.Team(), []
    for step in range(1000):
        # For the first half others use the processor the other way round.
        costs = (alone, together) if step >= 500 else (together, alone)
        picked.append(team.pick(2))
        team.took(costs[picked[-1] - 1] + 9 * (picked[-2:-1] != picked[-1:]))  # waking up
    assert set(picked) == {1, 2}
    for half, wanted in ((picked[200:500], 3 - best), (picked[700:], best)):
        assert half.count(wanted) > 0.9 * len(half)


@needs_compiler
def test_int8_costs_less_than_half_a_per_cent_of_perplexity():
    """A model that has learnt something: a random one has nothing to lose."""
    torch.manual_seed(0)
    model = Transformer(small_config(dim=64))
    walk = torch.randint(97, (97,)).tolist()  # each token has one that usually follows
    text, chance = [5], torch.Generator().manual_seed(1)
    for _ in range(2000):
        is_noise = torch.rand((), generator=chance) < 0.2
        text.append(int(torch.randint(97, (), generator=chance)) if is_noise else walk[text[-1]])
    tokens = torch.tensor(text[:1981]).unfold(0, 61, 60)  # (33, 61)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        found = model(tokens[:, :-1], tokens[:, 1:])
        (found.loss_sum / found.n_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    decoders = [make_decoder(model, kind) for kind in ("float32", "int8")]
    with torch.inference_mode():
        exact, held = (loss_of(decoder, tokens) for decoder in decoders)
    assert exact < 2  # of 4.6 for no knowledge at all
    assert 0 < abs(held - exact) < 0.005


def loss_of(decoder: Decoder, tokens: Tensor) -> float:
    """The mean loss of rows (B, T + 1), token by token."""
    cache = KVCache(decoder.model.config, torch.zeros(len(tokens), dtype=torch.int64), 60)
    steps = [decoder.step(ids, cache) for ids in tokens[:, :-1].t()]
    return float(torch.nn.functional.cross_entropy(torch.cat(steps), tokens[:, 1:].t().flatten()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_leaves_the_model_as_it_was(kind):
    model = lively_model()
    wanted = copy.deepcopy(model.state_dict())
    decoder = make_decoder(model, kind)
    generate(decoder, [[1, 2, 3]], SamplingConfig(max_new_tokens=5), -1)
    assert decoder.kind == kind and decoder.model is model
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, wanted[name])


def test_int8_values_use_their_range():
    weight = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    values, scales = int8.quantise(weight)
    assert values.dtype == torch.int8
    assert (values.abs().amax(1) == 127).sum() == 49 and (values[7] == 0).all()
    assert ((values * scales[:, None] - weight).abs() <= 0.5001 * scales[:, None]).all()


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="not finite numbers"):
        int8.quantise(torch.tensor([[1.0, torch.inf]]))


def forget():
    compile.compiled.cache_clear()
    compile.library.cache_clear()


@pytest.fixture
def forget_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The library, compiled once for all tests of where it is kept."""
    path = tmp_path_factory.mktemp("made") / "made.so"
    compile._compile(compile.compiler(), path)
    return path


@pytest.fixture
def calls(monkeypatch, forget_library, tmp_path, made):
    """Notes each call of a compiler that hands out what another one made."""
    path, notes = tmp_path / "cc", tmp_path / "calls"
    path.write_text(
        f"#!/bin/sh\necho call >> {notes}\n"
        f'cp {made} "$(echo "$@" | sed "s/.* -o \\([^ ]*\\) .*/\\1/")"\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return notes


@needs_compiler
@torch.inference_mode()
def test_the_plain_loops_for_other_processors_are_the_same_step(
    monkeypatch, forget_library, tmp_path
):
    model = lively_model(n_kv_heads=2)
    wanted = logits_of(make_decoder(model, "int8"), model, LENGTHS)
    old = tmp_path / "cc"  # a compiler that knows nothing of this processor's instructions
    old.write_text(
        "#!/bin/sh\nfor word; do case $word in -m*=native) exit 1;; esac; done\n"
        f'exec {compile.compiler()} "$@"\n'
    )
    old.chmod(0o755)
    monkeypatch.setenv("CC", str(old))
    forget()
    found = logits_of(make_decoder(model, "int8"), model, LENGTHS)
    assert (found - wanted).abs().max() < 2e-3 * wanted.std()
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


def test_without_a_compiler_int8_is_refused_and_auto_is_float32(monkeypatch, forget_library):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ConfigError, match=r"need a C compiler.*--weights float32"):
        make_decoder(lively_model(), "int8")
    with pytest.warns(RuntimeWarning, match="in float32, which is slower.*need a C compiler"):
        found = make_decoder(lively_model(), "auto")
    assert found.kind == "float32" and "install one" in found.reason


def test_a_compiler_that_fails_is_quoted(monkeypatch, forget_library, tmp_path):
    bad = tmp_path / "cc"
    bad.write_text("#!/bin/sh\necho no such dialect >&2\nexit 1\n")
    bad.chmod(0o755)
    monkeypatch.setenv("CC", str(bad))
    with pytest.raises(ConfigError, match=r"no such dialect.*--weights float32"):
        make_decoder(lively_model(), "int8")
    with pytest.warns(RuntimeWarning, match="no such dialect"):
        assert make_decoder(lively_model()).kind == "float32"


@needs_compiler
def test_the_library_is_compiled_once_and_again_where_it_was_damaged_or_cannot_be_kept(
    monkeypatch, calls, tmp_path
):
    def n_calls() -> int:
        forget()
        assert compile.compiled().choose
        return calls.read_text().count("call")

    assert [n_calls(), n_calls()] == [1, 1]
    (kept,) = (tmp_path / "cache/babyllama").iterdir()
    # A process does not read one place twice, so that each damage has its own.
    for number, data in enumerate((b"\x7fELF", kept.read_bytes()[:-5000], b""), 2):
        damaged = tmp_path / f"other{number}/babyllama" / kept.name
        damaged.parent.mkdir(parents=True)
        damaged.write_bytes(data)
        monkeypatch.setenv("XDG_CACHE_HOME", str(damaged.parent.parent))
        assert [n_calls(), n_calls()] == [number, number]
        assert damaged.read_bytes() == kept.read_bytes()
    monkeypatch.setenv("XDG_CACHE_HOME", str(calls))  # a file stands in the way
    assert [n_calls(), n_calls()] == [5, 6]


@needs_compiler
def test_a_kept_library_that_others_could_have_put_there_is_not_loaded(
    monkeypatch, calls, tmp_path
):
    place = tmp_path / "cache/babyllama"
    assert compile.compiled().choose
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o777)
    assert compile._cache_dir() == place  # our own, closed again
    assert place.stat().st_mode & 0o777 == 0o700
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/babyllama").symlink_to(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "linked"))
    assert compile._cache_dir() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    assert compile._cache_dir() is None
    before = sorted(place.iterdir())
    forget()
    assert compile.compiled().choose
    assert sorted(place.iterdir()) == before and calls.read_text().count("call") == 2


@needs_compiler
@pytest.mark.parametrize("both", [False, True])
def test_where_temporary_files_may_not_run_another_place_is_taken_or_int8_is_refused(
    both, monkeypatch, calls
):
    library = ctypes.CDLL

    def refuse(name):
        if both or "cache" not in name:
            raise OSError("failed to map segment from shared object")
        return library(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    if both:
        with pytest.warns(RuntimeWarning, match="whose programs may run"):
            assert make_decoder(lively_model()).kind == "float32"
    else:
        assert compile.compiled().choose


@needs_compiler
def test_auto_takes_int8_where_it_can():
    assert make_decoder(lively_model()).kind == "int8"
    assert make_decoder(lively_model().bfloat16()).kind == "bfloat16"


def test_int8_is_for_float32_models():
    with pytest.raises(ConfigError, match=r"found float16 on cpu"):
        make_decoder(lively_model().half(), "int8")


@needs_compiler
def test_compiling_leaves_tiny_numbers_alone():
    assert isinstance(compile.compiled(), ctypes.CDLL)
    tiny = torch.tensor(1e-40)
    assert tiny * 0.5 > 0  # -ffast-math would have made it 0 for the whole process
