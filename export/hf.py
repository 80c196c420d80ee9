"""Write a checkpoint as a Hugging Face folder, and prove that it behaves the same there.

    python -m export.hf --out out/hf                          newest run in out/
    python -m export.hf out/redgpt --out out/redgpt-hf        a run (its newest step) or one step
    python -m export.hf out/redgpt --out out/redgpt-hf --force          replace an earlier export
    python -m export.hf out/redgpt --out out/redgpt-hf --text my.txt    compare ids on these lines

The folder is a plain LlamaForCausalLM: AutoModelForCausalLM and AutoTokenizer load it without any
code of ours, and tokenizer.apply_chat_template(messages, add_generation_prompt=True) renders the
chat format. Weights are renamed, nothing else. parity.json tells what was compared (logits, greedy
replies, token ids, rendered chats); if anything differs, nothing is written and the exit code is 2.

A bare text gets exactly our ids: no <s> before it, no space. Texts of strangers should be encoded
with split_special_tokens=True, or a "</s>" that they contain ends the dialogue.
Back again: python -m export.import_hf. For llama.cpp: python -m export.gguf.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from babyllama.checkpoint import Loaded, load_model, model_weights
from babyllama.config import parse, run
from babyllama.run_dir import chosen_run
from babyllama.sampling import SamplingConfig
from export import parity, tools
from model import ModelConfig, Transformer

# Ours beside theirs; inside a layer, and outside.
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every parameter, and its name in transformers."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER_NAMES.items()}
    for layer in range(config.n_layers):
        for ours, theirs in LAYER_NAMES.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names


def llama_shape(config: ModelConfig) -> dict:
    """What LlamaConfig of transformers must know of the network."""
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


def hf_weights(model: Transformer) -> dict[str, Tensor]:
    names = hf_names(model.config)
    return {names[name]: weight for name, weight in model_weights(model).items()}


def llama_of(loaded: Loaded) -> Any:
    """The checkpoint as a LlamaForCausalLM, which chooses tokens as chat.py does."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer, chosen = loaded.tokenizer, SamplingConfig()
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    pad_id = tokenizer.pad_id
    # <eos> as padding here would stop its embedding from being trained (padding_idx).
    padding = {"pad_token_id": pad_id if pad_id != tokenizer.eos_id else None}
    model = LlamaForCausalLM(LlamaConfig(**llama_shape(loaded.config), **ends, **padding))
    missing, _ = model.load_state_dict(hf_weights(loaded.model), strict=False)
    assert not set(missing) - {"lm_head.weight"}, missing  # which is tied
    model.tie_weights()
    model.generation_config = GenerationConfig(
        **ends, pad_token_id=pad_id, do_sample=chosen.temperature > 0,
        temperature=chosen.temperature, top_p=chosen.top_p, top_k=chosen.top_k,
        max_new_tokens=chosen.max_new_tokens,
    )  # fmt: skip
    return model


def write_folder(loaded: Loaded, place: Path) -> None:
    """The files that transformers reads, and tokenizer.model for import_hf."""
    from transformers import PreTrainedTokenizerFast

    tokenizer, (begin, end) = loaded.tokenizer, tools.ends_of(loaded.tokenizer)
    llama_of(loaded).save_pretrained(place)
    PreTrainedTokenizerFast(
        tokenizer_object=tools.fast_tokenizer(tokenizer), bos_token=begin, eos_token=end,
        pad_token=tokenizer.sp.id_to_piece(tokenizer.pad_id), clean_up_tokenization_spaces=False,
        model_max_length=loaded.config.max_seq_len, chat_template=tools.chat_template(),
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(place, save_jinja_files=False)  # fmt: skip
    (place / "tokenizer.model").write_bytes(tokenizer.bytes)


def prove(loaded: Loaded, place: Path, material: parity.Material) -> dict:
    """Compare the folder, as transformers loads it, with the checkpoint."""
    peer = tools.HuggingFaceFolder(place)
    return {
        **parity.origin_of(loaded, material, ["transformers", "tokenizers"]),
        **parity.compare_model(loaded, peer, material),
        **parity.compare_text(loaded, peer.encode, peer.render, material),
    }


def main(cfg: parity.ExportConfig) -> None:
    """Write the folder, prove it, put it in its place."""
    import transformers  # noqa: F401  (if it is missing, that is said before the work)

    source = chosen_run(cfg.checkpoint)
    out = parity.check_out(cfg.out, cfg.force, source)
    loaded = load_model(source)
    tools.require_convertible(loaded.tokenizer, "transformers")
    material = parity.read_material(cfg.text)
    n_bytes = 4 * loaded.model.n_parameters() + 100 * loaded.config.vocab_size
    with parity.new_folder(out, n_bytes) as place:
        write_folder(loaded, place)
        report = prove(loaded, place, material)
        parity.settle(report, place, out)
    parity.show(report, out)


if __name__ == "__main__":
    run(main, parse(parity.ExportConfig, doc=__doc__, positional=("checkpoint",)))
