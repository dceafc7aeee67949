"""`python -m bertile` is the command `bertile`."""

from bertile.cli.main import main

raise SystemExit(main())
