"""Text to tokens and back, with the tokenizer that a model was trained with."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cca_megatron.data.tokenizer import BYTES_EOD


@dataclass(frozen=True)
class Tokenizer:
    """What generation needs of a tokenizer."""

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    size: int
    end: int | None
    """The token that ends a document."""


def load_tokenizer(args: Namespace, beside: Path) -> Tokenizer:
    """The tokenizer that these arguments of a run name.

    Args:
        args: of the run; changed.
        beside: the folder of a converted checkpoint's tokenizer, if it is one and was moved.

    Raises:
        ValueError: they name none that turns text into tokens.
    """
    if args.tokenizer_type == "NullTokenizer":
        if args.vocab_size != BYTES_EOD + 1:
            raise ValueError(
                f"the checkpoint has no tokenizer (vocab_size={args.vocab_size}): generate from Python with "
                "cca_megatron.inference.generate, whose prompts are numbers"
            )
        return Tokenizer(
            encode=lambda text: list(text.encode()),
            decode=lambda tokens: bytes(tokens).decode("utf-8", "replace"),
            size=BYTES_EOD + 1,
            end=BYTES_EOD,
        )
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    args.rank = 0
    if beside.is_dir() and not Path(str(args.tokenizer_model)).exists():
        args.tokenizer_model = str(beside)
    tokenizer = build_tokenizer(args)
    return Tokenizer(
        encode=lambda text: [int(token) for token in tokenizer.tokenize(text)],
        decode=lambda tokens: tokenizer.detokenize(list(tokens)),
        size=int(tokenizer.vocab_size),
        end=tokenizer.eod,
    )
