"""Saved states of an optimizer, ours or another's, as the states that a rule wants."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank.errors import ConfigError, DtypeError, ShapeError
from lowrank.ops.adamw8bit import BLOCK, dynamic_map, rows_and_columns, scale_shape
from lowrank.ops.reference.moments import decode, encode, in_blocks
from lowrank.ops.reference.panels import panels
from lowrank.optim.rules import Rule
from lowrank.optim.shards import whole

logger = logging.getLogger("lowrank.optim")


class _Names(NamedTuple):
    """Under which a moment may be saved: by us, by torch.optim, by bitsandbytes."""

    values: tuple[str, str, str]
    row_scale: str  # of our codes, [N, ceil(C / 256)]
    flat_scale: str  # of bitsandbytes' codes, a scale for each 256 of all elements
    table: str
    signed: bool


_MOMENTS = {
    "m": _Names(("m", "exp_avg", "state1"), "m_scale", "absmax1", "qmap1", True),
    "v": _Names(("v", "exp_avg_sq", "state2"), "v_scale", "absmax2", "qmap2", False),
}
_NESTED = "__bnb_optimizer_quant_state__"  # where newer bitsandbytes have them

States = dict[str, Tensor]


class _Moment(NamedTuple):
    values: Tensor  # floats in the shape of the parameter, or codes [rows, columns]
    scale: Tensor | None = None  # [rows, ceil(columns / 256)], of codes
    table: Tensor | None = None


def fitting_states(
    wanted: Mapping[Any, tuple[Tensor, Rule]],
    saved: Mapping[Any, Mapping[str, Any]],
    device: str | None = None,
) -> dict[Tensor, tuple[int, States]]:
    """Each parameter's steps taken and new tensors of its states, from those saved under its key.

    The tensors are on `device`; None: each where its parameter is.

    Codes are taken over to the bit where their blocks are those of rows: in bitsandbytes' state
    where rows are of multiples of 256 elements, or there is but one. Other codes are decoded and
    coded anew, and so is float32 where codes are wanted; a log line has the largest error of that.
    """
    states: dict[Tensor, tuple[int, States]] = {}
    errors: dict[str, list[float]] = {"m": [], "v": []}
    for key, state in saved.items():
        if key not in wanted:
            raise ConfigError(
                f"state_dict: expected states of {len(wanted)} parameters; got one of {key!r}"
            )
        p, rule = wanted[key]
        state = {**state, **state.get(_NESTED, {})}
        state = {name: whole(v) if isinstance(v, Tensor) else v for name, v in state.items()}
        if state.keys() - {"step"}:
            made: States = {}
            for name in _MOMENTS.keys() & rule.states(p).keys():
                moment = _saved(p, _MOMENTS[name], state, f"state_dict: state {key}")
                made |= _fitting(p, rule, name, moment, errors[name], device or p.device)
            states[p] = int(state.get("step", 0)), made
    _log(errors)
    return states


def _saved(p: Tensor, names: _Names, state: Mapping[str, Any], where: str) -> _Moment:
    """What the state has of a moment of p, its shapes checked."""
    found = [name for name in names.values if isinstance(state.get(name), Tensor)]
    if not found:
        raise ConfigError(
            f"{where}: expected one of {', '.join(names.values)}; got {', '.join(sorted(state))}"
        )
    values = state[found[0]]
    if values.shape != p.shape:
        raise ShapeError(
            f"{where}: {found[0]}: expected {list(p.shape)}, as its parameter; "
            f"got {list(values.shape)}"
        )
    if values.is_floating_point():
        return _Moment(values)
    if values.dtype != torch.uint8:
        raise DtypeError(f"{where}: {found[0]}: expected floats or uint8; got {values.dtype}")
    by_rows = names.row_scale in state
    name = names.row_scale if by_rows else names.flat_scale
    layout = rows_and_columns(p.shape) if by_rows else (1, p.numel())
    expected = scale_shape(torch.Size(layout))
    scale, table = state.get(name), state.get(names.table, dynamic_map(names.signed))
    if not isinstance(scale, Tensor) or scale.numel() != expected[0] * expected[1]:
        got = list(scale.shape) if isinstance(scale, Tensor) else "none"
        raise ShapeError(f"{where}: {name}: expected {expected[0] * expected[1]} scales; got {got}")
    return _Moment(values.reshape(layout), scale.float().view(expected), table.to(values.device))


def _fitting(
    p: Tensor,
    rule: Rule,
    name: str,
    moment: _Moment,
    errors: list[float],
    device: str | torch.device,
) -> States:
    """The rule's states of p for a moment, on `device`; appends the error of coding anew."""
    rows, columns = rows_and_columns(p.shape)
    signed, dtype = _MOMENTS[name].signed, rule.states(p)[name].dtype
    if dtype != torch.uint8:
        return {name: _decoded(moment).view(p.shape).to(device, dtype, copy=True)}
    codes, scale = moment.values, moment.scale
    if (
        scale is None
        or moment.table is None
        or (codes.shape != (rows, columns) and columns % BLOCK)
        or not torch.equal(moment.table.cpu(), dynamic_map(signed))
    ):
        codes, scale, error = _coded(_decoded(moment).view(rows, columns), signed)
        errors.append(error)
    return {
        name: codes.view(p.shape).to(device, copy=True),
        f"{name}_scale": scale.view(scale_shape(p.shape)).to(device, copy=True),
    }


def _decoded(moment: _Moment) -> Tensor:
    """The values of a moment, flat."""
    if moment.scale is None or moment.table is None:
        return moment.values.flatten()
    rows, columns = moment.values.shape
    values = torch.empty(rows, columns, dtype=torch.float32, device=moment.values.device)
    for some in panels(rows, max(1, columns)):
        blocks = decode(moment.values[some], moment.scale[some], moment.table)
        values[some] = blocks.flatten(1)[:, :columns]
    return values.flatten()


def _coded(values: Tensor, signed: bool) -> tuple[Tensor, Tensor, float]:
    """Codes and scales of values [rows, columns], and their relative error."""
    rows, columns = values.shape
    table = dynamic_map(signed).to(values.device)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=values.device)
    scale = torch.empty(scale_shape(values.shape), dtype=torch.float32, device=values.device)
    off = size = 0.0
    for some in panels(rows, max(1, columns)):
        exact = in_blocks(values[some].float())
        new, scale[some] = encode(exact, signed)
        codes[some] = new.flatten(1)[:, :columns]
        coded = table[new] * scale[some, :, None]
        off += float((coded - exact).double().square().sum())
        size += float(exact.double().square().sum())
    return codes, scale, (off / size) ** 0.5 if size else 0.0


def _log(errors: dict[str, list[float]]) -> None:
    coded = {name: error for name, error in errors.items() if error}
    if coded:
        said = (
            f"{len(error)} of {name} with a relative error of up to {max(error):.2g}"
            for name, error in coded.items()
        )
        logger.warning(
            "moments coded anew, as they were not saved in blocks of 256 elements of a row: %s",
            ", ".join(said),
        )
