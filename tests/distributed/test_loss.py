"""The loss of our entry does not depend on where the tokens that count lie."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss
from support.megatron import Layout, parallel

from cca_megatron.training import batch


@pytest.mark.parametrize("counting", [[1, 5], [0, 3]])
def test_mean_over_all_tokens(monkeypatch, counting):
    """As Megatron's schedule and its averaging over ranks make of it; all of a rank may be a prompt."""
    args = SimpleNamespace(
        sft=False,
        calculate_per_token_loss=False,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
    )
    monkeypatch.setattr(batch, "get_args", lambda: args)
    monkeypatch.setattr(batch, "get_rerun_state_machine", Mock)
    with parallel(Layout(cp=2)):
        rank = batch.mpu.get_context_parallel_rank()
        losses = (torch.arange(8.0) + 8 * rank).cuda()
        mask = (torch.arange(8) < counting[rank]).float().cuda()
        reports = []
        step = partial(batch.loss_function, mask)
        # Megatron's schedule; a gradient is then averaged over the ranks, as is the mean here.
        mean, _ = forward_step_calc_loss(
            None, losses, step, SimpleNamespace(calculate_per_token_loss=False, timers=None), None, False, 1,
            reports, cp_group_size=2, is_last_stage=True,
        )  # fmt: skip
        mean /= 2
        dist.all_reduce(mean, group=batch.mpu.get_context_parallel_group())
    expected = [*range(counting[0]), *(8 + n for n in range(counting[1]))]
    assert mean.item() == pytest.approx(sum(expected) / len(expected))
    assert reports[0]["lm loss"].tolist() == [sum((losses * mask).tolist()), counting[rank]]


@pytest.mark.parametrize("counting", [[1, 5], [0, 3]])
def test_ranks_agree_on_the_loss_of_conversations_when_evaluating(monkeypatch, counting):
    """Megatron then averages the means of the ranks, which are equal."""
    args = SimpleNamespace(
        sft=True,
        calculate_per_token_loss=False,
        check_for_nan_in_loss_and_grad=False,
        check_for_spiky_loss=False,
    )
    monkeypatch.setattr(batch, "get_args", lambda: args)
    monkeypatch.setattr(batch, "get_rerun_state_machine", Mock)
    with parallel(Layout(cp=2)), torch.no_grad():
        rank = batch.mpu.get_context_parallel_rank()
        losses = (torch.arange(8.0) + 8 * rank).cuda()
        mask = (torch.arange(8) < counting[rank]).float().cuda()
        *_, report = batch.loss_function(mask, losses)
    expected = [*range(counting[0]), *(8 + n for n in range(counting[1]))]
    assert report["lm loss"].tolist() == [sum(expected), len(expected)]
