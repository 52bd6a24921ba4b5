"""Connections of a server: the head of a request must arrive in time.

uvicorn closes connections that say nothing after an answer, but waits without end for a head that has begun
or never does: whoever sends a byte now and then holds a connection and its memory.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def protocol_with_deadline(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose request line and headers take longer than
    ``seconds``, from its first byte on (or, for the first request, from the beginning of the connection).

    A client that has sent a part of a head is told so (408).
    """

    class Protocol(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            answering = self.cycle is not None and not self.cycle.response_complete
            if answering or self.transport.is_closing():
                self._unwatch()
            elif self._deadline is None:  # more bytes of the same head do not move it
                self._deadline = self.loop.call_later(seconds, self._close_late)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close_late(self) -> None:
            self._deadline = None
            if self.transport.is_closing():
                return
            if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
                headers = [(b"connection", b"close"), (b"content-length", b"0")]
                late = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
                self.transport.write(self.conn.send(late) or b"")
            self.transport.close()

    return Protocol
