"""Train the student's tokenizer: byte-level BPE, no unknown token, any UTF-8 text comes back as it was.

`<|endoftext|>` (id 0) stands before every story and is what the model says after one: it is bos and eos at once.

    python scripts/embedded/make_tokenizer.py samples/*.txt --out tokenizer
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SEPARATOR = "<|endoftext|>"
PAD = "<|pad|>"


def make_tokenizer(stories, vocab_size):
    """A tokenizer of `vocab_size` tokens: two special ones, 256 bytes, merges by frequency."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", pair=f"{SEPARATOR} $A {SEPARATOR} $B", special_tokens=[(SEPARATOR, 0)]
    )
    return tokenizer


def write_tokenizer(tokenizer, directory, max_length):
    """tokenizer.json and the tokenizer_config.json that transformers wants beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "pad_token": PAD,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main():
    """Read text shards, train, write, and say how many bytes a token holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", type=Path, help="text shards of sample_stories.py")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--max-length", type=int, default=512)
    args = parser.parse_args()
    stories = [s.strip("\n") for path in args.text for s in path.read_text(encoding="utf-8").split(SEPARATOR)]
    stories = [story for story in stories if story]
    tokenizer = make_tokenizer(stories, args.vocab_size)
    write_tokenizer(tokenizer, args.out, args.max_length)
    sample = stories[:500]
    tokens = sum(len(encoding.ids) - 1 for encoding in tokenizer.encode_batch(sample))
    size = sum(len(story.encode()) for story in sample)
    print(f"{len(stories)} stories, {tokenizer.get_vocab_size()} tokens, {size / tokens:.2f} bytes a token")


if __name__ == "__main__":
    main()
