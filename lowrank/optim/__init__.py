"""Optimizers whose state is small, or lies elsewhere."""
