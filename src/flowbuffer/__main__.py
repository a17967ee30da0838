"""``python -m flowbuffer``."""

from flowbuffer.cli import main

raise SystemExit(main())
