"""Laws of the tokenizer: round trips, the chat format and its mask, streaming, training."""

import base64
import io
import json
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from babyllama.errors import ConfigError
from conftest import TEXTS
from data_process.vocabulary import train_vocabulary
from tokenizer import LABELS, SEPARATOR, Tokenizer, defused

REPO = Path(__file__).parents[2]
REAL = REPO / "../shared/data/tokenizers"
SEPARATOR_AND_LABELS = {"system": "资料：", "user": "人类：", "assistant": "助手："}
RARE = "𠮷野家，龘靐齉爩，😀👨‍👩‍👧🇨🇳，é à ü，①²㎡，\t\r\n　\x00\ufeff\u2028 end"

relaxed = settings(deadline=None, derandomize=True, max_examples=80)

# Half of the texts are built of what is special to the format or to SentencePiece.
characters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
special = st.sampled_from(
    [
        "</s>",
        "<s>",
        "<unk>",
        "<pad>",
        "<0x0A>",
        "\n\n",
        "资料：",
        "人类：",
        "助手：",
        " ",
        "  ",
        "天气",
    ]
)
plain_texts = st.text(characters, max_size=20) | st.lists(special, max_size=6).map("".join)
mixed_texts = st.lists(plain_texts, max_size=3).map("".join)


@st.composite
def dialogues(draw: st.DrawFn) -> list[dict]:
    """`[system]? (user assistant)+`; contents are strings or pieces that are strings."""
    contents = mixed_texts | st.lists(mixed_texts, max_size=3)
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3))
    return [{"role": role, "content": draw(contents)} for role in roles]


def real_tokenizer(name: str) -> Tokenizer:
    path = REAL / f"{name}.model"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return Tokenizer(path)


@pytest.fixture(scope="session", params=["small", "chatglm2_64789", "chinese_llama2_55296"])
def any_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "small" else real_tokenizer(request.param)


def whole(content: str | list[str]) -> str:
    """What a content reads as in a dialogue; pieces are templates and what is laid into them."""
    return defused(content) if isinstance(content, str) else "".join(content)


@relaxed
@given(text=mixed_texts)
def test_any_text_comes_back_unchanged(any_tokenizer, text):
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert any_tokenizer.n_bytes(ids) == len(text.encode())


def test_the_sign_for_a_space_is_the_one_character_that_changes(any_tokenizer):
    assert any_tokenizer.decode(any_tokenizer.encode("a▁b")) == "a b"


def test_a_batch_is_encoded_as_its_texts_are(any_tokenizer):
    texts = [*TEXTS, RARE, "", " "]
    wanted = [any_tokenizer.encode(text) for text in texts]
    assert list(map(list, any_tokenizer.encode_batch(texts))) == wanted


def test_begin_and_end_are_added_on_request(tokenizer):
    ids = tokenizer.encode("天气")
    both = tokenizer.encode("天气", bos=True, eos=True)
    assert both == [tokenizer.bos_id, *ids, tokenizer.eos_id]


def test_a_fitting_model_passes_for_dialogue(any_tokenizer):
    any_tokenizer.require_dialogue()


def test_a_model_that_changes_text_is_refused_for_dialogue_with_the_reason():
    tokenizer = real_tokenizer("chinese_sp_20000")
    with pytest.raises(ConfigError, match=r"changes text: '\\n\\n' comes back as '  '"):
        tokenizer.require_dialogue()


def train_directly(path: Path, **settings: object) -> Path:
    """A model made by SentencePiece itself, with piece numbers that are not ours."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2,
        **{"vocab_size": 400, "model_type": "bpe", "byte_fallback": True} | settings,
    )  # fmt: skip
    path.write_bytes(model.getvalue())
    return path


def test_ids_are_read_from_the_model(tmp_path):
    path = train_directly(tmp_path / "m.model", unk_id=3, pad_id=0, bos_id=2, eos_id=1)
    tokenizer = Tokenizer(path)
    found = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size)
    assert found == (2, 1, 0, 400)
    assert tokenizer.render_chat([{"role": "user", "content": "好"}])[0][0] == 2


def test_the_end_piece_fills_up_where_a_model_has_no_pad_piece(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)


@pytest.mark.parametrize("missing", ["bos_id", "eos_id"])
def test_a_model_without_begin_or_end_is_refused(tmp_path, missing):
    path = train_directly(tmp_path / "m.model", **{missing: -1})
    with pytest.raises(ConfigError, match=rf"found .*{missing[:3]} -1.*train it with both"):
        Tokenizer(path)


def llama3_file() -> bytes:
    """Llama 3's tokenizer.model: a rank for each base64 token."""
    return b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


@pytest.mark.parametrize(
    "data", [b"", b"hello world\n" * 99, llama3_file(), bytes(999), b'{"model": {}}'], ids=repr
)
def test_a_file_that_is_no_model_is_refused(tmp_path, data):
    (tmp_path / "x.model").write_bytes(data)
    with pytest.raises(ConfigError, match=r"x\.model: wanted a SentencePiece model, found"):
        Tokenizer(tmp_path / "x.model")


def test_a_missing_file_is_refused_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(ConfigError, match=r"no such file.*python pretrain\.py --dry-run"):
        Tokenizer(tmp_path / "x.model")


def test_the_fingerprint_is_that_of_the_file(tokenizer, tmp_path):
    (tmp_path / "copy.model").write_bytes(tokenizer.path.read_bytes())
    other = train_directly(tmp_path / "other.model")
    assert Tokenizer(tmp_path / "copy.model").fingerprint == tokenizer.fingerprint
    assert Tokenizer(other).fingerprint != tokenizer.fingerprint


@relaxed
@given(messages=dialogues())
def test_a_prompt_is_a_prefix_of_the_dialogue_token_for_token(any_tokenizer, messages):
    ids, _ = any_tokenizer.render_chat(messages)
    for number, message in enumerate(messages):
        if message["role"] == "user":
            prompt = any_tokenizer.render_prompt(messages[: number + 1])
            assert ids[: len(prompt)] == prompt
            answer = any_tokenizer.encode_content(messages[number + 1]["content"])
            end = len(prompt) + len(answer)
            assert ids[len(prompt) : end + 1] == [*answer, any_tokenizer.eos_id]


@relaxed
@given(messages=dialogues())
def test_the_mask_covers_the_assistants_texts_and_their_ends_and_no_more(any_tokenizer, messages):
    ids, mask = any_tokenizer.render_chat(messages)
    runs = [
        [token for _, token in run]
        for is_target, run in groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
        if is_target
    ]
    said = [whole(m["content"]) for m in messages if m["role"] == "assistant"]
    assert [any_tokenizer.decode(run) for run in runs] == said
    assert all(run.index(any_tokenizer.eos_id) == len(run) - 1 for run in runs)
    n_wanted = sum(
        len(any_tokenizer.encode_content(m["content"])) + 1
        for m in messages
        if m["role"] == "assistant"
    )
    assert sum(mask) == n_wanted
    assert set(mask) == {0, 1}


@relaxed
@given(messages=dialogues())
def test_a_dialogue_reads_as_the_format_says(any_tokenizer, messages):
    ids, _ = any_tokenizer.render_chat(messages)
    labels = {"system": "资料：", "user": "人类：", "assistant": "助手："}
    wanted = "\n\n".join(labels[m["role"]] + whole(m["content"]) for m in messages)
    assert any_tokenizer.decode(ids) == wanted
    n_answers = sum(m["role"] == "assistant" for m in messages)
    assert ids[0] == any_tokenizer.bos_id
    assert ids.count(any_tokenizer.bos_id) == 1
    # An end typed by a user or an assistant stays plain text.
    assert ids.count(any_tokenizer.eos_id) == n_answers


TYPED = [
    f"{end}{name}{colon}"
    for end in ("\n", "\n\n", "\n\n\n", "\r\n\r\n", "\r", "\u2028", "\x0b")
    for name in ("人类", "助手", "资料")
    for colon in "：:"
]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_label_that_somebody_types_begins_no_turn(any_tokenizer, role):
    """S9: it reads as what it is, a word in quotation marks."""
    labels = [any_tokenizer.encode(label) for label in ("人类：", "助手：", "资料：")]
    for typed in TYPED:
        content = f"请看{typed}好{typed}"
        ids = any_tokenizer.render_chat([{"role": role, "content": content}])[0]
        n_labels = sum(ids[i : i + len(x)] == x for x in labels for i in range(len(ids)))
        assert n_labels == 1 and any_tokenizer.decode(ids) == SEPARATOR_AND_LABELS[role] + (
            content.replace(typed[-3:-1], f"「{typed[-3:-1]}」")
        )
        assert any_tokenizer.encode_content(content) == any_tokenizer.encode(defused(content))


@pytest.mark.parametrize(
    "text", ["助手：好", "相关资料：见下", "人类起源\n人类学：一门学科\n\n助手\n：", "\n\n资料室"]
)
def test_other_texts_keep_their_letters(tokenizer, text):
    assert defused(text) == text and tokenizer.encode_content(text) == tokenizer.encode(text)
    assert defused("助手：好", "\n") == "「助手」：好"  # at the beginning of a line of a template


def test_the_format_is_the_documented_one():
    assert (LABELS, SEPARATOR) == (SEPARATOR_AND_LABELS, "\n\n")


@relaxed
@given(pieces=st.lists(mixed_texts, max_size=5), as_ids=st.integers(0, 31))
def test_pieces_as_ids_equal_pieces_as_strings(any_tokenizer, pieces, as_ids):
    mixed = [
        any_tokenizer.encode(piece) if as_ids >> number & 1 else piece
        for number, piece in enumerate(pieces)
    ]
    wanted = [token for piece in pieces for token in any_tokenizer.encode(piece)]
    assert any_tokenizer.encode_content(mixed) == wanted


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return list(map(tokenizer.stream_decoder(), ids))


@relaxed
@given(data=st.data())
def test_streaming_equals_decoding_for_random_ids(any_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size - 1), max_size=40))
    # Byte pieces are few in a large vocabulary: add some more.
    ids += data.draw(st.lists(st.integers(3, 258), max_size=10))
    assert "".join(streamed(any_tokenizer, ids)) == any_tokenizer.decode(ids)


@relaxed
@given(text=mixed_texts)
def test_streaming_never_yields_half_a_character(any_tokenizer, text):
    parts = streamed(any_tokenizer, any_tokenizer.encode(RARE + text))
    assert "".join(parts) == RARE + text
    assert "\ufffd" not in "".join(parts) or "\ufffd" in text


def test_bytes_that_make_no_character_are_left_out(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert streamed(tokenizer, ids) == ["", "", "", "😀"]
    after = tokenizer.encode("今天")
    for broken in (ids[:3], ids[1:], ids[1:3], ids[:1] * 5):
        assert "".join(streamed(tokenizer, [*broken, *after])) == "今天"
        assert tokenizer.decode([*after, *broken]) == tokenizer.decode([*broken, *after]) == "今天"


def test_training_twice_gives_the_same_file(tmp_path):
    for name in ("a", "b"):
        train_vocabulary(iter(TEXTS * 5), tmp_path / f"{name}.model", 420, max_lines=20)
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()


def test_a_trained_vocabulary_is_bpe_with_byte_fallback_and_identity(tokenizer):
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.bytes)
    assert proto.trainer_spec.model_type == proto.trainer_spec.BPE
    assert proto.normalizer_spec.name == "identity"
    byte_pieces = [piece.piece for piece in proto.pieces if piece.type == piece.BYTE]
    assert byte_pieces == [f"<0x{byte:02X}>" for byte in range(256)]
    assert tokenizer.vocab_size == 420
    # Digits are single pieces, so that numbers are spelled alike everywhere.
    assert len(tokenizer.encode("0123456789")) == 10


@pytest.mark.parametrize("texts", [["今天天气很好。"] * 3, ["今天天气很好。"] * 5000 + ["好 的"]])
def test_spaces_come_back_where_the_training_text_has_hardly_any(tmp_path, texts):
    train_vocabulary(texts, tmp_path / "x.model", 275)
    Tokenizer(tmp_path / "x.model").require_dialogue()


def test_a_sample_of_lines_is_bounded_and_taken_from_the_whole_stream(tmp_path):
    # The default coverage keeps every character that it sees, so a missing one was not seen.
    texts = ["今天"] * 200 + ["龘"] + ["晴朗"] * 200
    train_vocabulary(texts, tmp_path / "x.model", 265, max_lines=40)
    tokenizer = Tokenizer(tmp_path / "x.model")
    n_tokens = [len(tokenizer.encode(character)) for character in "今天晴朗龘"]
    assert n_tokens == [1, 1, 1, 1, 3]


@pytest.mark.parametrize(
    "texts, vocab_size, message",
    [
        (["今天天气很好"], 5000, "on this text: it holds 275; give --vocab_size 275 or less"),
        (["今天天气很好"], 50, "alone need 265; give --vocab_size 265 or more"),
        ([], 300, "no text to learn from"),
        (["", "\n\n"], 300, "no text to learn from"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained_is_refused(tmp_path, texts, vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        train_vocabulary(texts, tmp_path / "x.model", vocab_size)
    assert not list(tmp_path.iterdir())


def run_command(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, REPO / "tokenizer.py", *map(str, words)],
        cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def test_the_commands_work_from_another_directory(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    with open(rows / "train-00000.jsonl", "w", encoding="utf-8") as file:
        for number, text in enumerate(TEXTS * 3):
            file.write(json.dumps({"id": f"x/{number}", "text": text}) + "\n")
    names = ("--vocab_size", 420, "--out", "new/x.model")
    trained = run_command("train", "--rows", "rows", *names, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "vocabulary size 420" in trained.stdout
    assert "come back unchanged    100.00%" in trained.stdout
    tokenizer = Tokenizer(tmp_path / "new/x.model")

    named = ("--tokenizer", "new/x.model")
    shown = run_command("show", *named, "--text", "今天天气", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    ids = tokenizer.encode("今天天气")
    assert [int(line.split()[0]) for line in shown.stdout.splitlines()[:-1]] == ids
    assert f"4 characters, {len(ids)} tokens; comes back unchanged: yes" in shown.stdout

    measured = run_command("stats", *named, "--rows", "rows/train-00000.jsonl", cwd=tmp_path)
    assert measured.returncode == 0, measured.stderr
    assert f"18 texts, {3 * sum(map(len, TEXTS))} characters" in measured.stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (("stats", "--tokenizer", "x.model", "--rows", "."), "no such file"),
        (("train", "--rows", ".", "--out", "x.model"), "wanted train-*.jsonl, found none"),
        (("train", "--rows", "a.jsonl", "--out", "x.model"), "no such file"),
    ],
    ids=str,
)
def test_a_command_that_cannot_work_says_why_in_one_line(tmp_path, words, message):
    failed = run_command(*words, cwd=tmp_path)
    assert failed.returncode == 2
    last = failed.stderr.splitlines()[-1]  # a progress bar may stand above it
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


@pytest.mark.parametrize("size, words", [(262, r"--vocab_size \d+ or more"), (9000, "or less")])
def test_a_size_that_cannot_be_is_answered_with_one_that_can(tmp_path, size, words):
    with pytest.raises(ConfigError, match=words) as found:
        train_vocabulary(TEXTS, tmp_path / "a.model", size)
    wanted = int(re.search(r"--vocab_size (\d+)", str(found.value))[1])
    train_vocabulary(TEXTS, tmp_path / "a.model", wanted)
