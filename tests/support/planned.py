"""Small models as the planner sees them and as Megatron builds them, from one recipe."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from cca_megatron import local_backend
from cca_megatron.training.command import build_command
from cca_megatron.training.model import model_config_from_args
from cca_megatron.training.recipe import load_recipe

SEQUENCE = 64
DENSE = {
    "preset": "ccgqa_2x8x",
    "hidden-size": 256,
    "kv-channels": 16,
    "num-layers": 3,
    "ffn-hidden-size": 352,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "position-embedding-type": "rope",
    "max-position-embeddings": SEQUENCE,
    "hidden-dropout": 0.0,
    "attention-dropout": 0.0,
    "padded-vocab-size": 384,
}
MOE = DENSE | {
    "num-experts": 4,
    "moe-ffn-hidden-size": 160,
    "moe-router-topk": 2,
    "moe-router-load-balancing-type": "none",
    "moe-layer-freq": [0, 1, 1],
    "moe-token-dispatcher-type": "alltoall",
}
ZAYA = MOE | {
    "moe-layer-freq": 1,
    "moe-router-topk": 1,
    "moe-router-pre-softmax": True,
    "fp32-residual-connection": True,
    "moe-router-dtype": None,
}
ZAYA_PARTS = {"router_hidden_size": 24, "skip_class": False}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "untied": (DENSE | {"untie-embeddings-and-output-weights": True}, {}),
    "with biases": (
        DENSE | {"disable-bias-linear": None, "normalization": "LayerNorm", "swiglu": None},
        {"cca": {"conv_kernel_sizes": [3, 4]}},
    ),
    "learned positions": (DENSE | {"position-embedding-type": "learned_absolute"}, {}),
    "fewer convs": (DENSE, {"cca": {"conv0": False, "conv_bias": False}}),
    "window": (DENSE | {"window-size": [15, 0], "window-attn-skip-freq": [1, 0, 1]}, {}),
    "experts": (MOE, {}),
    "shared experts": (MOE | {"moe-shared-expert-intermediate-size": 96}, {}),
    "zaya": (ZAYA, {"zaya": ZAYA_PARTS}),
    "zaya that skips": (ZAYA, {"zaya": ZAYA_PARTS | {"skip_class": True}}),
}


TRAINING = {
    "micro-batch-size": 2,
    "global-batch-size": 2,
    "train-iters": 4,
    "lr": 1e-3,
    "mock-data": True,
    "tokenizer-type": "NullTokenizer",
    "vocab-size": 300,
}
"""Of a few steps on random tokens, but for the length of the sequence."""


def arguments(folder: Path, model: dict[str, Any], sections: dict[str, Any], **megatron: Any) -> Namespace:
    """What Megatron is given for this model, in bf16 unless told otherwise."""
    settings = TRAINING | {"seq-length": SEQUENCE, "bf16": True}
    settings |= {name.replace("_", "-"): value for name, value in megatron.items()}
    gpus = settings.pop("gpus", 1)
    content = {"model": model, "megatron": settings, "launch": {"gpus_per_node": gpus}, **sections}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return build_command(load_recipe(path, []), "cpu").args


def built(args: Namespace) -> GPTModel:
    """The model of this rank's stage, on the current layout, with the activation fused as on a GPU."""
    config = model_config_from_args(args)
    config.transformer.bias_activation_fusion = args.swiglu
    config.transformer.params_dtype = torch.bfloat16 if args.bf16 else torch.float32
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return builder.build_model(groups, pre_process=True, post_process=True).to(
        config.transformer.params_dtype
    )


class _NormOfAGpu(torch.autograd.Function):
    """What norms keep on a GPU: input, weight, one number per row. PyTorch on a CPU keeps two fp32 copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.float().pow(2).mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        return gradients[0] * scale * weight, (gradients[0] * x * scale).flatten(0, -2).sum(0), None


@contextlib.contextmanager
def norms_of_a_gpu(monkeypatch: Any) -> Iterator[None]:
    """Let RMS norms keep what they keep on a GPU."""
    from cca_megatron.zaya import router

    def rms_norm(x: Tensor, _: Any, weight: Tensor, eps: float) -> Tensor:
        return _NormOfAGpu.apply(x, weight, eps)

    with monkeypatch.context() as patch:
        for module in (local_backend, router):
            patch.setattr(module.F, "rms_norm", rms_norm)
        yield
