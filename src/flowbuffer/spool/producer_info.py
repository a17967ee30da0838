"""Who wrote a folder, for which run and server, and how to deliver it: ``producer.json``."""

from __future__ import annotations

import json
import os
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flowbuffer.errors import SpoolFormatError
from flowbuffer.spool.files import read_file
from flowbuffer.spool.layout import FORMAT_VERSION

#: ``ProducerInfo.delivery`` of a producer whose points only ``flowbuffer sync`` delivers.
OFFLINE = "offline"


@dataclass(frozen=True, kw_only=True)
class ProducerInfo:
    """Who wrote a folder, and where its points belong (``producer.json``).

    Attributes:
        run_id: The run; of an offline producer it need not exist on any server.
        tracking_uri: Without credentials.
        host, pid: The process.
        start_ms: When it began to log to this run, in ms since the epoch.
        rank, local_rank, world_size: Its place in a distributed job; None outside one.
        delivery: Its setting of that name, or ``"offline"``.
        settings: Those of its settings that whoever delivers goes by.
        environment: What it needs to reach its server, as a fingerprint; empty if it does not say.
        experiment: The experiment for a run that has to be created; None if nothing named one.
    """

    run_id: str
    tracking_uri: str
    host: str
    pid: int
    start_ms: int
    rank: int | None = None
    local_rank: int | None = None
    world_size: int | None = None
    delivery: str = "thread"
    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: str = ""
    experiment: str | None = None
    format: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        """As JSON, with the CRC-32 of the rest in ``checksum``."""
        fields = asdict(self)
        return json.dumps({**fields, "checksum": _checksum(fields)}).encode()


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("run_id", "tracking_uri", "host", "delivery", "environment"), (str,)),
    **dict.fromkeys(("pid", "start_ms"), (int,)),
    **dict.fromkeys(("rank", "local_rank", "world_size"), (int, type(None))),
    "settings": (dict,),
    "experiment": (str, type(None)),
}


def read_info(folder: Path) -> ProducerInfo:
    """What ``producer.json`` says.

    Raises:
        SpoolFormatError: It is missing, damaged, or of another format version.
    """
    path = folder / "producer.json"
    try:
        said = json.loads(read_file(path, limit=65536))
        intact = said.pop("checksum") == _checksum(said)
        if intact and said["format"] != FORMAT_VERSION:
            raise SpoolFormatError(
                f"{path} has format version {said['format']}; this flowbuffer reads version "
                f"{FORMAT_VERSION}: deliver it with the version that wrote it"
            )
        info = ProducerInfo(**said)
        for name, kinds in _KINDS.items():
            if not isinstance(said[name], kinds):
                raise TypeError(f"{name} is {said[name]!r}")
    except SpoolFormatError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SpoolFormatError(f"{path} is missing or damaged ({error!r})") from error
    if not intact:
        raise SpoolFormatError(f"{path} is damaged: its checksum does not match")
    return info


def _checksum(fields: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def this_producer(run_id: str, tracking_uri: str, start_ms: int, **more: Any) -> ProducerInfo:
    """This process as a producer; ``more`` are further fields of :class:`ProducerInfo`."""
    return ProducerInfo(
        run_id=run_id,
        tracking_uri=tracking_uri,
        host=platform.node(),
        pid=os.getpid(),
        start_ms=start_ms,
        **more,
    )
