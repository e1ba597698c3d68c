"""Core attention and, for context parallelism, layouts and boundary exchange."""
