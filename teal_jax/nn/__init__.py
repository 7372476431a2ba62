"""The decoder as flax.nnx modules: one Llama- and Mistral-family model, its gates, its kv_cache."""
