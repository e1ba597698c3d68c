"""What pipeline stages send each other: the hidden states, and the router state beside them.

Megatron's schedules take the width of what is sent from ``hidden_size``. Its ``variable_seq_lengths`` would
tell the shape in a message before each tensor, with a wait for the device, and deadlocks in the interleaved
schedule, where stages send and receive in different orders.
"""

import copy
from typing import Any

from cca_megatron._compat import TransformerConfig, get_model_config, schedules

_WIDTH = "router_state_width"


def widen_pipeline(config: TransformerConfig, width: int) -> None:
    """Let stages of a model with this configuration exchange [s, b, hidden_size + width]."""
    setattr(config, _WIDTH, width)
    schedules.get_model_config = _schedule_config


def _schedule_config(model: Any) -> TransformerConfig:
    """The model's configuration as the schedules are to see it; others keep theirs."""
    config = get_model_config(model)
    width = getattr(config, _WIDTH, 0)
    if width:
        config = copy.copy(config)
        config.hidden_size += width
    return config
