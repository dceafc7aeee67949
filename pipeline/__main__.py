"""Runs the command `bertile` as `python -m bertile`."""

from bertile.cli.main import main

raise SystemExit(main())
