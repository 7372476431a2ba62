"""Generation: the compiled decode loop, sampling, streaming text, chat, the tokenizer."""
