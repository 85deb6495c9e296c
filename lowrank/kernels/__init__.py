"""Source checkout only: the Triton kernels are in kernels/ at the root (a wheel has them here)."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "kernels")]
