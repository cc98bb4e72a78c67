"""A server that sends exactly the bytes that a test gives it, on a free port of this machine."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

Respond = Callable[[socket.socket], None]


@contextlib.contextmanager
def serve(
    respond: Respond,  # called for each connection once bytes have arrived
    *,
    tls: ssl.SSLContext | None = None,
    silent: bool = False,  # accept connections, and neither read nor send
    address: tuple[str, int] = ("127.0.0.1", 0),
) -> Iterator[tuple[int, list[str]]]:
    """Run `respond` for each connection; yield the port and the requests."""
    listener, requests = socket.create_server(address, backlog=256), []
    open_sockets: list[socket.socket] = []

    def handle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if tls:
                connection = tls.wrap_socket(connection, server_side=True)
            with connection:
                requests.append(connection.recv(65_536).decode("latin-1"))
                respond(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                connection.settimeout(20)
                open_sockets.append(connection)
                if not silent:
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in open_sockets:
            with contextlib.suppress(OSError):
                connection.close()


def send(*parts: bytes, reset: bool = False) -> Respond:
    """Make a response that sends `parts` and closes the connection, or resets it."""

    def respond(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return respond


def repeat(part: bytes) -> Respond:
    """Make a response that sends `part` until the client closes the connection."""

    def respond(connection: socket.socket) -> None:
        while True:
            connection.sendall(part)

    return respond
