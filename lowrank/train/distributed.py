"""The processes that train one model together, on torch.distributed, each a share of every step.

Every rank has the whole model. Before the first step rank 0 sends what is trained to the others;
in each step the gradients of that are added up over the ranks, once. What is frozen never travels,
and what all ranks know, such as the order of the examples, none tells another.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank import errors
from lowrank.errors import ConfigError, LowrankError, TrainingError
from lowrank.train.gloo import Connections, settle_at_exit

logger = logging.getLogger("lowrank.train")

PARALLEL = ("ddp", "fsdp")
_BUCKET = 1 << 24  # elements of gradients that are added up at a time
_OF_OTHERS = re.compile(r"gloo|NCCL|ProcessGroup|Connection (closed|reset)")
_MOST = 3  # differences between ranks that a message names


@contextlib.contextmanager
def process_group(device: str, timeout: float) -> Iterator[str]:
    """torch.distributed while inside, if the environment says that there are several processes, as
    torchrun's does. Gives the device of this one: its own GPU where `device` is cuda.

    ConfigError if the processes cannot reach one another.
    """
    if dist.is_initialized() or not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield device
        return
    on_gpu = torch.device(device).type == "cuda"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    try:
        wait = timedelta(seconds=timeout)
        store, rank, size = next(dist.rendezvous("env://", timeout=wait))
        # what processes that torchrun has since started again left in its store is not ours
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        taken = "EADDRINUSE" in str(error) or "address already in use" in str(error)
        why = "another program has that port" if taken else _line(error)
        raise ConfigError(
            f"the {os.environ['WORLD_SIZE']} processes cannot meet at {place}: {why}: "
            "name a free port on a machine that all reach (torchrun --master-port, --master-addr)"
        ) from error
    try:
        yield device
    except BaseException:
        if not on_gpu:  # NCCL would wait for the others, who may be gone
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def world_size() -> int:
    """How many processes there are, or are to be once torch.distributed is initialised."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if _torchrun() else 1


@contextlib.contextmanager
def alike() -> Iterator[None]:
    """What is raised inside is raised by all that torchrun started here; the first one says it."""
    try:
        yield
    except Exception as error:
        if _torchrun() and os.environ.get("LOCAL_RANK") != "0":
            error.said = "elsewhere"  # type: ignore[attr-defined]
        raise


class Ranks:
    """All of the processes, and this one, `rank`, among them; without torch.distributed it is one.

    They wait for one another no longer than `timeout` seconds. TrainingError where one is gone.
    Every rank calls the same methods in the same order.
    """

    def __init__(self, parallel: str | None = None, timeout: float = 1800.0) -> None:
        there = dist.is_available() and dist.is_initialized()
        if not there and (parallel is not None or world_size() > 1):
            raise ConfigError(
                f"parallel is {parallel!r}, but torch.distributed is not initialised: start with "
                "torchrun --nproc-per-node 2 -m lowrank train ..., or call "
                "torch.distributed.init_process_group() before the Trainer is made"
            )
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if there else (0, 1)
        self._timeout, self._group = timeout, None
        self._known: BaseException | None = None  # an error that all ranks raise
        self._lost: Exception | None = None  # one that says that another rank is gone
        self._device = torch.device("cpu")
        if self.size > 1:
            # of our own: what goes wrong here closes no connection of the caller's
            with Connections() as self._connections:
                self._group = self._tried(dist.new_group, timeout=timedelta(seconds=timeout))
            settle_at_exit()
            if dist.get_backend(self._group) == "nccl":
                self._device = torch.device("cuda", torch.cuda.current_device())

    @property
    def group(self) -> Any:
        """The process group of all; None where torch's own is meant."""
        return self._group

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def exchange(self, value: Any = None, error: Exception | None = None) -> list[Any]:
        """The `value` of every rank, in their order; an `error` of any is raised on all."""
        if self.size == 1:
            if error is not None:
                raise error
            return [value]
        told = None if error is None else (type(error).__name__, _line(error))
        found: list[Any] = [None] * self.size
        self._tried(dist.all_gather_object, found, (value, told), group=self._group)
        failed = {rank: told for rank, (_, told) in enumerate(found) if told is not None}
        if failed:
            if error is None:
                rank, (kind, line) = next(iter(failed.items()))
                kinds = vars(errors).get(kind, TrainingError)
                error = kinds(f"rank {rank}: {line}")
            raise self.known(error)
        return [value for value, _ in found]

    def known(self, error: BaseException) -> BaseException:
        """`error`, as one that every rank raises; only the first needs to say it."""
        self._known = error
        if not self.first:
            error.said = "elsewhere"  # type: ignore[attr-defined]
        return error

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of the values, added up over the ranks."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        self._tried(dist.all_reduce, total, group=self._group)
        return total.tolist()

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is true on any rank."""
        return [count > 0 for count in self.sum(flags)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up each .grad over the ranks; one that no rank has stays None."""
        if self.size == 1:
            return
        for bucket in _buckets(parameters):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            has = grads[0].new_tensor([float(p.grad is not None) for p in bucket])
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), has])
            self._tried(dist.all_reduce, flat, group=self._group)
            *sums, has = flat.split([*(p.numel() for p in bucket), len(bucket)])
            for p, grad, total, count in zip(bucket, grads, sums, has, strict=True):
                if p.grad is not None or count > 0:
                    p.grad = grad.copy_(total.view_as(grad))

    @torch.no_grad()
    def send(self, tensors: Iterable[Tensor]) -> None:
        """Give each tensor, in place, the values it has on the first rank."""
        if self.size == 1:
            return
        for tensor in tensors:
            values = tensor.detach().contiguous()
            self._tried(dist.broadcast, values, 0, group=self._group)
            tensor.copy_(values)

    def check_same(self, settings: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
        """ConfigError naming what of these is not the same everywhere; `contents` are hashes."""
        found = []
        everywhere = self.exchange((dict(settings), dict(contents)))
        for rank, (theirs, hashes) in enumerate(everywhere):
            first, of_first = everywhere[0]
            found += [
                f"{name} is {theirs.get(name)!r} on rank {rank} and {first.get(name)!r} on rank 0"
                for name in dict.fromkeys([*first, *theirs])
                if first.get(name) != theirs.get(name)
            ]
            found += [
                f"rank {rank} has other {name} than rank 0"
                for name in of_first
                if of_first[name] != hashes[name]
            ]
        if found:
            more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
            raise self.known(
                ConfigError(
                    f"the {self.size} processes are not of one run: {'; '.join(found[:_MOST])}"
                    f"{more}: start all of them with the same settings, data and model"
                )
            )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside on one rank is raised on all, and only the first rank is heard.

        Inside, ranks may `exchange`; every way of talking else is for `bound`.
        """
        try:
            with self._hushed():
                yield
        except Exception as error:
            if error is self._known or error is self._lost:
                raise
            self.exchange(error=error)
        else:
            self.exchange()

    @contextlib.contextmanager
    def bound(self) -> Iterator[None]:
        """A rank that raises inside leaves, and the others, who wait for it, lose it at once."""
        try:
            with self._hushed():
                try:
                    yield
                except RuntimeError as error:  # of weights that are gathered, which torch does
                    if isinstance(error, LowrankError) or not _OF_OTHERS.search(str(error)):
                        raise
                    raise self._lose(error) from error
        except BaseException as error:
            gone = self._group is not None and error is not self._known
            if gone and dist.get_backend(self._group) == "gloo":  # NCCL would wait for the others
                self._connections.close()
                dist.destroy_process_group(self._group)
            raise

    @contextlib.contextmanager
    def _hushed(self) -> Iterator[None]:
        """No log on ranks but the first."""
        logger = logging.getLogger("lowrank")  # of the whole library
        before = logger.level
        if not self.first:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)

    def _tried(self, call: Any, *args: Any, **options: Any) -> Any:
        """call(...), which needs the others."""
        try:
            return call(*args, **options)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lose(error) from error

    def _lose(self, error: Exception) -> Exception:
        """Say that another rank is gone, as `error` shows."""
        self._lost = TrainingError(
            f"rank {self.rank} of {self.size} has lost the others: one has ended, or has not "
            f"answered for {self._timeout:g} seconds (ddp_timeout); what it said itself is the "
            f'reason; resume="auto" goes on from the last checkpoint; torch says: {_line(error)}'
        )
        # at once: torchrun is about to end this process too
        logger.error("%s", self._lost)
        self._lost.said = "here"  # type: ignore[attr-defined]
        return self._lost


def _torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, so many together as one tensor can hold of them."""
    bucket: list[nn.Parameter] = []
    size = 0
    for p in parameters:
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (p.dtype, p.device)
        if bucket and not (alike and size + p.numel() <= _BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def _line(error: BaseException) -> str:
    """What an error says; of torch's words the first sentence, without its own file and line."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, LowrankError):
        return line
    return re.sub(r"^\[\S+\] ", "", line).partition(". ")[0]
