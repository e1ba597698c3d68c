"""The loss of one micro-batch, without a run."""

from unittest.mock import Mock

import torch
from support.megatron import Layout, parallel

from cca_megatron.training.batch import loss_function


class _Args:
    sft = False
    calculate_per_token_loss = False
    check_for_nan_in_loss_and_grad = False
    check_for_spiky_loss = False


def test_masked_tokens_do_not_count(monkeypatch):
    monkeypatch.setattr("cca_megatron.training.batch.get_args", lambda: _Args)
    monkeypatch.setattr("cca_megatron.training.batch.get_rerun_state_machine", Mock)
    losses = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    with parallel(Layout()):
        loss, tokens, report = loss_function(mask, losses)
    assert (loss.item(), tokens.item()) == (37.0, 3)
    assert report["lm loss"].tolist() == [37.0, 3.0]
