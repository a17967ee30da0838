"""No credential reaches the disk (P8), neither in a tracking URI nor in what a server said; and
none reaches a server that it was not given for."""

from __future__ import annotations

import re
import sys
from urllib.parse import unquote, urlsplit

from flowbuffer.backends.uris import scheme_of
from flowbuffer.errors import UnauthorisedError
from flowbuffer.settings.environment import (
    environment_secrets,
    environment_tracking_uri,
    handed_on_uri,
    variable,
)

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


# Whose credentials they are. A folder of the spool names a server, and may have come from anywhere;
# the token in this environment is for the server that this environment, or this program, names.

_Server = tuple[str, str, int | None]

_vouched_for: set[_Server] = set()

#: Schemes whose server is chosen by this user's own configuration, and which have none.
_OF_THIS_USER = ("databricks", "databricks-uc", "uc", "sqlite", "file", "")
_DEFAULT_PORTS = {"http": 80, "https": 443}
#: What drivers of databases, and stores that plugins bring, find in the environment.
_DATABASE_PASSWORDS = ("PGPASSWORD", "MYSQL_PWD")
_OF_MLFLOW = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AUTH")
_HINT = (
    "the credentials of this environment are not for this server, and were not sent; if they are, "
    "name it: flowbuffer sync --tracking-uri {}"
)


def vouch_for(tracking_uri: str) -> None:
    """This program, or a person, names a server: it gets the credentials of this environment."""
    server = _server_of(tracking_uri)
    if server is not None:
        _vouched_for.add(server)


def belongs(uri: str) -> bool:
    """Whether the credentials of this environment are for the server of this URI: the same scheme,
    host and port as one that was named here."""
    server = _server_of(uri)
    if server is None or server in _vouched_for:
        return True
    tracking = sys.modules.get("mlflow.tracking._tracking_service.utils")
    named = (
        environment_tracking_uri(),
        handed_on_uri(),
        getattr(tracking, "_tracking_uri", None),  # what mlflow.set_tracking_uri was told
    )
    return any(isinstance(one, str) and _server_of(one) == server for one in named)


def hint(uri: str) -> str:
    """What would help if a server refuses who has no credentials for it."""
    return _HINT.format(without_credentials(uri))


def check_may_ask(tracking_uri: str) -> None:
    """Whether a store may be made that finds its credentials by itself.

    Raises:
        UnauthorisedError: It would take them to a server that nobody named here.
    """
    scheme = scheme_of(tracking_uri)
    if scheme in _DEFAULT_PORTS or belongs(tracking_uri):
        return  # ours, and its requests go without credentials where they do not belong
    there = _DATABASE_PASSWORDS if _DATABASE.match(tracking_uri) else _OF_MLFLOW
    if scheme != "azureml" and not any(map(variable, there)):
        return  # it has none to take; those in the URI, or in a file by host, are for this one
    raise UnauthorisedError(hint(tracking_uri))


def _server_of(uri: str) -> _Server | None:
    """Scheme, host and port; None if there is no server that somebody else could name."""
    scheme = scheme_of(uri)
    if scheme in _OF_THIS_USER:
        return None
    if _DATABASE.match(uri):
        return scheme, without_credentials(uri), None  # the host may stand in the query, too
    if scheme == "azureml":
        scheme = "https"
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname or "", parts.port or _DEFAULT_PORTS.get(scheme)
    except ValueError:
        return scheme, uri, None  # no server that could be asked
    return (scheme, host, port) if host else None
