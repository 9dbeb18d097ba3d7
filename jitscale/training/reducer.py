"""Reduces the gradients in ZeRO stages 1 and 2, bucket by bucket during the backward pass.

It replaces the hooks of DeepSpeed 0.19.8. Those copy gradients one by one, several times, and take about 100
microseconds of host time a parameter. A network has hundreds of parameters, and a GPU waits for a slow host.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from jitscale import parallel

UNDER_WAY = 2  # buckets that are summed at a time during the backward pass; each takes memory


def skip_needless_work(optimizer: Any) -> None:
    """Disable per-parameter work of `optimizer`, DeepSpeed's for stages 1 and 2, that has no effect."""
    # After each step it points every parameter to its place in the flat buffer, where the parameter already is.
    optimizer._update_model_bit16_weights = lambda group_index: None
    # In each hook it formats messages about memory that nothing prints.
    optimizer.report_ipg_memory_usage = lambda *arguments, **named: None


class FlatGradients(list[Tensor]):
    """A group's gradients as one flat tensor, which DeepSpeed's optimizer uses without another copy."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


class _Run(NamedTuple):
    """Elements that are contiguous both in a bucket and in this rank's part of a parameter group."""

    group: int
    start: int  # in this rank's part of the group
    position: int  # in the bucket
    length: int
    members: int  # number of parameters, some of them in part


@dataclass
class _Bucket:
    parameters: list[Tensor]  # in the order of their groups, so that this rank's part has few runs
    owned: list[_Run]
    elements: int
    missing: int  # gradients that the current backward pass has not computed yet


class Reducer:
    """Gives the mean of all ranks' gradients to DeepSpeed's `optimizer` of stages 1 and 2.

    In each backward pass, every rank sums the same buckets in the same order, in whatever order gradients come, and
    even if some do not come. Therefore ranks never wait in different collectives. A parameter without a gradient has
    zeros, as in DeepSpeed.

    In stage 1, micro-batches accumulate in the parameters' gradients, and the backward pass of the last one sums them
    over the ranks. In stage 2, each micro-batch sums over the ranks and accumulates in this rank's part. Each rank's
    loss is divided by the number of ranks, so that the sum of the gradients is their mean.

    A gradient is freed when its bucket has a copy. Gradients, buckets and this rank's part are written and read on one
    stream, on which autograd runs the forward pass, the backward pass and the hooks. A collective runs on a stream of
    the process group. The device orders the two: the collective waits for the first stream, and the first stream waits
    for the collective before a bucket is read or freed.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[Tensor], bucket_elements: int, *, collective: bool) -> None:
        """Replace the hooks of `optimizer`.

        The gradients of `parameters` come in reverse order. A bucket has at most `bucket_elements`, or one parameter.
        `collective` may be False for a single rank: then no collective is called.
        """
        self._optimizer, self._collective = optimizer, collective
        assert dist.group.WORLD is not None
        self._all: dist.ProcessGroup = dist.group.WORLD  # its methods are faster than torch.distributed's functions
        self._ranks, self._rank = self._all.size(), self._all.rank()
        self._by_pass = optimizer.partition_gradients  # stage 2
        self._masters: list[Tensor] = optimizer.single_partition_of_fp32_groups
        places = self._places()
        self._buckets = [
            self._bucket(bucket, places)
            for bucket in parallel.buckets(reversed(parameters), Tensor.numel, limit=bucket_elements)
        ]
        whole = [sum(p.numel() for p in members) for members in optimizer.round_robin_bit16_groups]
        sizes = optimizer.partition_size
        # Elements of each group in this rank's part; padding follows them.
        self._filled = [max(0, end - self._rank * size) for end, size in zip(whole, sizes, strict=True)]
        self._next = 0  # the first bucket that has not begun in this backward pass
        self._under_way: deque[tuple[_Bucket, Tensor, Any]] = deque()
        self._flats: list[Tensor] = []  # this rank's part, during a step
        self._adds = False  # whether to add to the gradients of earlier micro-batches in `_flats`

        for hook in optimizer._grad_acc_hooks:
            hook.remove()
        optimizer._grad_acc_hooks.clear()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                optimizer._grad_acc_hooks.append(parameter.register_post_accumulate_grad_hook(self._hook(bucket)))
        optimizer.scale_if_loss = lambda loss: loss / self._ranks
        optimizer.reduce_gradients = self.finish  # stage 1 calls it after the last micro-batch
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish  # stage 2 calls it after each of them

    def _places(self) -> dict[Tensor, tuple[int, int]]:
        """For each parameter, its group and where it begins in it."""
        groups, offsets = self._optimizer.round_robin_bit16_groups, self._optimizer.round_robin_bit16_offsets
        return {
            parameter: (group, offset)
            for group, (members, starts) in enumerate(zip(groups, offsets, strict=True))
            for parameter, offset in zip(members, starts, strict=True)
        }

    def _bucket(self, parameters: list[Tensor], places: dict[Tensor, tuple[int, int]]) -> _Bucket:
        parameters = sorted(parameters, key=places.__getitem__)
        owned: list[_Run] = []
        position = 0
        for parameter in parameters:
            group, offset = places[parameter]
            size = self._optimizer.partition_size[group]
            start = offset - self._rank * size  # negative if the parameter begins in an earlier rank's part
            first, last = max(0, start), min(size, start + parameter.numel())
            if first < last:
                run = _Run(group, first, position + first - start, last - first, members=1)
                before = owned[-1] if owned else None
                if before and before.group == group and before.start + before.length == first:
                    owned[-1] = before._replace(length=before.length + run.length, members=before.members + 1)
                else:
                    owned.append(run)
            position += parameter.numel()
        return _Bucket(parameters, owned, position, len(parameters))

    def _hook(self, bucket: _Bucket) -> Any:
        by_pass, is_last_pass = self._by_pass, self._optimizer.is_gradient_accumulation_boundary

        def count(_: Tensor) -> None:
            if by_pass or is_last_pass():
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._begin_whole_buckets()

        return count

    def _begin_whole_buckets(self) -> None:
        while self._next < len(self._buckets) and self._buckets[self._next].missing == 0:
            self._begin(self._buckets[self._next])

    @torch.no_grad()
    def finish(self, pipeline_parallel: bool = False) -> None:
        """End a backward pass: sum the remaining buckets; after the last pass of a step, hand over this rank's part."""
        assert all(bucket.missing >= 0 for bucket in self._buckets), "a gradient came twice in one backward pass"
        while self._next < len(self._buckets):
            self._begin(self._buckets[self._next])
        while self._under_way:
            self._end()
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)
        self._next, self._adds = 0, True
        if self._optimizer.is_gradient_accumulation_boundary():
            for group, flat in enumerate(self._flats):
                self._optimizer.averaged_gradients[group] = FlatGradients(flat)
            self._flats, self._adds = [], False

    @torch.no_grad()
    def _begin(self, bucket: _Bucket) -> None:
        """Copy the gradients of `bucket` into one tensor, and start to sum it over the ranks."""
        self._next += 1
        if not self._flats:
            self._flats = [torch.empty_like(master) for master in self._masters]
            for flat, filled in zip(self._flats, self._filled, strict=True):
                flat[filled:].zero_()
        if self._ranks == 1:
            self._take_directly(bucket)
            return
        if len(self._under_way) == UNDER_WAY:
            self._end()
        device = bucket.parameters[0].device
        joined = torch.empty(bucket.elements, dtype=self._optimizer.communication_data_type, device=device)
        _take_gradients(bucket.parameters, self._optimizer.unflatten(joined, bucket.parameters), add=False)
        self._under_way.append((bucket, joined, self._all.allreduce([joined])))

    def _take_directly(self, bucket: _Bucket) -> None:
        """Like `_begin`, for a single rank, which owns everything."""
        runs = self._runs(bucket)
        members = iter(bucket.parameters)
        places = [
            self._optimizer.unflatten(run, list(islice(members, owned.members)))
            for run, owned in zip(runs, bucket.owned, strict=True)
        ]
        _take_gradients(bucket.parameters, list(chain.from_iterable(places)), add=self._adds)
        if self._collective:
            self._all.allreduce_coalesced(runs).wait()  # for one rank, NCCL launches no kernel

    def _end(self) -> None:
        """Copy this rank's part of the oldest bucket under way into `_flats`."""
        bucket, joined, work = self._under_way.popleft()
        work.wait()  # on a GPU the stream waits, not the host
        own = [joined[run.position : run.position + run.length] for run in bucket.owned]
        _bring(self._runs(bucket), own, add=self._adds)

    def _runs(self, bucket: _Bucket) -> list[Tensor]:
        """This rank's part of a bucket, as views of `_flats`."""
        return [self._flats[run.group][run.start : run.start + run.length] for run in bucket.owned]


def _take_gradients(parameters: list[Tensor], places: list[Tensor], *, add: bool) -> None:
    """Copy gradients to `places` of the same shapes, or `add` them there, and free them."""
    absent = [place for parameter, place in zip(parameters, places, strict=True) if parameter.grad is None]
    if absent:
        places = [place for parameter, place in zip(parameters, places, strict=True) if parameter.grad is not None]
        if not add:
            torch._foreach_zero_(absent)
    _bring(places, [parameter.grad for parameter in parameters if parameter.grad is not None], add=add)
    for parameter in parameters:
        parameter.grad = None


def _bring(places: list[Tensor], values: list[Tensor], *, add: bool) -> None:
    """Copy `values` to `places`, or `add` them there. Dtypes may differ: a cast before adding keeps the kernels few."""
    if not places:
        return
    if not add:
        torch._foreach_copy_(places, values)
        return
    if values[0].dtype != places[0].dtype:
        cast = [torch.empty_like(place) for place in places]
        torch._foreach_copy_(cast, values)
        values = cast
    torch._foreach_add_(places, values)
