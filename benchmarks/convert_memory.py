"""Peak memory and time of converting ZAYA1, both ways, on a synthetic checkpoint with the shapes of ZAYA1-8B.

    python benchmarks/convert_memory.py --layers 8

writes random weights of so many layers (0.4 GB each, 1.1 GB beside them) into a temporary folder, runs
``cca-megatron convert`` on them, and prints what the operating system says of each process.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cca_megatron.hf.safetensors_folder import CONFIG, write_shards
from cca_megatron.hf.tensors import Sizes, tensor_maps

ZAYA1_8B = {
    "model_type": "zaya",
    "vocab_size": 262272,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "moe_intermediate_size": 2048,
    "num_experts": 16,
    "router_hidden_size": 256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "pad_token_id": 0,
}


def write_checkpoint(folder: Path, layers: int) -> dict[str, int]:
    """Random weights in bf16; the number of bytes in all and of the largest tensor."""
    config = ZAYA1_8B | {"num_hidden_layers": layers}
    shapes = {n: s for m in tensor_maps(Sizes.of_config(config)) for n, s in m.hf.items()}
    generator = torch.Generator().manual_seed(1)
    tensors = (
        (name, torch.randn(shape, generator=generator, dtype=torch.bfloat16))
        for name, shape in shapes.items()
    )
    folder.mkdir()
    write_shards(folder, tensors, 2_000_000_000)
    (folder / CONFIG).write_text(json.dumps(config))
    sizes = [2 * torch.Size(shape).numel() for shape in shapes.values()]
    return {"bytes": sum(sizes), "largest_tensor_bytes": max(sizes)}


def measured(*words: str) -> dict[str, float]:
    """Run the command; seconds, and the peak of its resident memory."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "cca_megatron.cli", "convert", *words, "--verify"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"convert failed with status {status}")
    return {"seconds": round(time.monotonic() - started, 1), "peak_bytes": 1024 * usage.ru_maxrss}


def main() -> None:
    """Measure both directions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as temporary:
        source, megatron, back = (Path(temporary) / name for name in ("hf", "megatron", "back"))
        result: dict[str, object] = {"layers": layers, **write_checkpoint(source, layers)}
        result["hf-to-megatron"] = measured("hf-to-megatron", str(source), str(megatron))
        result["megatron-to-hf"] = measured("megatron-to-hf", str(megatron), str(back))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
