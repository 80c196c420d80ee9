"""A SentencePiece vocabulary for other tools: tokenizer.json, and what GGUF needs to know of it.

Both are faithful for the vocabularies that `tokenizer.py train` makes (BPE, byte fallback, text
kept as it is). A vocabulary that would give other ids elsewhere is refused with the reason, before
anything is written; that the ids are equal is then measured (parity.py). Format of the source:
SentencePiece ModelProto (Kudo and Richardson 2018); of the results: tokenizers 0.22, GGUF 3.
"""

import random
from collections import Counter
from typing import TYPE_CHECKING

from sentencepiece import sentencepiece_model_pb2

from babyllama.errors import ConfigError
from tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
NORMAL, UNKNOWN, CONTROL = _Piece.NORMAL, _Piece.UNKNOWN, _Piece.CONTROL
USER_DEFINED, UNUSED, BYTE = _Piece.USER_DEFINED, _Piece.UNUSED, _Piece.BYTE
_BPE = sentencepiece_model_pb2.TrainerSpec.BPE
_KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}

# Strings on which tokenizers like to differ: control names as text, spaces, line ends, rare and
# composed characters, full-width forms, the sign for the space itself.
_ODD = (
    "<s>", "</s>", "<unk>", "a</s>b", "<0x41>", "<0x0A>", "", " ", "  a  b ", "\n", "\n\n", "\r\n",
    "\t", "▁", "▁▁a ▁", "𠮷😀👨‍👩‍👧", "e\u0301각", "Ａ１（）㎏½ﬁ", "\u200b\ufeff", "\u0000",
    "资料：一\n\n人类：Ａ，（１）？\n 二  三\n\n助手：“四”…𠮷😀",
)  # fmt: skip


def read_proto(tokenizer: Tokenizer) -> sentencepiece_model_pb2.ModelProto:
    """The model file, which `Tokenizer` has found to be readable."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.bytes)
    return proto


def require_convertible(tokenizer: Tokenizer, target: str) -> None:
    """Refuse a vocabulary that cannot mean the same elsewhere.

    target: "transformers" or "llama.cpp"
    raises: ConfigError with every reason
    """
    proto = read_proto(tokenizer)
    kind = _KINDS[proto.trainer_spec.model_type]
    scores = Counter(p.score for p in proto.pieces if p.type == NORMAL and len(p.piece) > 1)
    n_tied = sum(n for n in scores.values() if n > 1)
    reasons = []
    if kind == "unigram":
        reasons.append(
            "it is a unigram model, whose scores SentencePiece adds up in float32 and other tools "
            "in float64, so that splits of nearly the same score come out otherwise (222, ......)"
        )
    elif kind != "BPE":
        reasons.append(f"it is a {kind} model, which {target} does not have")
    if proto.normalizer_spec.precompiled_charsmap:
        reasons.append(
            f"it rewrites text before splitting it ({proto.normalizer_spec.name or 'own rules'}), "
            f"for which {target} has no equal"
        )
    if not proto.normalizer_spec.escape_whitespaces:
        reasons.append("it keeps spaces as they are, where others write U+2581")
    if kind == "BPE" and target == "transformers" and n_tied:
        reasons.append(
            f"{n_tied} of its pieces share a score; SentencePiece then merges from the left, but "
            f"tokenizer.json only knows one order for all merges"
        )
    if target == "llama.cpp":
        kinds = {p.type for p in proto.pieces}
        if BYTE not in kinds:
            reasons.append("it has no byte pieces, which llama.cpp falls back to")
        if UNUSED in kinds:
            reasons.append("it has pieces marked unused, which llama.cpp would use")
    if reasons:
        raise ConfigError(
            f"tokenizer {tokenizer.path} cannot be carried over to {target}: "
            + "; ".join(reasons)
            + "; train a model with a vocabulary of python tokenizer.py train"
        )


def fast_tokenizer(tokenizer: Tokenizer) -> "tokenizers.Tokenizer":
    """The vocabulary as a `tokenizers` model that encodes a bare text as ours does.

    Merges are ordered by the score of what they make, as SentencePiece picks them. Nothing is put
    before a text and nothing stripped; control pieces are the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = read_proto(tokenizer)
    pieces = proto.pieces
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    merges = [
        (-score, cut, text)
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    fast = Tokenizer(
        models.BPE(
            {piece.piece: i for i, piece in enumerate(pieces)},
            [(text[:cut], text[cut:]) for _, cut, text in sorted(merges)],
            unk_token=pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens(
        [AddedToken(p.piece, normalized=False) for p in pieces if p.type == CONTROL]
    )
    # Matched in the text whose spaces are U+2581 already, so one with a space never is.
    fast.add_tokens(
        [
            AddedToken(piece.piece, normalized=True)
            for piece in pieces
            if piece.type == USER_DEFINED and " " not in piece.piece
        ]
    )
    return fast


def piece_of(tokenizer: Tokenizer, token: int) -> str:
    """The name of a piece: "<s>" for the begin of most models."""
    return read_proto(tokenizer).pieces[token].piece


def probes(tokenizer: Tokenizer, n_mixed: int = 20_000) -> list[str]:
    """Texts that look for trouble: each piece alone, pieces put together, runs, odd strings."""
    pieces = [
        piece.piece.replace("▁", " ")
        for piece in read_proto(tokenizer).pieces
        if piece.type in (NORMAL, USER_DEFINED)
    ]
    chance = random.Random(0)
    mixed = ["".join(chance.choices(pieces, k=chance.randint(2, 8))) for _ in range(n_mixed)]
    shuffled = ["".join(chance.choices(p, k=9)) for p in pieces if len(p) > 1][:n_mixed]
    runs = [p[0] * n for p in pieces[:2000] for n in (2, 3, 5, 7, 13)]
    return [*_ODD, *pieces, *mixed, *shuffled, *runs]
