"""Layers with adapters whose rows are rescaled to magnitudes, and what that needs of W."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lowrank.adapters import dora
from lowrank.nn.autocast import no_autocast
from lowrank.nn.kept import Kept
from lowrank.nn.with_base import WithBase


class RescaledLayer(WithBase):
    """What AdaptedLayer knows of magnitudes m: W + s·B A is rescaled to them by a gain g, DoRA's.

    The norms of rows are found without W + s·B A: ||W||² is kept for as long as the base stays as
    it is, and A Wᵀ is a product that the base has anyway.
    """

    scaling: dict[str, float]  # s, what scale_adapter chose included
    magnitudes: dict[str, str]  # of adapters that have one, the name of its tensor
    _squares: Kept
    _norms: dict[str, Kept]
    _to_restart: list[str]  # adapters whose magnitude is set when loading is done

    def __init__(self) -> None:
        super().__init__()
        vars(self).update(scaling={}, magnitudes={}, _squares=Kept(), _norms={}, _to_restart=[])

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] of the unmerged base in `dtype`, dequantized if it is quantized."""
        raise NotImplementedError

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(A [R, K], B [N, R]) of ΔW = s·B A."""
        raise NotImplementedError

    def tensors(self, adapter: str) -> dict[str, nn.Parameter]:
        """What the adapter has here, by the names of its method: lora_A, lora_B."""
        raise NotImplementedError

    def products(self, rows: Tensor) -> Tensor:
        """rows Wᵀ [R, N] of rows [R, K], in their dtype and near its precision."""
        return rows @ self.matrix(rows.dtype).T

    def squares(self, dtype: torch.dtype) -> Tensor:
        """||W||² of each row [N], summed in `dtype`."""
        return self.matrix(dtype).square().sum(1)

    def gain(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """g = m / ||W + s·B A|| [N], the norms as constants; None without a magnitude m.

        `dtype` is that of `norms`.
        """
        if adapter not in self.magnitudes:
            return None
        return self._modules[self.magnitudes[adapter]][adapter].weight / self.norms(adapter, dtype)

    def norms(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        """||W + s·B A|| of each row [N] of the unmerged base, a constant for the gradient.

        Without gradients, as when generating, they are kept until W, A, B or s change. With them,
        A Wᵀ may be rounded to `dtype`, for speed; it is a small part of the norms.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._norms.pop(adapter, None)  # what trains may be written to unseen
            return self._compute_norms(adapter, dtype)
        sources = [*self._weights(), *self.tensors(adapter).values()]
        kept = self._norms.setdefault(adapter, Kept())
        return kept.get(sources, lambda: self._compute_norms(adapter))

    @torch.no_grad()
    def _compute_norms(self, adapter: str, dtype: torch.dtype | None = None) -> Tensor:
        A, B = self.factors(adapter)
        with no_autocast(A.device):
            squares = self._squares.get(self._weights(), lambda: self.squares(A.dtype)).to(A)
            products = self.products(A if dtype is None else A.to(dtype)).to(A)
            return dora.norms(squares, products, A, B, self.scaling[adapter])

    def _weights(self) -> list[nn.Parameter]:
        """What W is made of."""
        return [p for name, p in self.unmerged_base.named_parameters() if name != "bias"]

    @torch.no_grad()
    def start_magnitude(self, adapter: str) -> None:
        """Let m be the norms, so that the gain is 1, if the adapter has a magnitude."""
        if adapter in self.magnitudes:
            m = self._modules[self.magnitudes[adapter]][adapter].weight
            if not m.is_meta:
                m.copy_(self.norms(adapter))

    @torch.no_grad()
    def is_start(self, adapter: str) -> bool:
        """Whether the adapter's magnitude is as `start_magnitude` left it, but for rounding."""
        g = self.gain(adapter)
        return g is not None and not g.is_meta and bool((g - 1).abs().max() < 1e-3)

    def changed(
        self, adapters: Iterable[str]
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor, float]]]:
        """(G [N], branches (A, B, s)) with W + ΣΔW = G ∘ W + Σ s·B A; G None for 1."""
        G, branches = None, []
        for adapter in adapters:
            (A, B), g = self.factors(adapter), self.gain(adapter)
            if g is not None:
                G = g if G is None else G + (g - 1)
                B = g[:, None] * B
            branches.append((A, B, self.scaling[adapter]))
        return G, branches

    def forget_base(self) -> None:
        """Compute ||W||² anew: the base has changed, perhaps unseen."""
        self._squares.forget()

    def forget_norms(self, adapter: str) -> None:
        """Compute ||W + s·B A|| anew: s has changed, or the adapter is gone."""
        self._norms.pop(adapter, None)

    def note_starts(self, given: Iterable[str]) -> None:
        """Before another W is loaded: remember the magnitudes that are still to be those of W.

        `given` are the adapters whose magnitudes are loaded too.
        """
        some = [adapter for adapter in self.magnitudes if adapter not in given]
        self._to_restart = [adapter for adapter in some if self.is_start(adapter)]

    def start_noted(self) -> None:
        """When it is loaded."""
        for adapter in self._to_restart:
            self.start_magnitude(adapter)
        self._to_restart = []
