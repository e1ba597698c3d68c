"""Whole attention blocks in plain PyTorch: CCA, and MHA, GQA and MLA on the same core attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cca_kernels import MixOptions, MixWeights
from cca_kernels.triton.accuracy import Mix, random_inputs
from cca_megatron.bench.shapes import MixShape

DIM = 128
ROTARY = 64
"""Rotated channels of a head, for every method: the published models' half, and DeepSeek's extra channels."""


@dataclass(frozen=True)
class Core:
    """``torch.nn.functional.scaled_dot_product_attention`` on one backend."""

    backend: SDPBackend
    pad_value: bool = False
    """Pad values that are narrower than queries, for a backend that wants them alike."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        """q [S, B, Hq, D], k [S, B, Hk, D] and v [S, B, Hk, Dv] to [S, B, Hq * Dv]."""
        width = v.shape[-1]
        if self.pad_value and width < q.shape[-1]:
            v = F.pad(v, (0, q.shape[-1] - width))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        with sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(
                q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out[..., :width].permute(2, 0, 1, 3).flatten(2)


def choose_core(device: torch.device, dtype: torch.dtype) -> Core:
    """The first backend that takes every method, forward and backward: cuDNN's, else FlashAttention.

    Raises:
        RuntimeError: there is none.
    """
    problems = []
    for core in (
        Core(SDPBackend.CUDNN_ATTENTION),
        Core(SDPBackend.CUDNN_ATTENTION, pad_value=True),
        Core(SDPBackend.FLASH_ATTENTION, pad_value=True),
    ):
        try:
            for key_heads, width in ((4, DIM), (16, DIM + ROTARY)):
                q, k, v = (
                    torch.randn(256, 1, heads, size, device=device, dtype=dtype, requires_grad=True)
                    for heads, size in ((16, width), (key_heads, width), (key_heads, DIM))
                )
                core(q, k, v, causal=True).sum().backward()
        except RuntimeError as error:
            problems.append(f"{core.backend.name}: {str(error).splitlines()[0]}")
        else:
            return core
    raise RuntimeError("no fast attention of PyTorch takes all methods here; " + "; ".join(problems))


@dataclass(frozen=True)
class Setup:
    """What the blocks of one measurement have in common."""

    core: Core
    device: torch.device
    dtype: torch.dtype
    tokens: int
    """Of a sequence."""

    def draw(self, batch: int, width: int, seed: int) -> Tensor:
        """Random numbers [tokens, batch, width]."""
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(self.tokens, batch, width, generator=generator, device=self.device)
        return drawn.to(self.dtype)


class Block(nn.Module):
    """Projections in, what comes before attention, core attention, projection out; random, without biases."""

    down: nn.Linear
    up: nn.Linear

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self._core, self._device, self._dtype = setup.core, setup.device, setup.dtype
        self._generator = torch.Generator(setup.device).manual_seed(0)
        positions = torch.arange(setup.tokens, device=setup.device)
        frequencies = 1e4 ** -torch.linspace(0, 1, ROTARY // 2, device=setup.device)
        angles = torch.outer(positions, frequencies).repeat(1, 2)[:, None, None, :]
        self._rotary = angles.cos(), angles.sin()  # no buffers: they stay in fp32

    def _linear(self, width: int, out: int) -> nn.Linear:
        linear = nn.Linear(width, out, bias=False, device=self._device, dtype=self._dtype)
        nn.init.normal_(linear.weight, std=width**-0.5, generator=self._generator)
        return linear

    def attend(self, latents: Tensor, causal: bool = True) -> Tensor:
        """Everything between the projections, [S, B, ...] to [S, B, H * D]."""
        raise NotImplementedError

    def between(self) -> list[Tensor]:
        """Parameters that ``attend`` uses."""
        return []

    def forward(self, x: Tensor) -> Tensor:
        """[S, B, E] to the same."""
        latents: Tensor = self.down(x)
        out: Tensor = self.up(self.attend(latents))
        return out


class CCABlock(Block):
    """CCA or CCGQA."""

    def __init__(self, shape: MixShape, mix: Mix, setup: Setup) -> None:
        super().__init__(setup)
        self._shape, self._mix = shape, mix
        self._options = MixOptions(value_delay_from=shape.settings.value_delay_from)
        self.down = self._linear(shape.hidden, (shape.query_heads + 2 * shape.key_heads) * shape.dim)
        drawn = random_inputs(1, shape.key_heads, shape.queries, shape.dim, setup.dtype, setup.device)
        tensors = (drawn.conv0, drawn.bias0, drawn.conv1, drawn.bias1, drawn.temperature)
        self.mix_weights = nn.ParameterList(nn.Parameter(x) for x in tensors if x is not None)
        self.up = self._linear(shape.query_heads * shape.dim, shape.hidden)

    def attend(self, latents: Tensor, causal: bool = True) -> Tensor:
        """The mix and core attention."""
        mixed = latents.unflatten(-1, (self._shape.key_heads, self._shape.queries + 2, self._shape.dim))
        q, k, v = self._mix(mixed, MixWeights(*self.mix_weights), self._options, rotary=self._rotary)
        return self._core(q, k, v, causal)

    def between(self) -> list[Tensor]:
        return list(self.mix_weights)


class PlainBlock(Block):
    """MHA or GQA. RoPE is compiled, so that it is one kernel as it is in training frameworks."""

    def __init__(self, hidden: int, heads: int, key_heads: int, setup: Setup) -> None:
        super().__init__(setup)
        self._heads = [heads, key_heads, key_heads]
        self._rotate = torch.compile(_rotate_both, dynamic=False, fullgraph=True)
        self.down = self._linear(hidden, sum(self._heads) * DIM)
        self.up = self._linear(heads * DIM, hidden)

    def attend(self, latents: Tensor, causal: bool = True) -> Tensor:
        """RoPE and core attention."""
        q, k, v = latents.unflatten(-1, (-1, DIM)).split(self._heads, 2)
        q, k = self._rotate(q, k, *self._rotary)
        return self._core(q, k, v, causal)


class MLABlock(Block):
    """Multi-head latent attention as in DeepSeek-V2 (arXiv 2405.04434), with ranks that follow the width.

    Keys and values come from a latent of rank E/4, queries from one of rank 3E/4, both normalised. Heads have
    128 channels and 64 rotated ones more, which all keys share; values have 128.
    """

    def __init__(self, hidden: int, heads: int, setup: Setup) -> None:
        super().__init__(setup)
        self._ranks = [3 * hidden // 4, hidden // 4, ROTARY]
        self._assemble = torch.compile(_assemble, dynamic=False, fullgraph=True)
        self.down = self._linear(hidden, sum(self._ranks))
        self.up_query = self._linear(self._ranks[0], heads * (DIM + ROTARY))
        self.up_key_value = self._linear(self._ranks[1], heads * 2 * DIM)
        self.up = self._linear(heads * DIM, hidden)

    def attend(self, latents: Tensor, causal: bool = True) -> Tensor:
        """Projections up, RoPE, core attention."""
        q, kv, key_rotary = latents.split(self._ranks, -1)
        q = self.up_query(F.rms_norm(q, q.shape[-1:])).unflatten(-1, (-1, DIM + ROTARY))
        kv = self.up_key_value(F.rms_norm(kv, kv.shape[-1:])).unflatten(-1, (-1, 2 * DIM))
        q, k = self._assemble(q, kv, key_rotary[:, :, None], *self._rotary)
        return self._core(q, k, kv[..., DIM:], causal)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last channels of [S, B, heads, D]."""
    width = cos.shape[-1]
    passed, turned = x[..., :-width], x[..., -width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    return torch.cat([passed, (turned * cos + half * sin).to(x.dtype)], -1)


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _assemble(q: Tensor, kv: Tensor, key_rotary: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q with its last channels turned, and keys with the shared, turned channels behind their own."""
    shared = _rotate(key_rotary, cos, sin).expand(-1, -1, kv.shape[2], -1)
    return _rotate(q, cos, sin), torch.cat([kv[..., :DIM], shared], -1)
