"""Which web pages may call a surface. Pure: headers in, headers out.

Nothing is allowed that is not on the list, and origins are compared as a whole.
"""

from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from werkzeug.datastructures import Headers

ALLOWED_METHODS: Final = ("DELETE", "GET", "POST", "PUT", "OPTIONS")
ALLOWED_HEADERS: Final = ("Accept", "Authorization", "Content-Type")
MAX_AGE: Final = "3600"
VARY: Final = "Origin, Access-Control-Request-Method, Access-Control-Request-Headers"


@attrs.frozen
class CorsPolicy:
    """Origins, each as `scheme://host[:port]`, whose pages may read the answers."""

    origins: frozenset[str]

    def is_preflight(self, method: str, headers: "Headers") -> bool:
        """Tell a browser's question from an ordinary OPTIONS request."""
        return method == "OPTIONS" and "Access-Control-Request-Method" in headers

    def objection(self, headers: "Headers") -> str | None:
        """Return why this preflight is refused, or None when it is granted."""
        origin = headers.get("Origin")
        if origin is None:
            return "A preflight request needs an Origin header"
        if origin not in self.origins:
            return "This origin is not allowed"
        if headers["Access-Control-Request-Method"] not in ALLOWED_METHODS:
            return "The requested method is not allowed"
        requested = headers.get("Access-Control-Request-Headers", "").split(",")
        allowed = {name.lower() for name in ("", *ALLOWED_HEADERS)}
        if any(name.strip().lower() not in allowed for name in requested):
            return "A requested header is not allowed"
        return None

    def grant(self, origin: str) -> dict[str, str]:
        """Return the headers that grant a preflight of an allowed origin."""
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": ", ".join(ALLOWED_METHODS),
            "Access-Control-Allow-Headers": ", ".join(ALLOWED_HEADERS),
            "Access-Control-Max-Age": MAX_AGE,
        }

    def answer_headers(self, origin: str | None) -> dict[str, str]:
        """Return what every answer carries; it may be cached, so it always names what it depends on."""
        if origin in self.origins:
            return {"Access-Control-Allow-Origin": origin or "", "Vary": VARY}
        return {"Vary": VARY}
