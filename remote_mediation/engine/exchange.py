"""One exchange with an NDIF server: what was asked for, or an error that says what came from where instead.

Between client and server stand proxies, gateways and certificates, and any of them may answer. What passes by itself
(no connection, no answer in time, one cut short, a page in place of JSON, 408, 425, 429, 5xx) is a `TransportError`
and may be tried again; what stays until someone changes something is a `PreflightError`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import ssl
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import quote, quote_plus

import httpx

from remote_mediation.engine.deadline import within
from remote_mediation.errors import BackendError, JobError, LostJobError, PreflightError, TransportError

# HTTP statuses below 500 that pass by themselves.
_TRANSIENT = (408, 425, 429)
# Most bytes of an answer in JSON, and of a result.
MOST_JSON = 64 * 2**20
MOST_RESULT = 2**30
# Seconds for a whole answer, however slowly it trickles, and for a whole result.
_WHOLE_JSON_S = 120.0
_WHOLE_RESULT_S = 3600.0
_RESULT_TIMEOUT = httpx.Timeout(10.0, read=60.0)
# A path of more than one folder, not one inside a URL.
_PATH = re.compile(r"(?<![\w:/.])~?(?:/[^\s/'\",:;()]+){2,}/?")
_LONGEST_MESSAGE = 300
# How an answer may be packed. Any other way, or two at once, unpacks some kB to GB before they can be counted.
_PACKINGS = ("", "identity", "gzip", "deflate")
# Headers that say how a body was sent.
_OF_THE_BODY = (b"content-encoding", b"content-length", b"transfer-encoding")
# What is asked of a server, and of caches on the way to it.
_ASKED = {"accept-encoding": "gzip, deflate", "cache-control": "no-cache"}


# What is raised over addresses and keys that are none; the last over a port beyond 65535.
_NO_ADDRESS = (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError, ValueError, OverflowError)


class Server(NamedTuple):
    """Where jobs go, and with which key. The key is never printed or written."""

    host: str
    key: str

    def __repr__(self) -> str:
        return f"Server(host={self.host!r}, key={'set' if self.key else 'none'})"


class RefusedError(PreflightError):
    """An HTTP status that does not pass by itself."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class OddError(PreflightError):
    """JSON, but not what an NDIF server answers."""


def exchange(
    server: Server,
    method: str,
    path: str,
    timeout: httpx.Timeout,
    headers: Mapping[str, str] | None = None,
    **content: Any,
) -> dict[str, Any]:
    """A server's answer, which is an object of JSON. content: what httpx sends along (`data`, `files`).

    Raises:
        TransportError: it may well come the next time; `status` is that of HTTP, if there was an answer.
        RefusedError: it will not.
        OddError: other JSON.
        JobError: the request is too large.
        PreflightError: address, certificate or proxy cannot be used.
    """
    key = {"ndif-api-key": server.key} if server.key else {}
    sent = {**(headers or {}), **key}
    with (
        _named(server.host, path, server.key, timeout),
        _client(server.host, timeout) as client,
        within(max(_WHOLE_JSON_S, timeout.read or 0.0), f"{server.host}{path}") as ended,
        client.stream(method, server.host + path, headers=sent, extensions=ended, **content) as response,
    ):
        body = _received(response, MOST_JSON, f"{server.host}{path}")
        status, received = response.status_code, response.headers
    answer = httpx.Response(status, headers=_plain_headers(received), content=body)
    if not answer.is_success:
        raise _refused(server, path, answer)
    return _object(server, path, answer)


def download(url: str) -> bytes:
    """A result from where the server says that it lies. The key does not go there.

    Raises:
        TransportError: it may well come the next time.
        LostJobError: it is not there, or no longer, lies at no address, or is larger than any result.
    """
    host = _host_of(url)
    with (
        _named(host, "the result", "", _RESULT_TIMEOUT),
        _client(host, _RESULT_TIMEOUT) as client,
        within(_WHOLE_RESULT_S, host) as ended,
        client.stream("GET", url, extensions=ended) as response,
    ):
        status = response.status_code
        if status in _TRANSIENT or status >= 500:
            raise TransportError(f"{host}, which keeps results, answers {status}", status, _wait(response))
        if not response.is_success:
            raise LostJobError(f"the result is no longer kept ({status} from {host})")
        try:
            return _received(response, MOST_RESULT, host)
        except OddError as error:
            raise LostJobError(f"the result cannot be one: {error}") from error


def _host_of(url: str) -> str:
    """The host in the address of a result.

    Raises:
        LostJobError: it is no address.
    """
    try:
        address = httpx.URL(url)
        host, port = address.host, address.port
    except (httpx.InvalidURL, ValueError) as error:
        raise LostJobError(f"the result lies at no address ({plain(str(error), '')})") from error
    if address.scheme not in ("http", "https") or not host or not 0 < (port or 1) < 2**16:
        raise LostJobError(f"the result lies at no address (scheme {address.scheme!r}, host {host!r}, port {port})")
    return host


def plain(message: str, key: str) -> str:
    """A server's message in one line, fit for a user, a terminal and a run folder.

    No traceback, no key, no paths of a machine, no control characters.
    """
    lines = [line.strip() for line in _without(key, message).splitlines() if line.strip()]
    text = (lines[-1] if "Traceback" in message else " ".join(lines)) if lines else ""
    text = "".join(letter if letter.isprintable() else "�" for letter in _PATH.sub("<path>", text))
    return text if len(text) <= _LONGEST_MESSAGE else text[:_LONGEST_MESSAGE] + " ..."


def _without(key: str, message: str) -> str:
    """A message without the key, as it is or as URLs and Python write it."""
    for written in (key, key.strip(), repr(key)[1:-1], quote(key, safe=""), quote_plus(key)):
        message = message.replace(written, "<key>") if written else message
    return message


def _client(host: str, timeout: httpx.Timeout) -> httpx.Client:
    """A client that goes through the proxies and trusts the certificates that the environment names."""
    certificates = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    try:
        return httpx.Client(timeout=timeout, verify=_trusted(*certificates), headers=_ASKED)
    except (ValueError, ImportError, OSError, httpx.InvalidURL) as error:
        raise PreflightError(
            f"cannot ask {host} ({plain(str(error), '')}); check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and "
            "SSL_CERT_FILE"
        ) from error


@functools.cache
def _trusted(file: str | None, folder: str | None) -> ssl.SSLContext:
    """The certificates that are trusted, which take some time to read; from the environment, which names these."""
    return httpx.create_ssl_context()


@contextlib.contextmanager
def _named(host: str, path: str, key: str, timeout: httpx.Timeout) -> Generator[None]:
    """What goes wrong before an answer is here, as an error of ours."""
    try:
        yield
    except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
        seconds = timeout.read or 0.0
        raise TransportError(f"{host} does not answer {path} within {seconds:.0f} s", silent=True) from error
    except httpx.ProxyError as error:
        raise _by_proxy(host, plain(str(error), key)) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, OverflowError) as error:
        reason = plain(str(error), key) or type(error).__name__
        if _not_trusted(error):
            raise PreflightError(
                f"the certificate of {host} is not trusted ({reason}); check NDIF_HOST, or name the certificates to "
                "trust in SSL_CERT_FILE"
            ) from error
        if isinstance(error, _NO_ADDRESS):
            raise PreflightError(f"cannot reach {host} ({reason}); check NDIF_HOST and NDIF_API_KEY") from error
        raise TransportError(f"cannot reach {host} ({reason})") from error


def _not_trusted(error: BaseException | None) -> bool:
    """Whether an error goes back to a certificate."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _by_proxy(host: str, reason: str) -> BackendError:
    """A proxy's own answer, such as "407 Proxy Authentication Required"."""
    message = (
        f"the proxy on the way to {host} answers {reason or 'nothing'}; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    )
    return PreflightError(message) if reason.startswith("4") else TransportError(message)


def _received(response: httpx.Response, most: int, whence: str) -> bytes:
    """The body of an answer.

    Raises:
        OddError: it has more than so many bytes, or is packed in a way that was not asked for.
    """
    packing, body = response.headers.get("content-encoding", "").strip().lower(), bytearray()
    if packing not in _PACKINGS:
        raise OddError(f"{whence} answers in the packing {plain(packing, '')!r}, which was not asked for")
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > most:
            raise OddError(f"{whence} answers with more than {most / 2**20:.0f} MiB")
    return bytes(body)


def _plain_headers(headers: httpx.Headers) -> list[tuple[bytes, bytes]]:
    """Headers of a body that is decoded already, as bytes: not all that is sent is ASCII."""
    return [(name, value) for name, value in headers.raw if name.lower() not in _OF_THE_BODY]


def _object(server: Server, path: str, response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except (ValueError, RecursionError) as error:
        start = response.content.lstrip()[:1]
        what = "a web page" if start == b"<" else f"{len(response.content)} bytes that are no JSON"
        what = what if start else "nothing"
        raise TransportError(f"{server.host} answers {path} with {what}", response.status_code) from error
    if not isinstance(found, dict):
        kind = "null" if found is None else f"a {type(found).__name__}"
        raise OddError(f"{server.host} answers {path} with {kind}, not as an NDIF server does; check NDIF_HOST")
    return found


def _refused(server: Server, path: str, response: httpx.Response) -> BackendError:
    """What an HTTP error means: later, smaller, elsewhere, or not at all."""
    host, status, detail = server.host, response.status_code, _detail(response, server.key)
    if status == 504:
        return TransportError(f"{host} does not answer {path} in time ({detail or 504})", status, silent=True)
    if status >= 500:
        return TransportError(f"{host} is up but not ready ({f'{status} {detail}'.strip()})", status, _wait(response))
    if status in _TRANSIENT:
        return TransportError(f"{host}{path} answers {status} {detail}".rstrip(), status, _wait(response))
    if status == 413:
        return JobError(f"{host} takes no request of this size (413 {detail}".rstrip() + ")")
    return RefusedError(_refusal(host, path, status, detail, response.headers.get("location", "")), status)


def _refusal(host: str, path: str, status: int, detail: str, location: str) -> str:
    if status in (401, 403):
        return f"{host} refuses the API key ({detail or status}); set NDIF_API_KEY"
    if status == 407:
        return f"a proxy on the way to {host} asks for a password (407); put it into HTTPS_PROXY or HTTP_PROXY"
    if status == 404:
        return f"{host} has no {path}, so it is no NDIF server; check NDIF_HOST"
    if status in range(300, 400):
        return f"{host} sends on to {plain(location, '') or 'nowhere'} ({status}); set NDIF_HOST to where it lies"
    return f"{host}{path} answers {status} {detail}".rstrip()


def _detail(response: httpx.Response, key: str) -> str:
    """What a server says to an error."""
    try:
        return plain(str(response.json()["detail"]), key)
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _wait(response: httpx.Response) -> float:
    """Seconds for which the server wants to be left alone (RFC 9110, section 10.2.3); 0 where it does not say."""
    said = response.headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    until = _moment(said)
    now = _moment(response.headers.get("date", "")) or datetime.now(UTC)  # its clock, and where it has none ours
    return max(0.0, (until - now).total_seconds()) if until else 0.0


def _moment(said: str) -> datetime | None:
    """A time as HTTP writes it, which is UTC; None where it is none."""
    try:
        found = parsedate_to_datetime(said)
    except (ValueError, TypeError, LookupError, OverflowError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
