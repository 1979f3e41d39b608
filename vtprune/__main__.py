"""`python -m vtprune` is `vtprune`."""

from __future__ import annotations

import sys

from vtprune.cli import main

if __name__ == "__main__":
    sys.exit(main())
