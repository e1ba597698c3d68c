"""A recipe that two processes train in seconds, with its own few texts."""

from pathlib import Path

import yaml

MODEL = {
    "num-layers": 2,
    "hidden-size": 32,
    "ffn-hidden-size": 48,
    "swiglu": True,
    "disable-bias-linear": True,
    "num-attention-heads": 4,
    "num-query-groups": 2,
    "kv-channels": 8,
    "max-position-embeddings": 32,
}
"""A dense one."""


def small_recipe(folder: Path, iterations: int) -> Path:
    """Write texts and a recipe of a small mixture of experts below a folder; data and output go there too."""
    texts = folder / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number:02}.txt").write_text(f"{number} bottles of water on the wall\n" * 20)
    content = {
        "model": MODEL
        | {
            "num-experts": 2,
            "moe-layer-freq": [0, 1],
            "moe-router-topk": 1,
            "moe-router-pre-softmax": True,
        },
        "megatron": {
            "expert-model-parallel-size": 2,
            "use-distributed-optimizer": True,
            "seq-length": 32,
            "micro-batch-size": 2,
            "train-iters": iterations,
            "lr": 1.0e-2,
            "lr-warmup-iters": 1,
            "split": "90,10,0",
            "eval-iters": 1,
            "eval-interval": 100_000,
            "save-interval": 100_000,
            "log-interval": 1,
            "tensorboard-log-interval": 1,
            "num-workers": 0,
        },
        "data": {"inputs": [str(texts)], "prefix": str(folder / "data/texts"), "tokenizer": "bytes"},
        "output": str(folder / "run"),
        "launch": {"gpus_per_node": 2},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
