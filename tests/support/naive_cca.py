"""CCA's mix once more, token by token and head by head, as the paper's steps say it.

Slow, and independent of the code under test: loops instead of convs, a dictionary of past tokens
instead of padding. Only for tests.
"""

from itertools import pairwise

import torch
from torch import Tensor

from cca_kernels import Boundary, MixOptions, MixWeights


def naive_mix(
    mixed: Tensor,
    weights: MixWeights,
    options: MixOptions,
    *,
    rotary: tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    boundary: Boundary | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, batch, _, heads, dim = mixed.shape
    queries = heads - 2
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    zero = 0 * mixed[0]  # padding is zero, and has a (zero) gradient
    q = [zero[:, :, :queries].reshape(batch, -1, dim)] * tokens
    k, v = [zero[:, :, queries]] * tokens, [zero[:, :, -1]] * tokens
    for number, (start, end) in enumerate(pairwise(ends)):
        for t in range(start, end):

            def latent(s: int, start: int = start, number: int = number) -> Tensor:
                """[B, G, R+1, D] at token s, which may lie before the segment."""
                if s >= start:
                    return mixed[s, :, :, :-1]
                if boundary is None:
                    return torch.zeros_like(mixed[0, :, :, :-1])
                return boundary.latents[number, s - start + weights.boundary_rows]

            out = _conv1(latent, t, weights)
            if options.qk_mean:
                mean_q = 0.5 * (mixed[t, :, :, :queries] + mixed[t, :, :, queries : queries + 1])
                mean_k = sum(mean_q[:, :, r] for r in range(queries)) / queries
                out = out + torch.cat([mean_q, mean_k[:, :, None]], 2)
            norm = out.pow(2).sum(-1, keepdim=True).sqrt()
            unit = torch.where(norm > 0, out / norm.where(norm > 0, 1), 0 * out) * dim**0.5
            temperature = weights.temperature
            tau = temperature.exp() if options.temperature_form == "exp" else temperature
            q[t] = _rope(unit[:, :, :queries].reshape(batch, -1, dim), rotary, t, options)
            k[t] = _rope(unit[:, :, queries] * tau[:, None], rotary, t, options)
            v[t] = _value(mixed, t, start, number, options, boundary)
    return torch.stack(q), torch.stack(k), torch.stack(v)


def _conv0(latent, t: int, weights: MixWeights) -> Tensor:
    x = latent(t)
    if weights.conv0_weight is None:
        return x
    taps = weights.kernel_sizes[0]
    out = 0
    for tap in range(taps):
        weight = weights.conv0_weight[:, 0, tap].view(x.shape[1:])
        out = out + weight * latent(t - (taps - 1 - tap))
    return out if weights.conv0_bias is None else out + weights.conv0_bias.view(x.shape[1:])


def _conv1(latent, t: int, weights: MixWeights) -> Tensor:
    if weights.conv1_weight is None:
        return _conv0(latent, t, weights)
    taps = weights.kernel_sizes[1]
    shape = latent(t).shape  # [B, G, R+1, D]
    out = torch.zeros(shape, dtype=latent(t).dtype)
    columns = []
    for head in range(shape[1] * shape[2]):
        rows = slice(head * shape[3], (head + 1) * shape[3])
        y = 0
        for tap in range(taps):
            x = _conv0(latent, t - (taps - 1 - tap), weights).flatten(1, 2)[:, head]
            y = y + x @ weights.conv1_weight[rows, :, tap].T
        columns.append(y if weights.conv1_bias is None else y + weights.conv1_bias[rows])
    return out + torch.stack(columns, 1).view(shape)


def _value(mixed: Tensor, t: int, start: int, number: int, options, boundary) -> Tensor:
    current = mixed[t, :, :, -1].flatten(1)
    first = options.value_delay_from
    if first is None:
        return current.view(mixed[t, :, :, -1].shape)
    if t > start:
        previous = mixed[t - 1, :, :, -1].flatten(1)[:, first:]
    elif boundary is not None:
        previous = boundary.value[number]
    else:
        previous = torch.zeros_like(current[:, first:])
    return torch.cat([current[:, :first], previous], 1).view(mixed[t, :, :, -1].shape)


def _rope(x: Tensor, rotary, t: int, options: MixOptions) -> Tensor:
    if rotary is None:
        return x
    cos, sin = rotary[0][t], rotary[1][t]  # [1 or B, 1, width]
    width = cos.shape[-1]
    out = [x[..., i] for i in range(x.shape[-1])]
    for i in range(width // 2):
        a, b = (2 * i, 2 * i + 1) if options.rotary_interleaved else (i, i + width // 2)
        out[a] = x[..., a] * cos[..., a] - x[..., b] * sin[..., a]
        out[b] = x[..., b] * cos[..., b] + x[..., a] * sin[..., b]
    return torch.stack(out, -1)
