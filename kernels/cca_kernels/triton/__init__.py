"""Fused Triton kernels of the CCA mix, forward and backward (docs/kernels.md).

``support.kernel_problems`` says what they do not take, ``operator.fused_mix`` is the differentiable operator.
The kernels, as data flows: ``segments`` (where documents start), ``compose`` (both convs as one filter),
``forward``, ``backward``, with ``blocks`` for what they share. ``launch`` starts them, ``configs`` has tiles.
"""
