"""Measure the fused kernels on a GPU (``cca-megatron bench``).

``measure`` has the clock, ``check`` what a variant must pass before it is timed, ``mix`` and ``block`` the
variants and their cases, ``machine`` and ``results`` what a figure is stored with, ``report`` the README's
table, ``plots`` the plots.
"""
