"""Tools that exports share: readers of other programs, vocabularies and chat templates for them.

Labels and separator are read from tokenizer.py, which owns the format; this file owns only how
Jinja says it.

Each peer, an exported model in the hands of its own tool, offers what parity.py asks for: logits, a
greedy reply, token ids, a rendered chat. The packages (requirements/export.txt) are imported
when they are needed.

tokenizer.json, and what GGUF needs to know of a SentencePiece vocabulary, are faithful for the
vocabularies that `tokenizer.py train` makes (BPE, byte fallback, text kept as it is). A vocabulary
that would give other ids elsewhere is refused with the reason, before anything is written; that the
ids are equal is then measured (parity.py). Format of the source: SentencePiece ModelProto (Kudo and
Richardson 2018); of the results: tokenizers 0.22, GGUF 3.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from torch import Tensor

from babyllama.errors import ConfigError
from tokenizer import COLONS, LABELS, LINE_ENDS, NAMES, SEPARATOR, Tokenizer


class TransformersModel:
    """A LlamaForCausalLM, whatever file it came from."""

    def __init__(self, model: torch.nn.Module, eos_id: int) -> None:
        """eos_id: ends a reply"""
        self.model = model.eval()
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = eos_id

    def logits(self, ids: Sequence[int]) -> Tensor:
        """(T, V) float32."""
        with torch.inference_mode():
            return self.model(torch.tensor([ids])).logits[0].float()

    def replies(self, prompts: Sequence[list[int]], n_new: int) -> list[list[int]]:
        """Greedy replies by their generate, without <eos>."""
        longest = max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
        seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
        found = self.model.generate(
            tokens, attention_mask=seen, max_new_tokens=n_new,
            do_sample=False, temperature=None, top_p=None, top_k=None,
        )[:, longest:].tolist()  # fmt: skip
        return [_until(self.model.generation_config.eos_token_id, reply) for reply in found]


def _until(eos: int, reply: Iterable[int]) -> list[int]:
    return list(takewhile(lambda token: token != eos, reply))


class HuggingFaceFolder(TransformersModel):
    """A folder as any user loads it: AutoModelForCausalLM and AutoTokenizer, no code of ours."""

    def __init__(self, place: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
        super().__init__(model, model.generation_config.eos_token_id)
        self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of bare texts, in which control names stay text."""
        return self.tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]

    def render(self, messages: list[dict], is_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )


class GgufInTransformers(TransformersModel):
    """A GGUF file as transformers reads it, which knows shapes and the order of rows by itself."""

    def __init__(self, file: Path, eos_id: int) -> None:
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True,
            output_loading_info=True,
        )  # fmt: skip
        if info["missing_keys"]:
            raise ConfigError(
                f"{file}: transformers finds no {', '.join(info['missing_keys'])} in it"
            )
        super().__init__(model, eos_id)


class LlamaCpp:
    """A GGUF file in llama.cpp, by way of llama-cpp-python; keys and values kept in float32."""

    def __init__(self, file: Path, context: int) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(file), n_ctx=context, logits_all=True, verbose=False, flash_attn=False,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip
        self.template = self.model.metadata.get("tokenizer.chat_template", "")

    def logits(self, ids: Sequence[int]) -> Tensor:
        self.model.reset()
        self.model.eval(list(ids))
        return torch.from_numpy(self.model.scores[: len(ids)].copy())

    def replies(self, prompts: Sequence[list[int]], n_new: int) -> list[list[int]]:
        found = []
        for ids in prompts:
            self.model.reset()
            tokens = self.model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
            found.append(_until(self.model.token_eos(), islice(tokens, n_new)))
        return found

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self.model.tokenize(t.encode(), add_bos=False, special=False) for t in texts]


_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
NORMAL, UNKNOWN, CONTROL = _Piece.NORMAL, _Piece.UNKNOWN, _Piece.CONTROL
USER_DEFINED, UNUSED, BYTE = _Piece.USER_DEFINED, _Piece.UNUSED, _Piece.BYTE
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
    kinds, rules = {p.type for p in proto.pieces}, proto.normalizer_spec
    scores = Counter(p.score for p in proto.pieces if p.type == NORMAL and len(p.piece) > 1)
    n_tied = sum(n for n in scores.values() if n > 1)
    is_llama_cpp = target == "llama.cpp"
    faults = {
        "it is a unigram model, whose scores SentencePiece adds up in float32 and other tools "
        "in float64, so that splits of nearly the same score come out otherwise (222, ......)":
            kind == "unigram",
        f"it is a {kind} model, which {target} does not have": kind not in ("unigram", "BPE"),
        f"it rewrites text before splitting it ({rules.name or 'own rules'}), "
        f"for which {target} has no equal": rules.precompiled_charsmap,
        "it keeps spaces as they are, where others write U+2581": not rules.escape_whitespaces,
        f"{n_tied} of its pieces share a score; SentencePiece then merges from the left, but "
        f"tokenizer.json only knows one order for all merges":
            kind == "BPE" and not is_llama_cpp and n_tied,
        "it has no byte pieces, which llama.cpp falls back to": is_llama_cpp and BYTE not in kinds,
        "it has pieces marked unused, which llama.cpp would use": is_llama_cpp and UNUSED in kinds,
    }  # fmt: skip
    reasons = [reason for reason, holds in faults.items() if holds]
    if reasons:
        raise ConfigError(
            f"tokenizer {tokenizer.path} cannot be carried over to {target}: "
            + "; ".join(reasons)
            + "; train a model with a vocabulary of python tokenizer.py train"
        )


def fast_tokenizer(tokenizer: Tokenizer) -> Any:
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
    fast = Tokenizer(models.BPE(
        {piece.piece: i for i, piece in enumerate(pieces)},
        [(text[:cut], text[cut:]) for _, cut, text in sorted(merges)],
        unk_token=pieces[proto.trainer_spec.unk_id].piece, fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    ))  # fmt: skip
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [piece.piece for piece in pieces if piece.type == CONTROL]
    fast.add_special_tokens([AddedToken(name, normalized=False) for name in control])
    # Matched in the text whose spaces are U+2581 already, so one with a space never is.
    own = [p.piece for p in pieces if p.type == USER_DEFINED and " " not in p.piece]
    fast.add_tokens([AddedToken(name, normalized=True) for name in own])
    return fast


def ends_of(tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of the pieces that begin and end a text: "<s>" and "</s>" of most models."""
    return tokenizer.sp.id_to_piece(tokenizer.bos_id), tokenizer.sp.id_to_piece(tokenizer.eos_id)


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


def chat_template() -> str:
    """A template that renders messages as Tokenizer.render_chat and render_prompt do.

    It uses bos_token, eos_token, messages and add_generation_prompt. A role that the format does
    not know is an error; labels inside a content are quoted as `tokenizer.defused` does. It stands
    on one line, because engines differ in how they treat line ends.
    """
    values = {
        "LABELS": LABELS, "SEPARATOR": SEPARATOR, "ENDS": [*LINE_ENDS], "NAMES": NAMES,
        "COLONS": [*COLONS], "UNKNOWN": f"a role must be one of {', '.join(LABELS)}; found ",
    }  # fmt: skip
    # JSON's literals are Jinja's, too.
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return filled("chat_template.jinja", quoted).replace("\n", "")


def filled(name: str, values: dict[str, str]) -> str:
    """A text that lies beside this file, with values for its <NAMES>."""
    text = Path(__file__).with_name(name).read_text("utf-8")
    return re.sub("<([A-Z_]+)>", lambda found: values[found[1]], text)


class TextFormat(Tokenizer):
    """The format itself, run over texts in the place of ids: its "ids" are strings to join."""

    def __init__(self, bos: Any, eos: Any) -> None:
        self.bos_id, self.eos_id = bos, eos
        self._labels: dict[str, Any] = {role: [label] for role, label in LABELS.items()}
        self._separator: Any = [SEPARATOR]

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[Any]:
        return [text]

    def dialogue(self, messages: Sequence[dict]) -> str:
        """A finished dialogue as text, control pieces by their names."""
        return "".join(map(str, self.render_chat(messages)[0]))

    def prompt(self, messages: Sequence[dict]) -> str:
        """A prompt as text, up to where the assistant begins."""
        return "".join(map(str, self.render_prompt(messages)))


def dialogues(lines: Sequence[str], n: int, longest: int | None = None) -> list[list[dict]]:
    """Dialogues of one to three exchanges out of lines of text, some with a 资料.

    longest: characters that are kept of a line
    """
    made = []
    for number in range(n):
        chance = random.Random(number)
        roles = ["system"] * (chance.random() < 0.3) + ["user", "assistant"] * chance.randint(1, 3)
        made.append([{"role": role, "content": chance.choice(lines)[:longest]} for role in roles])
    return made
