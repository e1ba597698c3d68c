"""One way to compare tensors, and one message when they differ."""

from torch import Tensor


def relative_error(reference: Tensor, other: Tensor) -> float:
    """|other - reference| / |reference| over all elements, in fp64; |other| if the reference is zero."""
    reference, other = reference.double(), other.double()
    scale = reference.norm().item()
    return (other - reference).norm().item() / (scale or 1.0)


def assert_close(name: str, reference: Tensor, other: Tensor, bound: float) -> None:
    """Fail unless shapes agree, everything is finite and the relative error is within the bound."""
    assert reference.shape == other.shape, f"{name}: {tuple(other.shape)} for {tuple(reference.shape)}"
    assert other.isfinite().all(), f"{name}: not finite"
    error = relative_error(reference, other)
    assert error <= bound, f"{name}: relative error {error:.2e}, allowed {bound:.0e}"
