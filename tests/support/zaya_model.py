"""Small random ZAYA models of ``transformers``, and the same in Megatron."""

import contextlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from transformers import ZayaConfig, ZayaForCausalLM
from transformers.models.zaya import modeling_zaya

from cca_megatron.hf import config_from_hf, export_hf_state_dict, load_hf_state_dict, zaya_model
from support.closeness import assert_close
from support.comparison import Model, forward_backward
from support.megatron import Layout, parallel

WINDOW = 5


def zaya_config(**settings: Any) -> ZayaConfig:
    """Four layers, full and sliding, and four experts; every size differs from every other."""
    defaults = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "router_hidden_size": 12,
        "max_position_embeddings": 128,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid_sliding", "hybrid"],
        "sliding_window": WINDOW,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return ZayaConfig(**(defaults | settings))


def random_zaya(
    dtype: torch.dtype = torch.float64, skips: bool = True, seed: int = 7, **settings: Any
) -> ZayaForCausalLM:
    """A model all of whose parameters are random, temperatures and balancing biases included.

    Args:
        skips: some tokens choose the class without an expert.
    """
    torch.manual_seed(seed)
    model = ZayaForCausalLM._from_config(
        zaya_config(**settings), attn_implementation="sdpa", experts_implementation="eager"
    )
    model = model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.2
            offset = 1.0 if "norm" in name or "scale" in name else 0.0
            parameter.normal_(std=scale).add_(offset)
            if name.endswith("temp"):
                parameter.uniform_(0.5, 1.5)
        for layer in model.model.layers:
            gate = layer.mlp.gate
            gate.router_mlp.out_proj.weight.mul_(0.5)  # so that every class is chosen
            gate.balancing_biases.normal_(std=0.02)
            if not skips:
                gate.balancing_biases[-1] = -1.0
    return model.train()


@dataclass(frozen=True)
class ZayaPair(Model):
    """The same model in ``transformers`` and in Megatron, and its input."""

    skips: bool = True
    skip_output: str = "zero"

    def theirs(self, dtype: torch.dtype) -> ZayaForCausalLM:
        return random_zaya(dtype, self.skips)

    def build(self, layout: Layout, dtype: torch.dtype) -> list[GPTModel]:
        config = zaya_config()
        settings, cca = config_from_hf(config)
        settings["zaya_skip_output"] = self.skip_output
        transformer = {
            **layout.settings(),
            "transformer_impl": "local",
            "use_cpu_initialization": True,
            "bias_dropout_fusion": False,
            "gradient_accumulation_fusion": False,
            "params_dtype": dtype,
            "pipeline_dtype": dtype,
            "fp32_residual_connection": dtype != torch.float64,
        }
        stages = range(layout.vpp) if layout.vpp > 1 else [None]
        return [zaya_model(settings, cca, stage, **(transformer | self.settings)) for stage in stages]

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and gradients of ``transformers``; documents are run one by one."""
        model, tokens = self.theirs(dtype).cuda(), self.tokens()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if self.documents is None:
            logits = model(inputs, use_cache=False).logits
        else:
            documents = inputs[:, : sum(self.documents)].split(self.documents, 1)
            logits = torch.cat([model(part, use_cache=False).logits for part in documents], 1)
            labels = labels[:, : logits.shape[1]]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}

    def compare(self, layout: Layout, dtype: torch.dtype, bound: float) -> None:
        """Fail unless Megatron in this layout computes what ``transformers`` does, gradients included."""
        logits, gradients = self.expected(dtype)
        with parallel(layout):
            chunks = self.build(layout, dtype)
            load_hf_state_dict(chunks, self.theirs(dtype).state_dict())
            config = DistributedDataParallelConfig(overlap_grad_reduce=False)
            ddps = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
            for ddp in ddps:
                ddp.train()
            got = forward_backward(self, layout, ddps)
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.data = parameter.main_grad.to(dtype)
            ours = export_hf_state_dict(chunks)
        assert_close("logits", logits, got, bound)
        for name, gradient in gradients.items():
            assert gradient.any(), f"gradient of {name} is zero: nothing is compared"
            assert_close(f"gradient of {name}", gradient.cpu(), ours[name], bound)


@contextlib.contextmanager
def without_float32_casts() -> Iterator[None]:
    """``transformers``' ZAYA with its hard-coded casts to float32 taken out, for comparisons in fp64."""
    originals = {
        cls: cls.forward
        for cls in (modeling_zaya.ZayaModel, modeling_zaya.ZayaRMSNorm, modeling_zaya.ZayaRouter)
    }
    for cls, original in originals.items():
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
        source = source[source.index("def ") :]
        assert "torch.float32" in source, f"{cls.__name__} has no cast to float32 any more"
        namespace = dict(vars(modeling_zaya))
        exec(source.replace("torch.float32", "torch.float64"), namespace)
        cls.forward = namespace["forward"]
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.forward = original


@contextlib.contextmanager
def skipped_tokens_add_their_input() -> Iterator[None]:
    """``transformers``' ZAYA with what the first release does for a skipped token."""
    original = modeling_zaya.ZayaSparseMoeBlock.forward
    skipped: list[int] = []

    def forward(self: Any, hidden_states: Tensor, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, new_states = original(self, hidden_states, states)
        logits, *_ = self.gate(hidden_states, router_states=states)
        probabilities = logits.view(*hidden_states.shape[:2], -1).softmax(-1)
        skips = (probabilities.detach() + self.gate.balancing_biases).argmax(-1) == self.gate.num_experts
        skipped.append(int(skips.sum()))
        return output + (probabilities[..., -1] * skips)[..., None] * hidden_states, new_states

    modeling_zaya.ZayaSparseMoeBlock.forward = forward
    try:
        yield
        assert sum(skipped), "no token skips"
    finally:
        modeling_zaya.ZayaSparseMoeBlock.forward = original
