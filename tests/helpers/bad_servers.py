"""A server on loopback that misbehaves in a chosen way."""

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress


@contextmanager
def bad_server(kind: str, body: bytes = b"") -> Iterator[str]:
    """Address of a server. `kind`: silent never answers; half sends half of `body`, drip one byte of it each 50 ms,
    endless sends `body` and then zeros without end, busy answers 503."""
    stop = threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listening:
        listening.settimeout(0.1)

        def accept() -> None:
            while not stop.is_set():
                with suppress(OSError):
                    threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            connection.settimeout(None)
            with closing(connection), suppress(OSError):
                connection.recv(2**16)
                if kind == "busy":
                    connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    return
                if kind != "silent":
                    length = b"" if kind == "endless" else b"Content-Length: %d\r\n" % len(body)
                    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + length + b"\r\n")
                if kind == "half":
                    connection.sendall(body[: len(body) // 2])
                if kind == "endless":
                    connection.sendall(body)
                sent = 0
                while not stop.wait(0.05 if kind != "endless" else 0):
                    if kind == "drip":
                        connection.sendall(body[sent : sent + 1])
                        sent += 1
                    if kind == "endless":
                        connection.sendall(bytes(2**20))

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            stop.set()
