"""The proxy of the environment that requests to an endpoint go through, by its variable's name.

Variables that do not apply to the endpoint's address are ignored, even where they are malformed: a
proxy for other hosts, or one that NO_PROXY exempts this host from.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit
from urllib.request import getproxies_environment


def proxy_for(base_url: str) -> tuple[str, str | None]:
    """The environment variable and the proxy in it that requests to an address go through."""
    address = urlsplit(base_url)
    proxies = getproxies_environment()
    if _exempt(address.hostname or "", address.netloc, proxies):
        return "", None
    for kind in (address.scheme, "all"):
        proxy = proxies.get(kind)
        if proxy:
            names = sorted(filter(os.environ.get, os.environ), key=str.isupper)  # lower case wins
            name = next(name for name in names if name.lower() == f"{kind}_proxy")
            return name, proxy if "://" in proxy else f"http://{proxy}"
    return "", None


def _exempt(host: str, netloc: str, proxies: dict[str, str]) -> bool:
    """Whether NO_PROXY names a host: by name, suffix, host:port, *.suffix or network."""
    for name in proxies.get("no", "").lower().split(","):
        name = re.sub(r"^\*?\.", "", name.strip())
        if name == "*" or (name and _named(name, host, netloc.lower())):
            return True
    return False


def _named(name: str, host: str, netloc: str) -> bool:
    if name in (host, netloc, f"[{host}]") or host.endswith(f".{name}"):
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    except ValueError:
        return False
