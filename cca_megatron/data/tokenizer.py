"""Tokenizers by a short name, the same for preparing data and for training on it.

========================= =====================================================================
``bytes``                 the 256 bytes of UTF-8, and an end-of-document token
``hf:NAME_OR_PATH``       a Hugging Face tokenizer
``sentencepiece:PATH``    a SentencePiece model
========================= =====================================================================
"""

import importlib.util
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cca_megatron.data.sources import DataError

BYTES = "bytes"
BYTES_EOD = 256


@dataclass(frozen=True)
class Encoder:
    """A tokenizer reduced to what writing a dataset needs."""

    encode: Callable[[str], np.ndarray]
    """Text to token ids, without the end-of-document token."""
    end_of_document: int
    vocab_size: int


def megatron_arguments(name: str) -> dict[str, Any]:
    """The Megatron arguments, by their option names, that select this tokenizer for training.

    Raises:
        DataError: the name is none of the three forms, or its file does not exist.
    """
    kind, _, value = name.partition(":")
    if name == BYTES:
        return {"tokenizer-type": "NullTokenizer", "vocab-size": BYTES_EOD + 1}
    if kind == "hf" and value:
        return {"tokenizer-type": "HuggingFaceTokenizer", "tokenizer-model": value}
    if kind == "sentencepiece" and value:
        if not Path(value).is_file():
            raise DataError(f"tokenizer {name!r}: {Path(value).resolve()} does not exist")
        return {"tokenizer-type": "SentencePieceTokenizer", "tokenizer-model": value}
    raise DataError(f"unknown tokenizer {name!r}; use 'bytes', 'hf:NAME_OR_PATH' or 'sentencepiece:PATH'")


def load_encoder(name: str) -> Encoder:
    """The tokenizer of that name; for all but ``bytes`` exactly the one that Megatron trains with.

    Raises:
        DataError: it does not exist, cannot be loaded, or has no end-of-document token.
    """
    arguments = megatron_arguments(name)
    if name == BYTES:
        return Encoder(lambda text: np.frombuffer(text.encode("utf-8"), np.uint8), BYTES_EOD, BYTES_EOD + 1)
    package = {"hf": "transformers", "sentencepiece": "sentencepiece"}[name.partition(":")[0]]
    if importlib.util.find_spec(package) is None:
        raise DataError(f"tokenizer {name!r} needs {package}. Run: pip install {package}")
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import add_megatron_arguments

    argv = [token for key, value in arguments.items() for token in (f"--{key}", str(value))]
    args = add_megatron_arguments(ArgumentParser(allow_abbrev=False)).parse_args(argv)
    args.rank = 0
    try:
        tokenizer = build_tokenizer(args)
        end_of_document = tokenizer.eod
    except Exception as error:  # whatever the tokenizer's own library raises
        raise DataError(f"tokenizer {name!r} cannot be loaded: {error}") from error
    if end_of_document is None or end_of_document < 0:
        raise DataError(f"tokenizer {name!r} has no end-of-document (eos) token")
    return Encoder(
        lambda text: np.asarray(tokenizer.tokenize(text), np.int64),
        int(end_of_document),
        int(tokenizer.vocab_size),
    )
