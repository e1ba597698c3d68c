"""What the kernels do not take."""

import torch
from torch import Tensor

from cca_kernels.reference import MixWeights

try:
    import triton

    HAVE_TRITON, INTERPRETED = True, bool(triton.knobs.runtime.interpret)
except ImportError:  # no wheels for this platform
    HAVE_TRITON, INTERPRETED = False, False

HEAD_DIMS = (16, 32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_TAPS = 4


def kernel_problems(
    mixed: Tensor, weights: MixWeights, rotary: tuple[Tensor, Tensor] | None = None
) -> list[str]:
    """One message for each thing that keeps the fused kernels from this call; empty if they take it."""
    if not HAVE_TRITON:
        return ["triton is not installed; pip install triton (Linux)"]
    dim = mixed.shape[-1]
    k0, k1 = weights.kernel_sizes
    problems = []
    if not mixed.is_cuda and not INTERPRETED:
        problems.append(
            f"mixed is on {mixed.device}: a CUDA device works; to try kernels without one, start Python with "
            "TRITON_INTERPRET=1"
        )
    elif mixed.is_cuda and torch.cuda.get_device_capability(mixed.device) < (8, 0):
        problems.append("the GPU is older than Ampere: compute capability 8.0 or newer works")
    if mixed.dtype not in _DTYPES:
        problems.append(f"dtype {mixed.dtype}: bfloat16, float16 and float32 work")
    if dim not in HEAD_DIMS:
        problems.append(f"head dim {dim}: one of {HEAD_DIMS} works")
    if max(k0, k1) > _MOST_TAPS:
        problems.append(f"conv kernel sizes {(k0, k1)}: up to {_MOST_TAPS} taps each work")
    if rotary is not None and any(table.requires_grad for table in rotary):
        problems.append("rotary needs a gradient: tables without one work")
    return problems


def can_run() -> bool:
    """Whether the kernels run on this machine, on a GPU or in Triton's interpreter."""
    return HAVE_TRITON and (torch.cuda.is_available() or INTERPRETED)
