"""``python -m flowbuffer``."""

from flowbuffer.commands.cli import main

raise SystemExit(main())
