"""An end to an exchange over HTTP, in whatever part of it a server trickles: its headers, or the body.

Timeouts of a client begin anew with every byte, so that one byte now and then keeps it for days.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Generator, Mapping
from typing import Any

import httpx

from remote_mediation.errors import TransportError

# The step of a request after which its answer is waited for.
_SENT = "send_request_body.complete"


class Deadline:
    """Shuts the connection of a request down when its answer is not here so many seconds after it was sent."""

    def __init__(self, seconds: float) -> None:
        """Use `within`."""
        self.over = False
        self._seconds = seconds
        self._socket: socket.socket | None = None
        self._timer: threading.Timer | None = None

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Follow a request: httpcore's `trace` extension calls this with every step."""
        stream = info.get("return_value")
        if stream is not None and hasattr(stream, "get_extra_info"):
            self._socket = stream.get_extra_info("socket")
        if event.endswith(_SENT):
            self.stop()
            self._timer = threading.Timer(self._seconds, self._end)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """No longer watch the time."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        """Whoever reads from the connection finds that it has ended."""
        self.over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._socket.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def within(seconds: float, whence: str) -> Generator[dict[str, Any]]:
    """Extensions for a request that httpx sends and reads in this context.

    seconds: between the request and the end of its answer, at most. whence: who answers, for the error.

    Raises:
        TransportError: the answer was not here by then.
    """
    deadline = Deadline(seconds)
    try:
        yield {"trace": deadline.trace}
    except httpx.HTTPError as error:
        if not deadline.over:
            raise
        raise TransportError(f"{whence} has not sent all of its answer within {seconds:.0f} s", silent=True) from error
    finally:
        deadline.stop()
