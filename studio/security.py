"""Who may talk to the server: names it is called by, origins of pages, the token.

Without a token the server is for this machine alone, and it answers only to loopback names, so that a page elsewhere
cannot reach it under a name of its own (DNS rebinding). Whatever changes something must come from the server's own
pages, or from a program, which sends no Origin.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from studio.settings import LOOPBACK, StudioSettings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


def new_token() -> str:
    return secrets.token_urlsafe(24)


class Doorkeeper:
    """Decides by headers. `settings.token` is None for a server that is for this machine alone."""

    def __init__(self, settings: StudioSettings) -> None:
        self._token = settings.token
        self._origins = settings.allowed_origins
        self._hosts = None if settings.token is not None else LOOPBACK | {*settings.allowed_hosts}

    def fault(self, scope: Scope) -> str | None:
        """Why a request is turned away, or None."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts is not None and _name(host) not in self._hosts:
            return (
                f"host: this server answers to {', '.join(sorted(self._hosts))} alone; start it with --token for others"
            )
        origin = headers.get("origin")
        if origin is None or (scope["type"] == "http" and scope["method"] in ("GET", "HEAD")):
            return None
        if origin in self._origins or urlsplit_or_none(origin) == host.lower():
            return None
        return "origin: pages of other servers may not talk to this one; --allow_origin lets one"

    def knows(self, token: str | None) -> bool:
        """Whether the token is right, or none is asked for."""
        if self._token is None:
            return True
        return token is not None and hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode())

    def admits(self, headers: Mapping[str, str]) -> bool:
        """Whether a request bears the token."""
        kind, _, token = headers.get("authorization", "").partition(" ")
        return self.knows(token.strip() if kind.lower() == "bearer" else None)


def _name(host: str) -> str:
    """The host without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def urlsplit_or_none(origin: str) -> str | None:
    """The host and port of an origin."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


class Door:
    """The doorkeeper before an application, and headers that keep pages to themselves."""

    def __init__(self, app: ASGIApp, keeper: Doorkeeper) -> None:
        self._app = app
        self._keeper = keeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        fault = self._keeper.fault(scope)
        if fault is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": fault[:120]})
        else:
            await PlainTextResponse(f"{fault}\n", 403)(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    return sending
