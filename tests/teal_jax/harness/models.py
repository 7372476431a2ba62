"""A tiny model with a byte-level tokenizer and a chat template."""

import dataclasses

from teal_jax.decode.tokenizer import Tokenizer
from tests.teal_jax.decode import lively, tiny_tokenizers

CONFIG = dataclasses.replace(lively.CONFIG, max_position=96)


def tiny_speaker(directory):
    """Sparse, so that dense prefixes matter."""
    tokenizer = Tokenizer.from_directory(tiny_tokenizers.byte_level(directory, template=True), CONFIG)
    return dataclasses.replace(lively.sparse(lively.lively_model(CONFIG, tokenizer)), name="tiny")
