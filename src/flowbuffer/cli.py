"""The command ``flowbuffer``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowbuffer.clock import SYSTEM_CLOCK
from flowbuffer.errors import FlowbufferError
from flowbuffer.settings import Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns 0 if nothing is left to deliver, 1 if something is, 2 on misuse."""
    parser = argparse.ArgumentParser("flowbuffer", description="Buffered metric logging for MLflow")
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="deliver what dead processes left in a spool")
    sync.add_argument("--spool", type=Path, help="the spool; default: spool_dir of the settings")
    sync.add_argument("--timeout", type=float, default=3600.0, help="the most seconds to try")
    given = parser.parse_args(arguments)
    try:
        return _sync(given.spool, given.timeout)
    except FlowbufferError as error:
        print(f"flowbuffer: {error}", file=sys.stderr)
        return 2


def _sync(spool_dir: Path | None, timeout_s: float) -> int:
    from tqdm import tqdm

    from flowbuffer.collector import Collector
    from flowbuffer.spool.directory import Spool
    from flowbuffer.spool.states import tally

    settings = Settings.from_env()
    if spool_dir is not None:
        settings = settings.with_changes(spool_dir=spool_dir)
    root = settings.resolved_spool_dir()
    if not root.is_dir():
        raise FlowbufferError(f"there is no spool at {root}")
    collector = Collector(Spool(root), settings, SYSTEM_CLOCK)
    collector.step()
    streams = list(collector.streams)
    collector.start()
    deadline_s = SYSTEM_CLOCK.monotonic_s() + timeout_s
    with tqdm(desc="delivering", unit=" points", disable=None) as bar:
        while any(not s.done and not s.sender.gone for s in streams):
            if SYSTEM_CLOCK.monotonic_s() > deadline_s:
                break
            bar.update(sum(s.reader.delivered for s in streams) - bar.n)
            SYSTEM_CLOCK.sleep(0.05)
        bar.update(sum(s.reader.delivered for s in streams) - bar.n)
    left = [stream for stream in streams if not stream.done]
    pending = sum(found.pending for s in left if (found := tally(s.claim.path)) is not None)
    delivered = sum(stream.reader.delivered for stream in streams)
    rejected = sum(stream.reader.rejected for stream in streams)
    print(f"delivered {delivered}, rejected {rejected}, pending {pending}")
    for stream in left:
        failure = stream.sender.failure
        if failure is not None:
            print(f"run {stream.claim.info.run_id}: {failure.reason}", file=sys.stderr)
    return 1 if left else 0
