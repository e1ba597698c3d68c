"""Every node of an allocation examined before a job trusts it."""
