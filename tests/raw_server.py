"""A server that says whatever it is told to, byte for byte, on a free port of this machine."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

Answer = Callable[[socket.socket], None]


@contextlib.contextmanager
def serve(
    answer: Answer,  # called for each connection once a request, or anything, has come
    *,
    tls: ssl.SSLContext | None = None,
    silent: bool = False,  # accept, and never say or hear anything
    address: tuple[str, int] = ("127.0.0.1", 0),
) -> Iterator[tuple[int, list[str]]]:
    """Run `answer` for each connection; yields the port and what was asked."""
    listener, heard = socket.create_server(address, backlog=256), []
    open_sockets: list[socket.socket] = []

    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                heard.append(connection.recv(65_536).decode("latin-1"))
                answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                connection.settimeout(20)
                open_sockets.append(connection)
                if not silent:
                    threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], heard
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in open_sockets:
            with contextlib.suppress(OSError):
                connection.close()


def say(*parts: bytes, reset: bool = False) -> Answer:
    """Return an answer that sends `parts` and hangs up, or breaks the connection off."""

    def answer(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def repeat(part: bytes) -> Answer:
    """Return an answer that sends `part` until the other side hangs up."""

    def answer(connection: socket.socket) -> None:
        while True:
            connection.sendall(part)

    return answer
