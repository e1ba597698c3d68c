"""ZAYA1 in and out of Hugging Face's ``transformers``: configuration and weights."""

from cca_megatron.hf.config import ConversionError, config_from_hf, config_to_hf, zaya_settings
from cca_megatron.hf.model import zaya_model
from cca_megatron.hf.state_dict import export_hf_state_dict, load_hf_state_dict

__all__ = [
    "ConversionError",
    "config_from_hf",
    "config_to_hf",
    "export_hf_state_dict",
    "load_hf_state_dict",
    "zaya_model",
    "zaya_settings",
]
