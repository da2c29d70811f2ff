"""Tiny random decoders for the tests of decoder retrievers."""

from pathlib import Path

from tests.fakes import byte_tokenizer, tiny_model


def tiny_decoder(folder: Path, kind: str = "llama", **changes) -> str:
    """The folder of a random decoder with a byte tokenizer, and its language model head."""
    tokenizer = byte_tokenizer("yes", "no", "<|endoftext|>")
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(folder)
    tiny_model(kind, len(tokenizer), **changes).save_pretrained(folder)
    return str(folder)
