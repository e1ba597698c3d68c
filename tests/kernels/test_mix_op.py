"""``cca_mix`` refuses what does not fit, by name."""

import pytest
import torch

from cca_kernels import Boundary, MixOptions, MixWeights, available_backends, cca_mix, cca_mix_reference

GROUPS, QUERIES, DIM = 2, 3, 4
CHANNELS = GROUPS * (QUERIES + 1) * DIM
MIXED = torch.randn(5, 1, GROUPS, QUERIES + 2, DIM)
WEIGHTS = MixWeights(
    torch.randn(CHANNELS, 1, 2),
    torch.randn(CHANNELS),
    torch.randn(CHANNELS, DIM, 2),
    torch.randn(CHANNELS),
    torch.randn(GROUPS),
)
OPTIONS = MixOptions(value_delay_from=4)
TABLE = torch.randn(5, 1, 1, 4)


def test_auto_takes_an_available_backend():
    assert "reference" in available_backends()
    auto, named = cca_mix(MIXED, WEIGHTS, OPTIONS), cca_mix_reference(MIXED, WEIGHTS, OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(auto, named, strict=True))


REFUSED = {
    "mixed has shape": {"mixed": MIXED[0]},
    "conv0_weight has shape": {"weights": WEIGHTS._replace(conv0_weight=torch.randn(CHANNELS, 2))},
    "conv1_bias has shape": {"weights": WEIGHTS._replace(conv1_bias=torch.randn(3))},
    "temperature has shape": {"weights": WEIGHTS._replace(temperature=torch.randn(3))},
    "value_delay_from=9": {"options": MixOptions(value_delay_from=9)},
    "temperature_form='log'": {"options": MixOptions(temperature_form="log")},
    "rotary sin has shape": {"rotary": (TABLE, TABLE[:4])},
    "even width": {"rotary": (TABLE[..., :3], TABLE[..., :3])},
    "cu_seqlens has shape": {"cu_seqlens": torch.tensor([0.0, 5.0])},
    "boundary.latents has shape": {"boundary": Boundary(torch.randn(1, 2), torch.randn(1, 1, 4))},
    "conv0_bias without conv0_weight": {"weights": WEIGHTS._replace(conv0_weight=None)},
    "cos has width 4 and sin 2": {"rotary": (TABLE, TABLE[..., :2])},
    "backend='gpu' is unknown": {"backend": "gpu"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_by_name(message):
    inputs = {"mixed": MIXED, "weights": WEIGHTS, "options": OPTIONS, **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        cca_mix(inputs.pop("mixed"), inputs.pop("weights"), inputs.pop("options"), **inputs)
