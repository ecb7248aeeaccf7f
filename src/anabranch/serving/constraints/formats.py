"""What each ``format`` promises, as patterns and ranges that any back-end honours.

Back-ends enforce formats loosely or not at all (a leap second, the thirtieth of February), so a
format becomes a ``pattern`` whose language lies inside the format's definition (RFC 3339, 5321,
1123, 3986, 4122, 6901) and inside what common validators accept.
"""

from __future__ import annotations

_OCTET = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"(?:{_OCTET}\.){{3}}{_OCTET}"
_H16 = "[0-9a-fA-F]{1,4}"
_YEAR = "(?:[1-9][0-9]{3}|0(?:[1-9][0-9]{2}|0(?:[1-9][0-9]|0[1-9])))"
_LEAP = "(?:0[48]|[2468][048]|[13579][26])"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    f"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    f"|(?:[0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:[Zz]|[+-]{_CLOCK})"
_HOURS = "(?:[0-9]{1,9}H(?:[0-9]{1,9}M(?:[0-9]{1,9}S)?)?|[0-9]{1,9}M(?:[0-9]{1,9}S)?|[0-9]{1,9}S)"
_DAYS = "(?:[0-9]{1,9}Y(?:[0-9]{1,9}M(?:[0-9]{1,9}D)?)?|[0-9]{1,9}M(?:[0-9]{1,9}D)?|[0-9]{1,9}D)"
# Four labels of 61 stay below the 253 characters of a whole name. No two hyphens in a row: those
# begin encoded labels, which few strings are.
_LABEL = "[a-zA-Z0-9](?:-?[a-zA-Z0-9]){0,30}"
_LAST_LABEL = "[a-zA-Z](?:-?[a-zA-Z0-9]){0,30}"
_HOSTNAME = rf"(?:{_LABEL}\.){{0,3}}{_LAST_LABEL}"
_ATOM = "[a-zA-Z0-9_+-]"
_UNRESERVED = "[a-zA-Z0-9._~!$&'()*+,;=-]"
_SEGMENT = rf"(?:{_UNRESERVED}|[:@]|%[0-9A-Fa-f]{{2}})"
_AUTHORITY = rf"(?:{_UNRESERVED}+(?::{_UNRESERVED}*)?@)?{_HOSTNAME}(?::[0-9]{{1,5}})?"
_TAIL = rf"(?:\?(?:{_SEGMENT}|[/?])*)?(?:#(?:{_SEGMENT}|[/?])*)?"
_ABSOLUTE = (
    rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_AUTHORITY}(?:/{_SEGMENT}*)*"
    rf"|/?{_SEGMENT}+(?:/{_SEGMENT}*)*){_TAIL}"
)
_RELATIVE = rf"(?:/?{_UNRESERVED}+(?:/{_SEGMENT}*)*)?{_TAIL}"
_POINTER = "(?:/(?:[^~/]|~[01])*)*"

PATTERNS: dict[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": f"P(?:[0-9]{{1,9}}W|{_DAYS}(?:T{_HOURS})?|T{_HOURS})",
    "email": rf"{_ATOM}{{1,32}}(?:\.{_ATOM}{{1,31}})?@{_HOSTNAME}",
    "hostname": _HOSTNAME,
    "ipv4": _IPV4,
    "ipv6": (
        f"(?:(?:{_H16}:){{7}}{_H16}|::(?:{_H16}:){{0,6}}{_H16}|(?:{_H16}:){{1,6}}:{_H16}"
        f"|(?:{_H16}:){{1,5}}(?::{_H16}){{2}}|(?:{_H16}:){{1,4}}(?::{_H16}){{3}}"
        f"|(?:{_H16}:){{1,3}}(?::{_H16}){{4}}|(?:{_H16}:){{1,2}}(?::{_H16}){{5}}"
        f"|{_H16}:(?::{_H16}){{6}}|(?:{_H16}:){{1,7}}:|::"
        f"|::(?:[fF]{{4}}:)?{_IPV4}|(?:{_H16}:){{6}}{_IPV4})"
    ),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "uri": _ABSOLUTE,
    "uri-reference": f"(?:{_ABSOLUTE}|{_RELATIVE})",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9][0-9]{{0,8}})(?:#|{_POINTER})",
}
"""Format -> the whole text, without anchors."""

# Their definitions extend the plain ones by characters outside ASCII.
PATTERNS["iri"] = PATTERNS["uri"]
PATTERNS["iri-reference"] = PATTERNS["uri-reference"]
PATTERNS["idn-email"] = PATTERNS["email"]
PATTERNS["idn-hostname"] = PATTERNS["hostname"]

INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
}
"""OpenAPI's formats of numbers that are ranges."""

UNRESTRICTED = frozenset({"float", "double", "password"})
"""OpenAPI's formats that say how a value is stored or shown, and nothing about which values."""
