"""Tokens of Megatron's routers are counted once, and shares are told with or without a class that skips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron import training
from support.megatron import MOE, Layout, gpt_model, microbatches, parallel, tiny_config

from cca_megatron._compat import TopKRouter
from cca_megatron.specs import cca_decoder_block_spec
from cca_megatron.training.expert_load import count_tokens, shares_of
from cca_megatron.training.expert_shares import describe_shares, plot_shares

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["kept", "recomputed"])
def test_every_token_is_counted_once_and_not_in_evaluation(recompute, monkeypatch):
    args = SimpleNamespace(curr_iteration=4, tensorboard_dir="log", tensorboard_log_interval=5)
    monkeypatch.setattr(training, "get_args", lambda: args)
    with parallel(Layout()), microbatches():
        config = tiny_config(**(MOE | recompute))
        model = gpt_model(config, cca_decoder_block_spec(config))
        count_tokens([model])
        tokens, positions = torch.randint(0, 96, (2, 16)), torch.arange(16).expand(2, -1)
        for _ in range(2):  # micro-batches
            model.train()(tokens, positions, None).sum().backward()
            model.eval()(tokens, positions, None)
        (router,) = [module for module in model.modules() if isinstance(module, TopKRouter)]
        assert router.counts_for_log.sum() == 2 * 2 * 16 * 2  # to two experts each
        (share,) = shares_of([router])
        assert share.sum() == pytest.approx(1)
        (again,) = shares_of([router])
        assert not again.any(), "counting starts anew"


@pytest.mark.parametrize(("classes", "skipped"), [(4, False), (5, True)])
def test_shares_are_told_and_drawn_with_or_without_skipping(classes, skipped, tmp_path):
    layers = np.full((2, classes), 1 / classes)
    layers[0] = 0  # no experts there
    shares = dict.fromkeys((10, 20), layers)
    assert ("skipped" in describe_shares(shares, 4)) == skipped
    plot_shares(shares, 4, tmp_path / "experts.png")
    assert (tmp_path / "experts.png").stat().st_size > 10_000
