"""A page shown on this machine: one file at one address of the loopback interface, and nothing else.

The page may show prompts. So only this machine is answered, only by the names that it has for itself (a page of
another site, whose name is made to lead here, is refused), and only with the bytes of the page.
"""

from __future__ import annotations

from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from remote_mediation.errors import SettingsError

HOST = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Answers `GET /` with a page until it is closed; a context manager."""

    daemon_threads = True

    def __init__(self, page: bytes, port: int) -> None:
        """Use `served`."""
        super().__init__((HOST, port), _Handler)
        self.page = page

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        """The page, at its one address."""
        self._answer(with_page=True)

    def do_HEAD(self) -> None:
        """The same without the page."""
        self._answer(with_page=False)

    def _answer(self, with_page: bool) -> None:
        port = self.server.server_port
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(self.server.page)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            if with_page:
                self.wfile.write(self.server.page)

    def version_string(self) -> str:
        """Nothing of this machine's software."""
        return "remote-mediation"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (its name in http.server)
        """Requests are nobody's business."""


def served(page: bytes, port: int = 0) -> PageServer:
    """A server of a page on the loopback interface, bound and not yet answering (`serve_forever`).

    port: 0 takes a free one.

    Raises:
        SettingsError: the port is in use, or not for this user.
    """
    try:
        return PageServer(page, port)
    except OSError as error:
        raise SettingsError(f"cannot serve on port {port}: {error.strerror}; choose another --port, or none") from error
