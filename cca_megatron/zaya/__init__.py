"""What ZAYA1 adds around CCA: scaled residuals, and a router with a memory over the layers."""
