import dataclasses

import pytest

from converters import tensor_keys
from converters.keys import check_shapes, is_ignored, leaves, set_leaf
from teal_jax.errors import CheckpointError
from tests.converters.tiny_checkpoint import CONFIG, HF_SHAPES


def test_names_shapes_and_order_are_huggingface_s():
    keys = tensor_keys(CONFIG)
    assert {key.name: key.shape for key in keys} == HF_SHAPES
    assert [key.name for key in keys] == list(HF_SHAPES)


def test_places_in_the_tree():
    by_name = {key.name: key for key in tensor_keys(CONFIG)}
    q = by_name["model.layers.1.self_attn.q_proj.weight"]
    assert (q.path, q.transpose, q.tree_shape) == (("layers", 1, "attn", "q_proj", "weight"), True, (8, 24))
    down = by_name["model.layers.0.mlp.down_proj.weight"]
    assert (down.path, down.tree_shape) == (("layers", 0, "mlp", "down_proj", "weight"), (12, 8))
    embed = by_name["model.embed_tokens.weight"]
    assert (embed.path, embed.transpose, embed.tree_shape) == (("embed", "weight"), False, (20, 8))
    head = by_name["lm_head.weight"]
    assert (head.path, head.transpose, head.tree_shape) == (("lm_head", "weight"), True, (8, 20))
    norms = {
        "model.layers.0.input_layernorm.weight": ("layers", 0, "attn_norm", "weight"),
        "model.layers.0.post_attention_layernorm.weight": ("layers", 0, "mlp_norm", "weight"),
        "model.norm.weight": ("final_norm", "weight"),
    }
    assert {name: by_name[name].path for name in norms} == norms


def test_exactly_the_matrices_of_projections_and_head_are_transposed():
    transposed = {key.path[-2] for key in tensor_keys(CONFIG) if key.transpose}
    assert transposed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_the_config_decides_what_exists():
    tied = {key.name for key in tensor_keys(dataclasses.replace(CONFIG, tie_embeddings=True))}
    assert set(HF_SHAPES) - tied == {"lm_head.weight"}
    biased = tensor_keys(dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True))
    biases = {
        key.name.removeprefix("model.layers.0."): key.shape
        for key in biased
        if ".0." in key.name and "bias" in key.name
    }
    assert biases == {
        "self_attn.q_proj.bias": (24,),
        "self_attn.k_proj.bias": (12,),
        "self_attn.v_proj.bias": (12,),
        "self_attn.o_proj.bias": (8,),
        "mlp.gate_proj.bias": (12,),
        "mlp.up_proj.bias": (12,),
        "mlp.down_proj.bias": (8,),
    }


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_table_holds_every_parameter_of_the_config(biases: bool, tied: bool):
    config = dataclasses.replace(CONFIG, attention_bias=biases, mlp_bias=biases, tie_embeddings=tied)
    total = 0
    for key in tensor_keys(config):
        size = 1
        for axis in key.shape:
            size *= axis
        total += size
    assert total == config.num_params


def test_ignored():
    tied = dataclasses.replace(CONFIG, tie_embeddings=True)
    assert is_ignored("model.layers.3.self_attn.rotary_emb.inv_freq", CONFIG)
    assert is_ignored("lm_head.weight", tied)
    assert not is_ignored("lm_head.weight", CONFIG)
    assert not is_ignored("model.layers.0.self_attn.q_norm.weight", CONFIG)


def test_check_shapes_lists_what_was_expected_and_what_came():
    check_shapes({"a": (1,)}, {"a": (1,)}, what="it")
    with pytest.raises(CheckpointError) as caught:
        check_shapes({"a": (1,), "b": (2, 3), "c": (4,)}, {"b": (3, 2), "c": (4,), "d": (5,)}, what="it")
    message = str(caught.value)
    assert "1 missing, 1 extra, 1 misshapen of 3" in message
    for part in ("missing a [1]", "extra d [5]", "b expected [2, 3], got [3, 2]", "config.json"):
        assert part in message
    assert "\n" not in message


def test_check_shapes_names_only_the_first_of_many():
    with pytest.raises(CheckpointError, match=r"300 missing.*; \.\.\.") as caught:
        check_shapes({f"t{i}": (1,) for i in range(300)}, {}, what="it")
    assert len(str(caught.value)) < 500


def test_leaves_and_set_leaf_are_inverse():
    tree: dict = {}
    set_leaf(tree, ("layers", 0, "a"), 1)
    set_leaf(tree, ("layers", 1, "a"), 2)
    assert tree == {"layers": {0: {"a": 1}, 1: {"a": 2}}}
    assert dict(leaves(tree)) == {("layers", 0, "a"): 1, ("layers", 1, "a"): 2}
