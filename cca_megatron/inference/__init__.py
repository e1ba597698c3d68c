"""Generation: from a checkpoint and prompts to continuations."""
