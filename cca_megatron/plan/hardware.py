"""Every constant of the planner, with its source.

Peaks are NVIDIA's, dense. Shares are what training reaches of them; ``gemm`` and those marked (fitted) were
chosen so that the runs in :mod:`cca_megatron.plan.published` come out right. Other software may reach others.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in a node of eight, and the network between nodes."""

    name: str
    memory: float
    """Bytes, the nominal size. What the driver shows above it (5 GB on an H100) is left to the CUDA context,
    NCCL and fragmentation, which are not reckoned."""
    peak: float
    """FLOP/s in bf16, dense."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s that a collective over the GPUs of a node reaches on each ("bus bandwidth" of nccl-tests)."""
    network: float
    """Bytes/s of the GPU's own card to other nodes, in each direction."""
    gemm: float
    """Share of the peak in large matrix products, sustained over a training step."""
    attention: tuple[float, float]
    """Share of the peak in flash attention with a causal mask, forward and backward."""
    gpus_per_node: int = 8


GPUS = {
    # A100 data sheet (SXM4 80 GB): 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100 has eight
    # cards of 200 Gb/s for compute, and nccl-tests reach about 230 GB/s in one. FlashAttention-2 (arXiv
    # 2307.08691) reports about 190 TFLOP/s forward and 180 backward with causal masks and head dim 128.
    "a100": Gpu("A100 80GB", 80e9, 312e12, 2.039e12, 230e9, 25e9, 0.82, (0.62, 0.58)),
    # H100 data sheet (SXM5): 989.4 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: 8 x 400 Gb/s.
    # FlashAttention-3 (arXiv 2407.08608) and cuDNN report 590 to 690 TFLOP/s forward and 470 to 590 backward
    # with causal masks and head dim 128, at 4k to 128k tokens. nccl-tests in a DGX H100 reach about 370 GB/s.
    "h100": Gpu("H100 80GB", 80e9, 989.4e12, 3.35e12, 370e9, 50e9, 0.66, (0.62, 0.55)),
    # H200 data sheet: an H100 with 141 GB at 4.8 TB/s.
    "h200": Gpu("H200 141GB", 141e9, 989.4e12, 4.8e12, 370e9, 50e9, 0.66, (0.62, 0.55)),
    # HGX B200 data sheet: 180 GB, 7.7 TB/s, 2.25 PFLOP/s, NVLink 1.8 TB/s both ways; 8 x 400 Gb/s. The shares
    # are taken from the H100: no published bf16 run to fit them to.
    "b200": Gpu("B200 180GB", 180e9, 2250e12, 7.7e12, 740e9, 50e9, 0.66, (0.62, 0.55)),
}

TF32_SHARE = 0.5
"""Of the peak in bf16: all data sheets above."""
MEMORY_SHARE = 0.8
"""Of the memory bandwidth, in element-wise kernels. A plain copy on an H100 reaches about 0.9; norms and
activations, which reduce or read several tensors, less. (fitted)"""
NETWORK_SHARE = 0.8
"""Of a card's line rate, in collectives over nodes; nccl-tests over 400 Gb/s reach 80 to 95 %."""
LATENCY = 15e-6
"""Seconds before a collective or exchange begins to move data, with its launch. An order of magnitude: small
all-reduces in nccl-tests take 10 to 30 us in a node and over two."""
HOST_BANDWIDTH = 50e9
"""Bytes/s between GPU and host, each way: PCIe 5.0 x16 is 64 GB/s, of which copies reach about 80 %."""
HIDDEN_GRADIENTS = 0.5
"""Of the backward pass of the last micro-batch, in which data-parallel sums run beside it: the rest goes to
kernels that have the memory bandwidth or the network to themselves. (fitted)"""
STEP_OVERHEAD = 0.02
"""Share of a step for what is not modelled: launches, data, logging, waiting for other ranks. (fitted)"""
