"""From text to a Megatron dataset."""
