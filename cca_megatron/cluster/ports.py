"""A port that is free here and stays ours."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A free TCP port that no other program gets for the length of the block.

    It is bound by a socket that does not listen and allows its address to be used again, so a server that
    allows the same (torch's TCPStore does) can listen on it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]
