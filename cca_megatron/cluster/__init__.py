"""Runs on a cluster: submission, what a job does on its nodes, and what became of it."""
