"""``cca-megatron generate``: continue prompts with a checkpoint."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn

from cca_megatron.inference.worker import FAILED, Answer, Request, answer
from cca_megatron.terminal import console, counted_bar, fail


def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint folder of Megatron: runs/quickstart/checkpoints."),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; may be given several times.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A file with a prompt on each line.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each prompt, at most.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0 takes the likeliest token, 1 draws by probability."),
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    step: Annotated[int | None, typer.Option(help="Iteration; by default the latest.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Processes (GPUs) that share the model.")] = 1,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompts that go through the model at once.")
    ] = 2048,
    dtype: Annotated[
        str, typer.Option(help="`bf16`, `fp16` or `fp32`; `auto` is the checkpoint's, on a CPU fp32.")
    ] = "auto",
) -> None:
    """Continue prompts, which may differ in length, with keys, values and conv states kept.

    Prints each continuation, and how many bytes the cache takes for a token compared with multi-head
    attention. For example:
    `cca-megatron generate runs/quickstart/checkpoints --prompt "def main(" --temperature 0.7`.
    """
    from cca_megatron.training.checkpoint import open_checkpoint
    from cca_megatron.training.recipe import RecipeError
    from cca_megatron.training.session import load_megatron_here

    try:
        prompts = _prompts(prompt or [], prompt_file)
        _check(top_p, dtype)
        device = load_megatron_here()
        directory, _ = open_checkpoint(checkpoint, step)
        request = Request(
            checkpoint=str(directory),
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            device=device,
            tensor_parallel=tensor_parallel,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chunk_size=chunk_size,
            dtype=dtype,
        )
        result = _answer(request)
    except (RecipeError, ValueError, OSError, RuntimeError, AssertionError) as error:
        fail(error)
    _show(request, result)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    lines = [] if file is None else [line for line in file.read_text().splitlines() if line]
    prompts = given + lines
    if not prompts or not all(prompts):
        raise ValueError("no prompt: give --prompt TEXT, which is not empty, or --prompt-file FILE")
    return prompts


def _check(top_p: float, dtype: str) -> None:
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p={top_p}: must lie above 0 and be at most 1; 0.9 works")
    if dtype not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"dtype={dtype!r}: must be auto, bf16, fp16 or fp32")


def _answer(request: Request) -> Answer:
    if request.tensor_parallel == 1:
        with counted_bar(console, "generating", MofNCompleteColumn()) as report:
            return answer(request, lambda count: report(count, request.max_new_tokens))
    with tempfile.TemporaryDirectory() as folder, console.status("generating"):
        file = Path(folder) / "answer.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={request.tensor_parallel}",
            "-m", "cca_megatron.inference.worker", request.to_json(), str(file),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reasons = result.stderr.split(FAILED)[1:]  # of one or more ranks
            raise RuntimeError(reasons[0].strip() if reasons else f"a process failed:\n{result.stderr}")
        return Answer(**json.loads(file.read_text()))


def _show(request: Request, result: Answer) -> None:
    for prompt, text in zip(request.prompts, result.texts, strict=True):
        typer.echo(prompt + text + "\n")  # as it is: no markup, no emoji, tabs kept
    rate = sum(result.tokens) / max(result.seconds, 1e-9)
    console.print(f"{sum(result.tokens)} tokens in {result.seconds:.1f} s, {rate:.1f} tokens/s")
    console.print(
        f"cache: {result.cache_bytes:,} bytes per token, {result.mha_bytes / result.cache_bytes:.3g} times "
        f"less than MHA's {result.mha_bytes:,}; and {result.state_bytes:,} bytes per sequence for convs and "
        "value shift",
        soft_wrap=True,
    )
