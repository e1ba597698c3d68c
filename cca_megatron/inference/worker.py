"""The process that generates, one per tensor-parallel rank; ``cca-megatron generate`` starts it."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cca_megatron.training.device import Device

FAILED = "cannot generate: "
"""How a process begins its last line if the user can mend what is wrong."""


@dataclass(frozen=True)
class Request:
    """What to generate, and from which checkpoint."""

    checkpoint: str
    """The folder of one iteration."""
    prompts: list[str]
    max_new_tokens: int
    device: Device
    tensor_parallel: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chunk_size: int = 2048
    dtype: str = "auto"

    def to_json(self) -> str:
        """As one argument of a command line."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Answer:
    """What came of it."""

    texts: list[str]
    tokens: list[int]
    """New tokens of each prompt."""
    seconds: float
    cache_bytes: int
    """Keys and values of a token, over all layers and ranks."""
    mha_bytes: int
    """The same for multi-head attention of the model's width."""
    state_bytes: int
    """What convs and value shift keep of a sequence, whatever its length."""


def answer(request: Request, on_token: Any = None) -> Answer:
    """Load the model and generate; in a process group if there are several ranks."""
    if request.device == "cpu":
        from cca_megatron.training import cpu_backend

        cpu_backend.install()
    import time

    import torch
    import torch.distributed as dist

    from cca_megatron.inference.generate import Sampling, generate
    from cca_megatron.inference.load import load_model
    from cca_megatron.inference.text import load_tokenizer
    from cca_megatron.training.checkpoint import open_checkpoint

    directory, args = open_checkpoint(request.checkpoint)
    backend = "gloo" if request.device == "cpu" else "nccl"
    if request.tensor_parallel == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    try:
        dtype = _dtype(request, args)
        model = load_model(directory, args, request.tensor_parallel, dtype)
        tokenizer = load_tokenizer(args, directory.parent / "tokenizer")
        started = time.monotonic()
        new, context = generate(
            model,
            [tokenizer.encode(prompt) for prompt in request.prompts],
            request.max_new_tokens,
            sampling=Sampling(request.temperature, request.top_p, request.seed),
            stop=() if tokenizer.end is None else (tokenizer.end,),
            vocab_size=tokenizer.size,
            chunk_size=request.chunk_size,
            on_token=on_token,
        )
        seconds = time.monotonic() - started
        states = torch.tensor(context.state_bytes, device=torch.cuda.current_device())
        dist.all_reduce(states)
        slots = context.max_batch_size * context.max_sequence_length
        return Answer(
            texts=[tokenizer.decode(tokens) for tokens in new],
            tokens=[len(tokens) for tokens in new],
            seconds=seconds,
            cache_bytes=context.cache_bytes * request.tensor_parallel // slots,
            mha_bytes=2 * dtype.itemsize * args.num_layers * args.hidden_size,
            state_bytes=int(states) // context.max_batch_size,
        )
    finally:
        dist.destroy_process_group()


def _dtype(request: Request, args: Any) -> Any:
    import torch

    name = request.dtype
    if name == "auto":
        name = "fp32" if request.device == "cpu" else "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def main() -> None:
    """Answer the request in the first argument; rank 0 writes the answer to the file in the second."""
    try:
        result = answer(Request(**json.loads(sys.argv[1])))
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        raise SystemExit(f"{FAILED}{error}") from error
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
