"""The same model in the hands of a peer, transformers: for benchmarks and the parity test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model import ModelConfig, Transformer

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# The benchmarked shape: configs/model/43m.yaml with 65,000 pieces.
SHAPE_43M = ModelConfig(vocab_size=65_000)

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """Our parameter's name in transformers: "layers.3.attention.wq.weight" and so on."""
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, number, part = stem.split(".", 2)
        return f"model.layers.{number}.{_NAMES[part]}.weight"
    return f"{_NAMES[stem]}.weight"


def hf_model(config: ModelConfig) -> LlamaForCausalLM:
    """A transformers model of our shape with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # not where ours alone is measured

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_seq_len,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied,
        )
    )


def hf_copy(model: Transformer) -> LlamaForCausalLM:
    """A transformers model with our weights."""
    peer = hf_model(model.config)
    peer.load_state_dict({hf_name(name): weight for name, weight in model.state_dict().items()})
    return peer.eval()
