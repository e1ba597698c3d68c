"""Latencies that the paper publishes, to set the measured ones beside."""

SOURCE = (
    "arXiv 2510.04476, latency figures, read off the vector data: forward pass of core attention without "
    "projections, causal, head dim 64, hidden size 2,048, 16,384 tokens in sequences of each length, bf16, "
    "one H100"
)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
"""Lengths of the sequences."""
FORWARD_MS = {
    "MHA": (0.146, 0.239, 0.429, 0.598, 1.162, 2.325),
    "GQA": (0.114, 0.188, 0.341, 0.479, 0.938, 1.893),
    "MLA": (0.155, 0.253, 0.455, 0.634, 1.232, 2.465),
    "CCA": (0.115, 0.18, 0.31, 0.47, 0.79, 1.43),
    "CCGQA": (0.111, 0.18, 0.32, 0.463, 0.857, 1.665),
}
"""Milliseconds by method; there they are named MHA, GQA-4, MLA, CCA-4x and CCA-2x8x."""


def ratio_to_mha(method: str, tokens: int) -> float | None:
    """Published time over that of MHA at this length; None where the paper has no figure."""
    if method not in FORWARD_MS or tokens not in TOKENS:
        return None
    place = TOKENS.index(tokens)
    return FORWARD_MS[method][place] / FORWARD_MS["MHA"][place]
