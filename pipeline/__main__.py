"""`python -m bertile` is the command `bertile`."""

from bertile.cli import main

raise SystemExit(main())
