"""Training on several processes: each takes a part of every batch, or a part of the latents.

    torchrun --nproc-per-node 4 -m neuron_explainer train …        or, in Python,
    with open_world() as world:
        train(config, batches, folder, world=world)

Every process reads the same batches as one process alone would. With ``"data"``, each computes on its rows
of a batch; gradients, and everything else that is a mean over the batch (the normaliser of AuxK, the L0 that
JumpReLU aims at, the threshold of BatchTopK, which latents fired), are those of the whole batch. With
``"latents"``, each holds its rows of encoder and decoder and sees the whole batch; the k largest
pre-activations are found among all processes. Either way the result is that of one process, up to the order
in which floating point numbers are added.

Collectives are called in the forward pass and between passes, never in a backward pass, so that all
processes call the same ones in the same order.

Shape legend: ``b`` tokens of a batch, ``r`` of them in this process, ``l`` latents, ``k`` active ones.
"""

import contextlib
import datetime
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_explainer.errors import DistributedError, InputError

Split = Literal["data", "latents"]
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. With one process, every method returns its argument."""

    rank: int = 0
    """The number of this process, from 0."""
    size: int = 1
    """The number of processes."""
    split: Split = "data"
    """What each process has a part of."""
    device: torch.device | None = None
    """The device of this process; None: config or batches decide."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    @property
    def splits_batch(self) -> bool:
        return self.size > 1 and self.split == "data"

    @property
    def splits_latents(self) -> bool:
        return self.size > 1 and self.split == "latents"

    # ---- parts of a batch ------------------------------------------------------------------------

    def rows(self, n: int, rank: int | None = None) -> slice:
        """The rows of a batch of ``n`` that belong to this process, or to process ``rank``."""
        if not self.splits_batch:
            return slice(0, n)
        if n < self.size:
            raise InputError(
                f"a batch of {n} rows cannot be divided among {self.size} processes; make batch_size "
                "larger or take fewer processes."
            )
        rank = self.rank if rank is None else rank
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def share(self, n: int) -> float:
        """The share of a batch of ``n`` rows that belongs to this process."""
        rows = self.rows(n)
        return (rows.stop - rows.start) / n if self.splits_batch else 1.0

    def mean_over_batch(self, x: Tensor, n: int) -> Tensor:
        """The mean over a batch of ``n`` rows, of which ``x`` is the mean over this process's rows.

        Its gradient is that of ``x``: gradients are averaged later, and so is this one.
        """
        if not self.splits_batch:
            return x
        return _with_value(x, self.all_reduce_sum(x.detach() * self.share(n)))

    def min_over_batch(self, x: Tensor) -> Tensor:
        """Entry by entry, the minimum over the parts of a batch; without gradient."""
        return self.all_reduce_min(x) if self.splits_batch else x

    def gather_rows(self, x: Tensor, n: int) -> Tensor:
        """``[r, …] -> [b, …]``: the rows of all processes, of a batch of ``n``; without gradient."""
        if not self.splits_batch:
            return x
        own = [self.rows(n, rank) for rank in range(self.size)]
        lengths = [rows.stop - rows.start for rows in own]
        parts = self._gather(_padded(x.detach(), max(lengths), 0))
        return torch.cat([p[:length] for p, length in zip(parts, lengths, strict=True)])

    def among_largest(self, values: Tensor, count: int) -> Tensor:
        """``[m] -> [m]`` bool: which values are among the ``count`` largest of all processes.

        ``m`` may differ between processes. Of equal values, that of the lower rank comes first.
        """
        longest = -int(self.all_reduce_min(torch.tensor(-len(values))))
        everyone = torch.cat(self._gather(_padded(values.detach(), longest, -torch.inf)))
        chosen = torch.zeros(len(everyone), dtype=torch.bool, device=values.device)
        order = everyone.sort(descending=True, stable=True).indices
        chosen[order[:count]] = True
        return chosen[self.rank * longest :][: len(values)]

    # ---- parts of the latents --------------------------------------------------------------------

    def latents(self, n_latents: int) -> range:
        """The latents of a dictionary that belong to this process."""
        if not self.splits_latents:
            return range(n_latents)
        each, rest = divmod(n_latents, self.size)
        if rest:
            raise InputError(
                f"{n_latents} latents cannot be divided evenly among {self.size} processes; make "
                f"n_latents {self.size * each} or {self.size * (each + 1)}."
            )
        return range(each * self.rank, each * (self.rank + 1))

    def total_over_latents(self, x: Tensor) -> Tensor:
        """The sum over the parts of the latents. Every process computes the same loss from it, so the
        gradient is that of this process's part."""
        return _with_value(x, self.all_reduce_sum(x.detach().clone())) if self.splits_latents else x

    def global_rank(self, values: Tensor, k: int) -> Tensor:
        """``[b, ≤ k] -> [b, ≤ k]`` int64: the rank of each value, from 0, among the values of all processes
        for its token. Each process gives its largest values; of equal values the lower latent comes first.
        """
        width = values.shape[1]
        padded = F.pad(values.detach(), (0, k - width), value=-torch.inf)
        everyone = torch.cat(self._gather(padded), 1)
        order = everyone.sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)[:, self.rank * k :][:, :width]

    def send_to_rank_zero(self, x: Tensor, source: int, shape: Sequence[int]) -> Tensor | None:
        """``x`` of the process ``source``, which has that shape, on the CPU; None in all processes but the
        first."""
        if source == self.rank:
            x = x.detach().cpu().contiguous()
            if source:
                self._do(dist.send, x, 0)
            return x if self.is_rank_zero else None
        if not self.is_rank_zero:
            return None
        received = torch.empty(*shape, dtype=x.dtype)
        self._do(dist.recv, received, source)
        return received

    # ---- for either ------------------------------------------------------------------------------

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over processes, written to ``x``."""
        return self._reduce(x, dist.ReduceOp.SUM) if self.size > 1 else x

    def all_reduce_min(self, x: Tensor) -> Tensor:
        """Entry by entry, the minimum over processes; without gradient."""
        return self._reduce(x.detach().clone(), dist.ReduceOp.MIN) if self.size > 1 else x

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace the gradients of parameters that all processes hold by their sum over processes."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None and self.splits_latents:  # only the first process has used it
                parameter.grad = torch.zeros_like(parameter)
            if parameter.grad is not None:
                self.all_reduce_sum(parameter.grad)

    def all_true(self, holds: bool) -> bool:
        """Whether ``holds`` is true in every process."""
        if self.size == 1:
            return holds
        return bool(self._reduce(torch.tensor(int(holds)), dist.ReduceOp.MIN))

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call ``function`` in the first process only; return its result, or raise its error, in all.

        The others wait for it. It must give what JSON can hold.
        """
        if self.size == 1:
            return function()
        if not self.is_rank_zero:
            told = self.broadcast_object(None, 0)
            if "error" in told:
                raise InputError(told["error"])
            return told["value"]  # type: ignore[no-any-return]
        try:
            value = function()
        except Exception as error:  # of whatever kind: the others must not wait for a value
            with contextlib.suppress(DistributedError):
                self.broadcast_object({"error": str(error)}, 0)
            raise
        self.broadcast_object({"value": value}, 0)
        return value

    def broadcast_object(self, message: Any, source: int) -> Any:
        """The ``message`` of the process ``source``, which must be JSON."""
        text = json.dumps(message).encode() if source == self.rank else b""
        length = torch.tensor(len(text))
        self._do(dist.broadcast, length, source)
        content = torch.empty(int(length), dtype=torch.uint8)
        if text:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self._do(dist.broadcast, content, source)
        return json.loads(bytes(content.numpy()))

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Write the values of the process ``source`` to ``x``, and return it."""
        if self.size > 1:
            self._do(dist.broadcast, x.detach(), source)
        return x

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self._do(dist.barrier)

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [x.new_empty(x.shape) for _ in range(self.size)]
        self._do(dist.all_gather, parts, x.contiguous())
        return parts

    def _reduce(self, x: Tensor, how: Any) -> Tensor:
        self._do(dist.all_reduce, x, how)
        return x

    def _do(self, collective: Callable[..., Any], *args: Any) -> None:
        try:
            collective(*args)
        except RuntimeError as error:  # the backend's: a closed connection, or too long a wait
            reason = str(error).partition(". This is")[0]
            raise DistributedError(
                f"process {self.rank} of {self.size}: another process of this run is gone or did not "
                f"answer in time ({reason}). What it said stands above. Start the same command again "
                "to go on from the last checkpoint."
            ) from error


SINGLE_PROCESS = World()
"""The world of a run with one process."""


class _WithValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _with_value(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``x``."""
    result: Tensor = _WithValue.apply(x, value)  # type: ignore[no-untyped-call]
    return result


def _padded(x: Tensor, length: int, filling: float) -> Tensor:
    padding = x.new_full((length - len(x), *x.shape[1:]), filling)
    return torch.cat([x, padding])


@contextlib.contextmanager
def open_world(
    split: Split = "data", *, timeout: float = 600.0, device: str | None = None
) -> Iterator[World]:
    """The processes that ``torchrun`` has started; a single process without ``torchrun``.

    On GPUs each process takes the one of its ``LOCAL_RANK``, and NCCL connects them; else gloo.

    Args:
        split: what each is to have a part of.
        timeout: seconds after which a process that does not answer is given up. It must be longer
            than it takes to write a checkpoint.
        device: ``"cpu"`` or ``"cuda"``; the best there is if not given.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    where = _device(device)
    # The functions in this module have the process group as a default argument. If it were imported later
    # (the optimizer does), they would keep the group and gloo's threads alive, and these abort the process
    # if they are at work when Python ends.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(
            "gloo" if where.type == "cpu" else "cpu:gloo,cuda:nccl",
            timeout=datetime.timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"cannot join the {size} processes that WORLD_SIZE promises ({error}). Start them with "
            "torchrun, which sets RANK, MASTER_ADDR and MASTER_PORT."
        ) from error
    world = World(dist.get_rank(), size, split, where)
    yield world
    # Not after an error: collectives that are under way may never end, and the process ends anyway.
    world.barrier()
    dist.destroy_process_group()


def _device(name: str | None) -> torch.device:
    """The device of this process."""
    wanted = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if wanted.type == "cpu":
        return wanted
    index, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if wanted.type != "cuda" or ":" in str(wanted) or index >= there:
        raise InputError(
            f"device {name!r} for process {index} of this machine, which has {there} GPUs: give cuda, "
            "of which each process takes its own, or cpu."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
