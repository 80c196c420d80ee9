"""The other side of every comparison: an exported model in the hands of its own tool.

Each peer offers what parity.py asks for: logits, a greedy reply, token ids, a rendered chat. The
packages (requirements/export.txt) are imported here and nowhere else, when they are needed.
"""

import importlib
from collections.abc import Sequence
from itertools import islice, takewhile
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from babyllama.errors import ConfigError


def package(name: str) -> ModuleType:
    """An optional package.

    raises: ConfigError if it is not installed
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"wanted the package {name}, found none ({error}); install it: "
            f"pip install -r requirements/export.txt -c constraints.txt"
        ) from None


class TransformersModel:
    """A LlamaForCausalLM, whatever file it came from."""

    def __init__(self, model: torch.nn.Module, eos_id: int | None = None) -> None:
        """eos_id: ends a reply; if absent what generation_config.json says"""
        self.model = model.float().eval()
        if eos_id is not None:
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
        eos = self.model.generation_config.eos_token_id
        return [reply[: reply.index(eos)] if eos in reply else reply for reply in found]


class HuggingFaceFolder(TransformersModel):
    """A folder as any user loads it: AutoModelForCausalLM and AutoTokenizer, no code of ours."""

    def __init__(self, place: Path) -> None:
        transformers = package("transformers")
        super().__init__(
            transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
        )
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of bare texts; control names inside them stay text."""
        return self.tokenizer(texts, split_special_tokens=True, verbose=False)["input_ids"]

    def encode_rendered(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered chats, whose control names are control tokens."""
        return self.tokenizer(texts, split_special_tokens=False, verbose=False)["input_ids"]

    def render(self, messages: list[dict], is_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=is_prompt
        )


class PeftFolder(TransformersModel):
    """An adapter that peft has put on a base."""

    def __init__(self, place: Path, config: dict, weights: dict[str, Tensor]) -> None:
        """config, weights: of the base, as transformers names them"""
        transformers, peft = package("transformers"), package("peft")
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
        missing, _ = base.load_state_dict(weights, strict=False)
        assert not set(missing) - {"lm_head.weight"}, missing  # which is tied
        base.tie_weights()
        base.generation_config.pad_token_id = base.generation_config.eos_token_id
        super().__init__(peft.PeftModel.from_pretrained(base, place))


class GgufInTransformers(TransformersModel):
    """A GGUF file read by transformers, which knows shapes and the order of rows by itself."""

    def __init__(self, file: Path, eos_id: int) -> None:
        transformers = package("transformers")
        reader = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        config = transformers.LlamaConfig(**reader.load_gguf_checkpoint(str(file))["config"])
        model = transformers.LlamaForCausalLM(config)
        tensors = reader.load_gguf_checkpoint(str(file), True, model)["tensors"]
        missing, _ = model.load_state_dict(tensors, strict=False)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        if set(missing) - tied:
            raise ConfigError(f"{file}: transformers finds no {', '.join(missing)} in it")
        model.tie_weights()
        super().__init__(model, eos_id)


class LlamaCpp:
    """A GGUF file in llama.cpp, by way of llama-cpp-python; keys and values kept in float32."""

    def __init__(self, file: Path, context: int) -> None:
        llama_cpp = package("llama_cpp")
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
        return [self._reply(ids, n_new) for ids in prompts]

    def _reply(self, ids: list[int], n_new: int) -> list[int]:
        self.model.reset()
        tokens = self.model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        eos = self.model.token_eos()
        return list(takewhile(lambda token: token != eos, islice(tokens, n_new)))

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self.model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]

    def encode_rendered(self, texts: list[str]) -> list[list[int]]:
        return [self.model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]
