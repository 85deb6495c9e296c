"""Weights that each of several processes reads by itself: its own rows, quantized as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowrank.errors import ConfigError
from lowrank.models.holders import Holder
from lowrank.models.making import Maker
from lowrank.optim.shards import bounds, cut, local, sharded
from lowrank.progress import bar


class Unread:
    """What fills a decoder on the meta device, once its parameters are cut into rows.

    The `maker` makes the layer, or the parameters, of what it reads for a holder. Of holders in
    `by_rows` some rows are made as they are in the whole; read_rows(name, first, last) reads them.
    """

    def __init__(
        self,
        model: nn.Module,
        holders: Sequence[Holder],
        maker: Maker,
        read_rows: Callable[[str, int, int], Tensor],
        by_rows: set[str],
        device: torch.device | str,
    ) -> None:
        # adapters go around these modules, which stay what they are
        self._modules = {holder.name: model.get_submodule(holder.name) for holder in holders}
        self._holders, self._maker, self._by_rows = holders, maker, by_rows
        self._read_rows, self.device = read_rows, torch.device(device)
        for parameter in model.parameters():
            parameter.computes_on = self.device  # for what is put beside it

    @torch.no_grad()
    def fill(self, model: nn.Module) -> None:
        """Read what this process has of each parameter; no other process is asked for anything."""
        new: dict[int, nn.Parameter] = {}
        for holder in bar("loading", self._holders):
            module = self._modules[holder.name]
            for leaf, tensor in self._parts(holder, module).items():
                old = module._parameters[leaf]
                assert old is not None
                tensor = sharded(tensor.to(local(old).dtype), tuple(old.shape), old)
                new[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for module in model.modules():  # of one that is tied, two modules have it
            for leaf, p in module._parameters.items():
                if p is not None and id(p) in new:
                    module._parameters[leaf] = new[id(p)]
        for name, p in model.named_parameters():
            if p.is_meta:
                raise ConfigError(f"{name}: is read by no process; load the model without sharded")

    def _parts(self, holder: Holder, module: nn.Module) -> dict[str, Tensor]:
        """This process's rows of each parameter of the module."""
        places = {leaf: p for leaf, p in module._parameters.items() if p is not None}
        if holder.name not in self._by_rows:
            made = self._tensors(holder, self._maker.read(holder))
            return {leaf: local(cut(made[leaf], p)) for leaf, p in places.items()}
        N = _rows_of(module)
        first, last = bounds(N, next(iter(places.values())))
        if first == last:
            return {
                leaf: torch.empty_like(local(p), device=self.device) for leaf, p in places.items()
            }
        tensors = {leaf: self._read_rows(name, first, last) for leaf, name in holder.files.items()}
        made = self._tensors(holder, tensors)
        # what all rows share each process makes for itself
        return {
            leaf: made[leaf] if len(p) == N else local(cut(made[leaf], p))
            for leaf, p in places.items()
        }

    def _tensors(self, holder: Holder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layer = self._maker.make(holder, {n: t.to(self.device) for n, t in tensors.items()})
        return dict(layer.named_parameters()) if isinstance(layer, nn.Module) else layer


def _rows_of(module: nn.Module) -> int:
    """N of a weight [N, ...]."""
    shape = getattr(module, "matrix_shape", None)
    return shape[0] if shape is not None else len(module.weight)
