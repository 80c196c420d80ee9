"""Train, look at and measure a SentencePiece vocabulary.

    python tokenizer.py train --rows data/clean/inews --vocab_size 6000 --out data/tokenizers/sample.model
    python tokenizer.py show --tokenizer data/tokenizers/sample.model --text 今天天气怎么样？
    python tokenizer.py stats --tokenizer data/tokenizers/sample.model --rows data/clean/inews

This file owns the tokens: the SentencePiece wrapper, the chat format with its training mask, and
the decoder that streams whole characters. Ids come from the model file, never from literals. The
chat format, of which nothing else in the project writes a copy:

    <bos>资料：{system}\\n\\n人类：{user}\\n\\n助手：{assistant}<eos>\\n\\n人类：{user}\\n\\n助手：…

Labels, contents and separators are encoded one by one, so a mask boundary never falls inside a
token; a label at a line's beginning inside a content is quoted, so that it begins no turn. No torch.
Format: SentencePiece ModelProto (Kudo and Richardson 2018, arXiv:1808.06226).
"""  # noqa: E501

import codecs
import hashlib
import re
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from babyllama.errors import ConfigError, nearest  # first: says what to do if nothing is installed

# isort: split
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

LABELS = {"system": "资料：", "user": "人类：", "assistant": "助手："}
SEPARATOR = "\n\n"

# What a dialogue must get back unchanged: separators, full-width signs, spaces, rare characters.
_PROBE = "资料：一\n\n人类：Ａ，（１）？\n 二  三\n\n助手：“四”…𠮷😀"

Content = str | Sequence["str | Sequence[int]"]

# What ends a line, in Unicode's sense, and how labels are typed.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
NAMES = tuple(label.rstrip("：") for label in LABELS.values())
COLONS = "：:"
_TYPED = re.compile(rf"(?<=[{LINE_ENDS}])({'|'.join(NAMES)})(?=[{COLONS}])")


def defused(text: str, after: str = "") -> str:
    """A text in which no line begins as a turn does: 助手： becomes 「助手」：, and so on.

    after: what stands before the text where it is laid in
    """
    return _TYPED.sub(r"「\1」", after + text)[len(after) :]


class Tokenizer:
    """A SentencePiece model with the project's chat format.

    The space that LLaMA vocabularies put before every string is switched off, because contents
    are encoded piece by piece; text so round-trips exactly, but for U+2581, which comes back as
    the space that SentencePiece writes with it.

    name: by which token files are found: the file's; of the copy in a checkpoint the original's
    sp: SentencePiece's own processor
    vocab_size: number of tokens
    bos_id, eos_id: as the model file says; pad_id is eos_id where the model has no pad piece
    piece_bytes: what each token adds to the text, which may be a part of a character
    fingerprint: SHA-256 of the model file, kept in every token file and checkpoint
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            there = (one.name for one in self.path.parent.glob("*.model"))
            raise ConfigError(
                f"tokenizer {self.path}: no such file{nearest(self.path.name, there)}; name "
                f"another SentencePiece .model; how to get this one: python pretrain.py --dry-run"
            )
        card = self.path.with_name("model.yaml")
        text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
        original = re.search(r"^tokenizer: ([\w.-]+)$", text, re.MULTILINE)
        self.name = original[1] if original else self.path.stem
        self.bytes = self.path.read_bytes()
        self.fingerprint = hashlib.sha256(self.bytes).hexdigest()
        self.sp = _load(self.path, self.bytes)
        self.vocab_size = self.sp.get_piece_size()
        self.bos_id, self.eos_id = self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ConfigError(
                f"tokenizer {self.path}: wanted a begin and an end piece, found bos "
                f"{self.bos_id}, eos {self.eos_id}; train it with both"
            )
        self.pad_id = self.sp.pad_id() if self.sp.pad_id() >= 0 else self.eos_id
        self.piece_bytes = [self._bytes_of(i) for i in range(self.vocab_size)]
        self._labels = {role: self.encode(label) for role, label in LABELS.items()}
        self._separator = self.encode(SEPARATOR)

    def _bytes_of(self, token: int) -> bytes:
        """Bytes that a token adds: nothing for control pieces, one byte for byte pieces."""
        if self.sp.is_control(token):
            return b""
        piece = self.sp.id_to_piece(token)
        if self.sp.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return (" ⁇ " if self.sp.is_unknown(token) else piece.replace("▁", " ")).encode()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text; control strings such as "</s>" inside it stay plain text."""
        ids = self.sp.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 arrays; one thread, faster than one by one."""
        return self.sp.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control pieces vanish, and so do bytes that make no whole character."""
        return b"".join(self.piece_bytes[i] for i in ids).decode("utf-8", errors="ignore")

    def n_bytes(self, ids: Iterable[int]) -> int:
        """Number of UTF-8 bytes of text that the ids stand for."""
        return sum(len(self.piece_bytes[i]) for i in ids)

    def stream_decoder(self) -> Callable[[int], str]:
        """A function that turns tokens, as they come, into the characters that each completes.

        Bytes are held back until a character is whole; those that make none, which a model may
        well choose, are left out.
        """
        utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        return lambda token: utf8.decode(self.piece_bytes[token])

    def require_dialogue(self) -> None:
        """Refuse a model whose normalisation changes what a dialogue says.

        raises: ConfigError naming the first difference
        """
        for text in (SEPARATOR, _PROBE):
            back = self.decode(self.encode(text))
            if back != text:
                raise ConfigError(
                    f"tokenizer {self.path} changes text: {text!r} comes back as {back!r}, so "
                    f"turns cannot be told apart; use a model trained with identity "
                    f"normalisation and byte fallback (python tokenizer.py train makes one)"
                )

    def encode_content(self, content: Content) -> list[int]:
        """The ids of one content: a string, defused, or pieces, strings or ids, as they are."""
        if isinstance(content, str):
            return self.encode(defused(content))
        ids: list[int] = []
        for piece in content:
            ids.extend(self.encode(piece) if isinstance(piece, str) else piece)
        return ids

    def render_chat(self, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
        """A finished dialogue as (ids, mask): mask 1 on assistant text and its <eos>, else 0."""
        ids, mask = [self.bos_id], [0]
        for number, message in enumerate(messages):
            head = (self._separator if number else []) + self._labels[message["role"]]
            body = self.encode_content(message["content"])
            is_target = message["role"] == "assistant"
            if is_target:
                body = [*body, self.eos_id]
            ids += head + body
            mask += [0] * len(head) + [int(is_target)] * len(body)
        return ids, mask

    def render_prompt(self, messages: Sequence[dict]) -> list[int]:
        """A dialogue that ends with the user, up to where the assistant's text begins.

        The prompt is a prefix of the rendered dialogue, token for token.
        """
        ids, _ = self.render_chat(messages)
        return ids + self._separator + self._labels["assistant"]


def _load(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    """A processor that adds no space before a text and removes none inside it."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    # protobuf's DecodeError is no subclass of anything narrower.
    except Exception as error:
        raise ConfigError(
            f"tokenizer {path}: wanted a SentencePiece model, found {len(data)} bytes that are "
            f"none ({error}); a Llama 3 tokenizer.model is another format"
        ) from None


if __name__ == "__main__":
    # A vocabulary is made of rows, so what makes one lives with the data.
    runpy.run_module("data_process.vocabulary", run_name="__main__")
