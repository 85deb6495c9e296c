"""A step of an 8-bit optimizer: all tensors, whatever their dtypes and shapes, in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from lowrank.kernels import configs
from lowrank.ops import adamw8bit

from .launch import on

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def launch_step(
    kernel: Any,
    config: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    state: Sequence[list[Tensor]],
    numbers: tuple[float, ...],
) -> None:
    """The kernel, of this config, over a table of these; `state` is m, v, m_scale and v_scale."""
    dense = [g.contiguous() for g in grads]  # held until the launch; then the stream keeps order
    entries, programs = [], 0
    for tensors in zip(params, dense, *state, strict=True):
        entry, taken = _entry(tensors, programs, config)
        if taken:
            entries.append(entry)
            programs += taken
    if not entries:
        return
    device = params[0].device
    with on(device):
        kernel[(programs,)](
            _on_device(entries, device), len(entries), _maps(device), *numbers, _below(), **config
        )
    # Written through pointers: autograd must hear of it from us.
    torch.autograd.graph.increment_version((*params, *itertools.chain(*state)))


def refuse(params: list[Tensor], grads: list[Tensor], *state: list[Tensor]) -> str | None:
    """Why no kernel can take these, `state` being m, m_scale and perhaps v, v_scale."""
    devices = {tensor.device for tensor in itertools.chain(params, grads, *state)}
    if len(devices) > 1:
        return "not all tensors are on one device"
    on_gpu = any(device.type == "cuda" for device in devices)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph would repeat the numbers and the addresses of one step"
    return adamw8bit.misfit(params, grads, *state)


def _entry(tensors: tuple[Tensor, ...], first: int, config: dict) -> tuple[list[int], int]:
    """The column of the kernel's table for (p, g, m, v, m_scale, v_scale), and its programs."""
    p, *_, m_scale, _ = tensors
    columns = adamw8bit.rows_and_columns(p.shape)[1]
    if columns == 0:
        return [], 0
    blocks = m_scale.numel()
    addresses = [tensor.data_ptr() for tensor in tensors]
    aligned = columns % 8 == 0 and not any(address % 16 for address in addresses[:4])
    width = configs.adamw8bit_width(columns, aligned)
    programs = triton.cdiv(blocks, config["TILES"] * config["TILE"] // width)
    return [first, *addresses, blocks, columns, _DTYPES[p.dtype], width, aligned], programs


def _on_device(entries: list[list[int]], device: torch.device) -> Tensor:
    """The table, a row a field. From pinned memory the copy waits for nothing that runs there."""
    table = torch.tensor(entries, dtype=torch.int64, device="cpu").T.contiguous()
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@cache
def _maps(device: torch.device) -> Tensor:
    """Of m, then of v: the values of the codes, the lines and the midpoints, int32 [6, 256]."""
    m_map, v_map = adamw8bit.dynamic_map(True), adamw8bit.dynamic_map(False)
    tables = (m_map.view(torch.int32), *adamw8bit.lines_and_mids(m_map[adamw8bit.ZERO_OF_M :]))
    tables += (v_map.view(torch.int32), *adamw8bit.lines_and_mids(v_map[1:]))
    return torch.stack(tables).to(device)


@cache
def _below() -> float:
    return adamw8bit.dynamic_map(True)[0].reciprocal().item()
