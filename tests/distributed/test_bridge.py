"""Megatron-Bridge loads and exports ZAYA in every layout. ``make bridge-test`` runs this.

In an environment of its own, as Bridge pins a transformers that does not know ZAYA.
"""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from support.closeness import assert_close
from support.megatron import Layout, parallel, shared_directory

if importlib.util.find_spec("megatron.bridge") is None:
    pytest.skip("megatron-bridge is not installed here; make bridge-test", allow_module_level=True)

from support.bridge_without_te import import_bridge

import_bridge()
from megatron.bridge import AutoBridge  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from support.zaya_model import random_zaya  # noqa: E402

import cca_megatron.hf.bridge  # noqa: E402, F401  registers ZAYA

pytestmark = pytest.mark.every_world
LAYOUTS = [
    Layout(),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(ep=2),
    pytest.param(Layout(tp=2, sp=True, etp=2, pp=2), marks=pytest.mark.ranks(4)),
    pytest.param(Layout(tp=4, sp=True), marks=pytest.mark.ranks(4)),
]


def megatron_model(auto: AutoBridge, layout: Layout) -> torch.nn.Module:
    provider = auto.to_megatron_provider(load_weights=False)
    settings = layout.settings() | {
        "transformer_impl": "local",
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
    }
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return provider.provide()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights_come_and_go_unchanged(layout):
    model = random_zaya(torch.float32, num_attention_heads=8, num_key_value_heads=2)
    with shared_directory() as folder:
        if dist.get_rank() == 0:
            model.save_pretrained(folder)
        dist.barrier()
        with parallel(layout):
            auto = AutoBridge.from_hf_pretrained(folder)
            ours = megatron_model(auto, layout).cuda()
            tensors = [x for x in ours.state_dict().values() if isinstance(x, torch.Tensor)]
            for tensor in tensors:
                tensor.fill_(float("nan"))  # Bridge leaves what it does not find
            auto.load_hf_weights([ours])
            assert not any(tensor.isnan().any() for tensor in tensors)
            got = dict(auto.export_hf_weights([ours], cpu=True, show_progress=False))
            expected = {n: x for n, x in model.state_dict().items() if n != "lm_head.weight"}
            assert got.keys() - {"lm_head.weight"} == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(got[name], tensor), name
            if layout == Layout():
                tokens = torch.randint(1, 96, (2, 16))
                with torch.no_grad():
                    logits = ours.eval()(tokens, torch.arange(16).expand(2, -1), None)
                    assert_close("logits", model.eval()(tokens).logits, logits, 1e-5)
