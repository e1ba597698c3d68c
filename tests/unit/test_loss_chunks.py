"""The loss in chunks: the same numbers as all tokens at once, in a fraction of the memory."""

import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, layers, vocab_parallel_cross_entropy
from support.chunked_loss import assert_same, computed, in_double, largest_chunk
from support.closeness import relative_error
from support.megatron import Layout, parallel, tiny_config

from cca_megatron.bench.live_bytes import LiveBytes
from cca_megatron.training import loss as loss_module
from cca_megatron.training.argument_rules import argument_problems
from cca_megatron.training.arguments import add_arguments
from cca_megatron.training.loss import chunked_loss

ONE = Layout()


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
@pytest.mark.parametrize("chunk_size", [1, 12, 1000])
def test_losses_and_gradients_are_those_of_all_tokens_at_once(chunk_size, tied):
    """Chunks of one position, chunks that do not divide the sequence, and one chunk."""
    assert_same(computed(ONE, None, tied=tied), computed(ONE, chunk_size, tied=tied), 1e-6)


def test_a_chunk_has_as_many_tokens_as_asked_for_over_all_samples():
    assert largest_chunk(ONE, 12) == 12
    assert largest_chunk(ONE, 1) == 2  # one position of both samples


def test_exact_in_double():
    def prepare(model):
        model.compute_language_model_loss = in_double

    settings = {"dtype": torch.float64, "prepare": prepare}
    assert_same(computed(ONE, None, **settings), computed(ONE, 12, **settings), 1e-12)


def smoothed(model):
    def loss(labels, logits):
        return vocab_parallel_cross_entropy(logits, labels.t().contiguous(), label_smoothing=0.1).t()

    model.compute_language_model_loss = loss


def scaled(model):
    model._scale_logits = lambda logits: 0.5 * logits


@pytest.mark.parametrize("prepare", [smoothed, scaled])
def test_what_a_model_does_with_its_logits_holds(prepare):
    """Label smoothing, MuP's factor: the chunks go through the model's own functions."""
    plain, expected = computed(ONE, None), computed(ONE, None, prepare=prepare)
    assert relative_error(expected["losses"], plain["losses"]) > 1e-3
    assert_same(expected, computed(ONE, 12, prepare=prepare), 1e-6)


def test_megatrons_fused_loss_in_chunks():
    settings = {"cross_entropy_loss_fusion": True, "dtype": torch.bfloat16}
    expected, got = computed(ONE, None, **settings), computed(ONE, 12, **settings)
    assert_same(expected, got, 5e-3)


def test_many_chunks_round_no_more_than_one():
    """In bf16 the sum of 16 parts, rounded with every addition, would be further from fp64."""
    weight = "gradient of output_layer.weight"
    exact = computed(ONE, None, dtype=torch.float64)[weight]
    for ddp in ({"grad_reduce_in_fp32": True}, {}):
        errors = [
            relative_error(exact, computed(ONE, size, dtype=torch.bfloat16, ddp=ddp)[weight])
            for size in (None, 2)
        ]
        assert errors[1] <= 1.02 * errors[0]


def test_a_frozen_output_weight():
    def prepare(model):
        model.output_layer.weight.requires_grad_(False)

    assert_same(computed(ONE, None, prepare=prepare), computed(ONE, 12, prepare=prepare), 1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["own weight", "tied"])
def test_a_weight_gradient_that_the_layer_adds_to_main_grad(tied, monkeypatch):
    """What Megatron does with Apex: the gradient that autograd sees is then an empty stand-in."""

    def accumulate(inputs, gradient, main_grad):
        main_grad += gradient.t() @ inputs

    expected = computed(ONE, None, tied=tied)
    kernels = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernels, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    assert_same(expected, computed(ONE, 12, tied=tied, gradient_accumulation_fusion=True), 1e-6)


BROKEN = {
    "the last chunk's gradients are dropped": lambda right, self, hidden, *rest: [
        None if part is None else part * (len(hidden) == self.positions)
        for part in right(self, hidden, *rest)
    ],
    "what tokens count for is ignored": lambda right, self, *inputs: right(
        self, *inputs[:-1], torch.ones_like(inputs[-1])
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_mistake_is_noticed(mistake, monkeypatch):
    right = loss_module._Head.gradients
    monkeypatch.setattr(loss_module._Head, "gradients", lambda *args: BROKEN[mistake](right, *args))
    with pytest.raises(AssertionError, match="gradient of .* relative error"):
        assert_same(computed(ONE, None), computed(ONE, 12), 1e-6)


def test_only_the_last_chunk_in_the_weight_is_noticed(monkeypatch):
    monkeypatch.setattr(loss_module, "_weight_gradient_sum", lambda *_: None)
    with pytest.raises(AssertionError, match="gradient of output_layer.weight: relative error"):
        assert_same(computed(ONE, None), computed(ONE, 12), 1e-6)


def live_bytes(tokens: int, vocabulary: int, hidden: int, chunk_size: int | None) -> LiveBytes:
    """Of the output layer and the loss, forward and backward in fp32 under Megatron's data parallelism."""
    with parallel(ONE):
        config = tiny_config(hidden_size=hidden, params_dtype=torch.float32)
        layer = ColumnParallelLinear(
            hidden, vocabulary, config=config, init_method=config.init_method, bias=False
        )
        DistributedDataParallel(config, DistributedDataParallelConfig(), layer)
        language = LanguageModule(config)
        states = torch.randn(tokens, 1, hidden).requires_grad_()
        labels = torch.randint(0, vocabulary, (1, tokens))
        with LiveBytes(made_before=[states, layer.weight, layer.weight.main_grad]) as live:
            if chunk_size is None:
                losses = language.compute_language_model_loss(labels, layer(states)[0])
            else:
                losses = chunked_loss(
                    hidden_states=states,
                    output_layer=layer,
                    output_weight=None,
                    labels=labels,
                    context=chunk_size,
                    compute_language_model_loss=language.compute_language_model_loss,
                    scale_logits=language._scale_logits,
                )
            losses.mean().backward()
    return live


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "hidden"),
    [(2048, 8192, 32), pytest.param(16384, 65536, 512, marks=pytest.mark.long)],
)
def test_a_tenth_of_the_memory(tokens, vocabulary, hidden, record_property):
    plain, chunked = (live_bytes(tokens, vocabulary, hidden, size) for size in (None, tokens // 64))
    record_property("peak bytes", (plain.peak, chunked.peak))
    assert plain.largest == 4 * tokens * vocabulary
    assert chunked.largest == 4 * vocabulary * max(tokens // 64, hidden)
    assert plain.peak >= 10 * chunked.peak


def problems(monkeypatch, *words: str) -> list[str]:
    from megatron.training.arguments import parse_args

    model = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention"
    model += (
        " --num-query-groups 2 --kv-channels 8 --seq-length 16 --micro-batch-size 1 --train-iters 4 --lr 1"
    )
    monkeypatch.setattr(sys, "argv", ["train", *model.split(), *words])
    return argument_problems(parse_args(extra_args_provider=add_arguments("cpu")))


REFUSED = {
    "loss_chunk_size=0: must be a whole number of at least 1": "--loss-chunk-size 0",
    "loss_chunk_size=8 with hybrid_layer_pattern='*-*-': ": "--hybrid-layer-pattern *-*-",
    "loss_chunk_size=8 with mtp_num_layers=1: ": "--mtp-num-layers 1",
    "loss_chunk_size=8 with use_megatron_fsdp, ": "--use-megatron-fsdp",
    "loss_chunk_size=8 with defer_embedding_wgrad_compute: ": "--defer-embedding-wgrad-compute",
    "loss_chunk_size=8 with fp8_output_proj: ": "--fp8-output-proj",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_would_be_ignored_is_refused(message, monkeypatch):
    given = problems(monkeypatch, "--loss-chunk-size", "8", *REFUSED[message].split())
    assert any(problem.startswith(message) for problem in given), given
    assert not any("loss_chunk_size" in problem for problem in problems(monkeypatch))
