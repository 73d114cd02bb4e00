"""An HTTP client that a stranger's words may steer without reaching inside: GET, JSON, and bounds on everything.

Only hosts, schemes and ports of an allow-list; the name is resolved once, every address must be public (or in a network
that the spec allows), and the connection is made to the address that was looked at, so that a name cannot change
between look and leap. Each redirect is looked at again. No cookies, no credentials, no proxies, nothing decompressed.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

from tigerbot.errors import ServeError

MAX_REDIRECTS, MAX_BYTES = 3, 1_000_000
PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Iterable[str]]


class Refused(ServeError):
    """An address, host, scheme or answer that this client has nothing to do with."""


def resolve(host: str, port: int) -> list[str]:
    """Every address of a name."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class SafeClient:
    """Fetches JSON from an allow-list.

    Args:
        hosts: names, compared as they are written.
        schemes: https, http.
        networks: addresses that are allowed although they are not public ("10.1.0.0/16", "127.0.0.1").
        ports: allowed beside 80 and 443.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        schemes: Sequence[str] = ("https",),
        networks: Sequence[str] = (),
        ports: Sequence[int] = (),
        resolver: Resolver = resolve,
    ) -> None:
        self._hosts = {host.lower().rstrip(".") for host in hosts}
        self._schemes, self._resolver = set(schemes), resolver
        self._ports = {*ports, *PORTS.values()}
        self._networks: list[Network] = [ipaddress.ip_network(network) for network in networks]

    def get_json(self, url: str, *, timeout_s: float = 2.0, max_bytes: int = MAX_BYTES) -> Any:
        """The JSON at a URL.

        Raises:
            Refused: it leads where it may not, is too large, takes too long, or is not JSON.
        """
        until = time.monotonic() + timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            status, where, body = self._get(url, until, max_bytes)
            if status in _REDIRECTS and where:
                url = urljoin(url, where)
                continue
            if status != 200:
                raise Refused(f"answered {status}", where=_shown(url))
            try:
                return json.loads(body)
            except (ValueError, RecursionError):
                raise Refused("is not JSON", where=_shown(url)) from None
        raise Refused(f"redirects more than {MAX_REDIRECTS} times", where=_shown(url))

    def checked_address(self, url: str) -> tuple[str, str, int, str]:
        """(scheme, host, port, address) of a URL that may be fetched.

        Raises:
            Refused: it may not.
        """
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port or PORTS.get(parts.scheme, 0)
        except ValueError:
            raise Refused("is no URL", where=_shown(url)) from None
        if parts.scheme not in self._schemes:
            raise Refused(f"scheme {parts.scheme!r} is not allowed", where=_shown(url))
        if parts.username is not None or parts.password is not None:
            raise Refused("carries a user name", where=_shown(url))
        if host not in self._hosts or port not in self._ports:
            raise Refused(f"{host}:{port} is not on the list", where=_shown(url), fix="name it in `hosts`")
        try:
            addresses = list(self._resolver(host, port))
        except OSError as error:
            raise Refused(f"{host} cannot be resolved ({error})", where=_shown(url)) from None
        for text in addresses:
            if not self._may(text):
                raise Refused(f"{host} is at {text}, which is not public", where=_shown(url))
        if not addresses:
            raise Refused(f"{host} has no address", where=_shown(url))
        return parts.scheme, host, port, addresses[0]

    def _may(self, text: str) -> bool:
        address = _inner(ipaddress.ip_address(text.partition("%")[0]))
        if any(address.version == network.version and address in network for network in self._networks):
            return True
        return address.is_global and not address.is_multicast

    def _get(self, url: str, until: float, max_bytes: int) -> tuple[int, str, bytes]:
        scheme, host, port, address = self.checked_address(url)
        left = until - time.monotonic()
        if left <= 0:
            raise Refused("took too long", where=_shown(url))
        connection = _Pinned(host, port, address, tls=scheme == "https", timeout_s=left)
        # A socket's timeout is per read: a server that drips a byte a second is cut off by the clock.
        alarm = threading.Timer(left, connection.cut)
        alarm.daemon = True
        alarm.start()
        try:
            connection.request("GET", _target(url), headers={"Accept": "application/json", "User-Agent": "tigerbot"})
            answer = connection.getresponse()
            body = answer.read(max_bytes + 1) if answer.status == 200 else b""
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            late = time.monotonic() >= until
            raise Refused("took too long" if late else f"no answer ({error})", where=_shown(url)) from None
        finally:
            alarm.cancel()
            connection.close()
        if time.monotonic() >= until:  # what was cut off may look whole
            raise Refused("took too long", where=_shown(url))
        if len(body) > max_bytes:
            raise Refused(f"is larger than {max_bytes:,} bytes", where=_shown(url))
        return answer.status, answer.headers.get("location", ""), body


class _Pinned(http.client.HTTPConnection):
    """A connection to a given address, under the name it was looked up by."""

    def __init__(self, host: str, port: int, address: str, *, tls: bool, timeout_s: float) -> None:
        super().__init__(f"[{host}]" if ":" in host else host, port, timeout=timeout_s)
        self._name, self._address, self._tls = host, address, tls
        self._made: socket.socket | None = None  # `sock` is handed over to the answer
        self.default_port = PORTS["https"] if tls else PORTS["http"]

    def connect(self) -> None:
        self.sock = self._made = socket.create_connection((self._address, self.port), self.timeout)
        if self._tls:
            self.sock = self._made = ssl.create_default_context().wrap_socket(self._made, server_hostname=self._name)

    def cut(self) -> None:
        if self._made is not None:
            with suppress(OSError):
                self._made.shutdown(socket.SHUT_RDWR)


def _inner(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one: mapped, NAT64, 6to4, Teredo."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else address)


def _target(url: str) -> str:
    parts = urlsplit(url)
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _shown(url: str) -> str:
    """A URL for a log: without its query, which holds a user's words."""
    return "".join(character for character in url.partition("?")[0][:200] if character.isprintable())
