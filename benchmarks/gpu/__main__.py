"""Entry point of `python -m benchmarks.gpu`."""

from __future__ import annotations

from benchmarks.gpu.cli import main

raise SystemExit(main())
