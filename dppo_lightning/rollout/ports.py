"""A port of this machine that is told to another program and is still free when it comes to bind it."""

from __future__ import annotations

import socket


def hold_port(address: str = "127.0.0.1") -> socket.socket:
    """A free port, kept free for a server that is told its number until the socket returned is closed.

    The socket is bound and does not listen. Servers set SO_REUSEADDR, with which they can bind beside it and listen;
    nobody who asks the system for any free port gets this one.
    """
    holder = socket.socket()
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
    except BaseException:
        holder.close()
        raise
    return holder
