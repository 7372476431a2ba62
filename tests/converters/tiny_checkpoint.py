"""A checkpoint small enough to be written out by hand."""

from teal_jax.config import ModelConfig, RopeConfig

HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIG = ModelConfig(
    vocab_size=20,
    d_model=8,
    d_mlp=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=10000.0),
    bos_token_id=1,
    eos_token_ids=(2,),
)
"""What `HF_CONFIG` means."""

HF_SHAPES = {
    "model.embed_tokens.weight": (20, 8),
    **{
        f"model.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "input_layernorm.weight": (8,),
            "self_attn.q_proj.weight": (24, 8),
            "self_attn.k_proj.weight": (12, 8),
            "self_attn.v_proj.weight": (12, 8),
            "self_attn.o_proj.weight": (8, 24),
            "post_attention_layernorm.weight": (8,),
            "mlp.gate_proj.weight": (12, 8),
            "mlp.up_proj.weight": (12, 8),
            "mlp.down_proj.weight": (8, 12),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
"""Every tensor of `HF_CONFIG`'s checkpoint, written out by hand."""
