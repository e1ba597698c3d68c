"""Megatron's own training loop around CCA: arguments, data, model, CPU backend, recipes."""
