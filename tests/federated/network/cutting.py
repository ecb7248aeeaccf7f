"""A proxy that cuts connections after so many bytes, as bad networks do."""

from __future__ import annotations

import contextlib
import random
import socket
import threading


class CuttingProxy:
    """Forwards to a port of this machine. Two of three connections die within ``most`` bytes."""

    def __init__(self, port: int, seed: int, most: int = 1500) -> None:
        self._to = port
        self._rng = random.Random(seed)
        self._most = most
        self.cut = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                doomed = self._rng.random() < 2 / 3
                left = [self._rng.randint(0, self._most) if doomed else 1 << 60]
                for one, other in ((near, far), (far, near)):
                    thread = threading.Thread(
                        target=self._forward, args=(one, other, left), daemon=True
                    )
                    thread.start()

    def _forward(self, source: socket.socket, sink: socket.socket, left: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                sink.sendall(data[: left[0]])
                left[0] -= len(data)
                if left[0] <= 0:
                    self.cut += 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
                end.close()
