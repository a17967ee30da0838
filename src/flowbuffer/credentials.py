"""No credential reaches the disk (P8): neither in a tracking URI, nor in what a server said."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

from flowbuffer.environment import environment_secrets

#: User and password before the host (RFC 3986, 3.2.1).
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]*@")
#: The same where SQLAlchemy reads it: its passwords may hold ``/``, ``?`` and ``#``.
_DATABASE_USER_INFO = re.compile(r"(?<=://)[^:/@\s]*(?::[^@\s]*)?@")
_DATABASE = re.compile(r"(?:postgres|mysql|mssql|mariadb|oracle|sqlite)", re.I)
_SECRET_FIELD = re.compile(
    r"(?<=[?&])[^=&\s]*(?:pass|pwd|token|secret|user|key|odbc)[^=&\s]*=[^&#\s]*&?", re.I
)

#: The value of an Authorization header (RFC 7617, RFC 6750), as a server may echo it.
_AUTHORIZATION = re.compile(r"\b(Basic|Bearer)\s+[\w.~+/-]+=*", re.I)

_passwords: set[str] = set()


def without_credentials(tracking_uri: str) -> str:
    """A tracking URI as it may be written to the disk: no user, no password, no token."""
    user_info = _DATABASE_USER_INFO if _DATABASE.match(tracking_uri) else _USER_INFO
    return _SECRET_FIELD.sub("", user_info.sub("", tracking_uri)).rstrip("?&")


def hide(tracking_uri: str) -> None:
    """Keep the password of this URI out of every text from now on."""
    found = _DATABASE_USER_INFO.search(tracking_uri)
    if found is not None:
        password = found.group()[:-1].partition(":")[2]
        _passwords.update({password, unquote(password)})
    if not _DATABASE.match(tracking_uri):
        password = urlsplit(tracking_uri).password or ""
        _passwords.update({password, unquote(password)})


def redacted(text: str) -> str:
    """What a server, or the way to it, said, without the credentials that this process has."""
    text = _DATABASE_USER_INFO.sub("", _USER_INFO.sub("", text))
    text = _AUTHORIZATION.sub(r"\1 ***", text)
    for secret in sorted(_passwords | environment_secrets(), key=len, reverse=True):
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, "***")
    return text


#: A shorter password would be found in every other word.
_SHORTEST = 4
