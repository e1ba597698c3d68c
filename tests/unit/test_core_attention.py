"""Local core attention: equal to masked softmax, and never quadratic in memory."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from support.closeness import assert_close
from support.megatron import Layout, parallel, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from cca_megatron.parallel.core_attention import LocalCoreAttention


@pytest.fixture(autouse=True)
def one_rank():
    with parallel(Layout()):
        yield


def core_attention(layer_number=1, mask_type=AttnMaskType.causal, kind="self", **settings):
    config = tiny_config(**settings)
    return LocalCoreAttention(config, layer_number, mask_type, kind, softmax_scale=settings.get("scale"))


def qkv(tokens, batch=2, heads=4, groups=2, dim=8):
    generator = torch.Generator().manual_seed(tokens)

    def draw(count):
        shape = (tokens, batch, count, dim)
        return torch.randn(shape, dtype=torch.float64, generator=generator).cuda().requires_grad_()

    return draw(heads), draw(groups), draw(groups)


def masked_softmax(q, k, v, allowed):
    """The definition, with an S x S mask: [S, B, heads, D] -> [S, B, heads * D]."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbhd,tbhd->bhst", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1).nan_to_num(), v).flatten(2)


def causal(tokens, left=None):
    row, column = torch.arange(tokens).cuda()[:, None], torch.arange(tokens).cuda()
    allowed = column <= row
    return allowed if left is None else allowed & (column >= row - left)


def compare(module, inputs, allowed, **packing):
    expected = masked_softmax(*inputs, allowed)
    packed = bool(packing)
    out = module(*(x.squeeze(1) if packed else x for x in inputs), None, **packing)
    out = out[:, None] if packed else out
    upstream = torch.randn(expected.shape, dtype=expected.dtype, device=expected.device)
    theirs = torch.autograd.grad(expected, inputs, upstream)
    ours = torch.autograd.grad(out, inputs, upstream)
    assert_close("output", expected, out, 1e-12)
    for name, a, b in zip("qkv", theirs, ours, strict=True):
        assert_close(f"gradient of {name}", a, b, 1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_causal_with_grouped_queries(groups, tokens):
    compare(core_attention(), qkv(tokens, groups=groups), causal(tokens))


@pytest.mark.parametrize("left", [0, 1, 3, 16, 40])
def test_sliding_window(left):
    compare(core_attention(window_size=(left, 0)), qkv(17), causal(17, left))


def test_some_layers_have_no_window():
    """``window_attn_skip_freq=2``: every second layer attends to everything."""
    settings = {"window_size": (3, 0), "window_attn_skip_freq": 2}
    compare(core_attention(layer_number=1, **settings), qkv(9), causal(9, 3))
    compare(core_attention(layer_number=2, **settings), qkv(9), causal(9))


@pytest.mark.parametrize("window", [None, (2, 0)])
@pytest.mark.parametrize("ends", [[0, 17], [0, 1, 4, 4, 17], [0, 5, 12]])
def test_packed_documents(ends, window):
    cu_seqlens = torch.tensor(ends, dtype=torch.int32).cuda()
    token = torch.arange(17).cuda()
    document = torch.searchsorted(cu_seqlens[1:], token.int(), right=True)
    allowed = causal(17, window and window[0]) & (document[:, None] == document)
    allowed &= (token < ends[-1])[:, None]
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)
    compare(core_attention(window_size=window), qkv(17, batch=1), allowed, packed_seq_params=packing)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("window", [None, (64, 0)])
def test_memory_is_linear_in_the_sequence(window):
    tokens = 4096
    inputs = qkv(tokens, batch=1, heads=2, groups=1)
    module = core_attention(window_size=window)
    with LargestTensor() as seen:
        module(*inputs, None).sum().backward()
    assert seen.elements <= 4 * tokens * 2 * 8  # a few times the queries
    assert seen.elements < tokens * tokens / 8


def test_dropout_acts_in_training_only():
    module, inputs = core_attention(attention_dropout=0.5), qkv(17)
    expected = masked_softmax(*inputs, causal(17))
    assert not torch.allclose(module(*inputs, None), expected)
    assert_close("evaluation", expected, module.eval()(*inputs, None), 1e-12)


REFUSED = {
    "attention_type='cross'": {"kind": "cross"},
    "attn_mask_type=": {"mask_type": AttnMaskType.padding},
    "softmax_type='learnable'": {"softmax_type": "learnable"},
    "cp_comm_type='a2a\\+p2p'": {"context_parallel_size": 2, "cp_comm_type": "a2a+p2p"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message):
    with pytest.raises(ValueError, match=message):
        core_attention(**REFUSED[message])


def test_refuses_a_bias():
    with pytest.raises(ValueError, match="no bias"):
        core_attention()(*qkv(4), None, attention_bias=torch.zeros(4, 4))


@pytest.mark.parametrize("name", ["qk_clip", "log_max_attention_logit"])
def test_recording_logits_is_refused(name):
    config = tiny_config()
    setattr(config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True"):
        LocalCoreAttention(config, 1, AttnMaskType.causal, "self")
