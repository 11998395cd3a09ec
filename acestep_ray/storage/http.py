"""Files of web servers, with bounds: which addresses are asked, how long, and how much is taken.

A URL in a table is asked for from inside the user's network. The metadata service of a cloud machine, which hands out
credentials, and services of this machine are not reachable there: what a name or a redirect leads to is compared at the
moment of the connection.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from acestep_ray.errors import InputError
from acestep_ray.storage.errors import StorageError

ALLOW_LOCAL_URLS = "ACESTEP_ALLOW_LOCAL_URLS"
"""Environment variable; with `1`, URLs may lead to this machine and to link-local addresses."""

_MOST_BYTES = 4 << 30
"""Of one answer; larger files are read by ranges."""
_MOST_FOLDERS = 10_000
_TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=15, sock_read=30)
# Protocols besides HTTP whose URLs begin with the name of a machine.
_OF_MACHINES = {
    "ftp",
    "ftps",
    "sftp",
    "ssh",
    "smb",
    "webhdfs",
    "hdfs",
    "arrow_hdfs",
    "jupyter",
    "jlab",
    "dask",
}

# Metadata services outside the link-local networks: Amazon over IPv6, Alibaba, Azure's WireServer, Oracle.
_METADATA = {
    ipaddress.ip_address(address)
    for address in ("fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192")
}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_refused(address: str) -> bool:
    """Whether an IP address is this machine's, link-local or a metadata service's, in any of its spellings."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip.ipv4_mapped or ip.sixtofour
        if inside is None and (ip in _NAT64 or (int(ip) >> 32 == 0 and int(ip) > 1)):
            inside = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inside is not None and is_refused(str(inside)):
            return True
    return ip.is_loopback or ip.is_link_local or ip.is_unspecified or ip.is_multicast or ip in _METADATA


def is_allowed() -> bool:
    """Whether the user allows URLs of this machine and of link-local addresses."""
    return os.environ.get(ALLOW_LOCAL_URLS, "").strip().lower() in ("1", "true", "yes")


def refused(host: str, address: str) -> InputError:
    """The error for a URL whose host leads to a refused address."""
    leads = "" if host == address else f", which leads to {address}"
    return InputError(
        f"a URL of this machine or of a metadata service is not fetched: {host}{leads}",
        fix=f"set {ALLOW_LOCAL_URLS}=1, on every node, where you trust everybody who wrote the paths",
    )


def check_machine(protocol: str, url: str) -> None:
    """Raise InputError for a URL of another protocol than HTTP that names a refused machine."""
    if protocol not in _OF_MACHINES or is_allowed():
        return
    try:
        host = urlsplit(url).hostname or ""
        found = socket.getaddrinfo(host, None)
    except (OSError, ValueError):
        return  # the client says what is wrong
    for *_, place in found:
        if is_refused(str(place[0])):
            raise refused(host, str(place[0]))


class _Connector(aiohttp.TCPConnector):
    """Compares addresses after names are resolved: of each request, and of each redirect."""

    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> Any:
        found = await super()._resolve_host(host, port, traces=traces)
        for place in found:
            if is_refused(place["host"]) and not is_allowed():
                raise refused(host, place["host"])
        return found


class _Response(aiohttp.ClientResponse):
    """An answer that is not read without end."""

    async def read(self) -> bytes:
        if self._body is None:
            self._body = await self.first_bytes(_MOST_BYTES + 1)
            if len(self._body) > _MOST_BYTES:
                self._body = None
                raise StorageError(f"the server's answer is longer than {_MOST_BYTES:,} bytes: {self.url}")
        return self._body

    async def first_bytes(self, count: int) -> bytes:
        """At most `count` bytes; the connection is closed where there are more."""
        blocks, size = [], 0
        async for block in self.content.iter_chunked(1 << 20):
            blocks.append(block)
            size += len(block)
            if size >= count:
                self.close()
                break
        return b"".join(blocks)[:count]


async def _client(**options: Any) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        **{"timeout": _TIMEOUT, **options}, connector=_Connector(), response_class=_Response
    )


class BoundedHTTP(HTTPFileSystem):
    """fsspec's client of web servers with this module's bounds."""

    def __init__(self, **options: Any):
        super().__init__(get_client=_client, **options)

    async def _cat_file(
        self, url: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        if start is None or end is None or start < 0 or end < start:
            content: bytes = await super()._cat_file(url, start=start, end=end, **options)
            return content
        if start == end:
            return b""
        session = await self.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        async with session.get(self.encode_url(url), headers=headers) as response:
            self._raise_not_found_for_status(response, url)
            if response.status != 206 and start > 0:
                raise StorageError(f"the server sends files only whole, from their start: {url}")
            some: bytes = await response.first_bytes(end - start)
            return some

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        try:
            info: dict[str, Any] = await super()._info(url, **options)
        except FileNotFoundError as error:
            if isinstance(error.__cause__, (InputError, StorageError)):
                raise error.__cause__ from None
            raise
        if not isinstance(info.get("size"), int) or info["size"] < 0:
            raise StorageError(f"the server does not say how large the file is: {url}")
        return info

    async def _walk(self, path: str, *positional: Any, **options: Any) -> AsyncIterator[Any]:
        folders = 0
        async for found in super()._walk(path, *positional, **options):
            folders += 1
            if folders > _MOST_FOLDERS:
                raise StorageError(f"more than {_MOST_FOLDERS:,} folders of a web server: {path}")
            yield found
