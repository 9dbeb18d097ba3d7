"""The DeepSpeed ZeRO engine: forward, backward and step of a sharded network. The only file that imports deepspeed.

The engine also says where each rank's fp32 masters lie, as fragments of the unsharded parameters. Averages and
checkpoints are built on that, because DeepSpeed's own checkpoints fit one world size and one stage only. The layout
is read from private attributes of DeepSpeed 0.19.8; therefore pyproject.toml pins this version.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import prod
from typing import Any, cast

import torch

from jitscale import parallel
from jitscale.checkpoints.format import Flats, Fragment, whole_fragments
from jitscale.checkpoints.weights import MOMENTS
from jitscale.config import Config
from jitscale.model.execution import prepare
from jitscale.model.jit import Block, FinalLayer, JiT
from jitscale.parallel import World
from jitscale.planner.buckets import reduce_bucket_elements
from jitscale.training.device_waits import (
    Replacement,
    clip_by_norm,
    gradient_norm,
    order_after_reductions,
    replaced,
    whole_gradient_norm,
)
from jitscale.training.muon import Muon
from jitscale.training.optim import build_optimizer
from jitscale.training.reducer import Reducer, skip_needless_work

# 512 bytes in float32, the alignment of PyTorch's allocations on a GPU. A network computes on gathered weights, which
# must be aligned like weights that were allocated one by one.
ALIGNED_ELEMENTS = 128
SMALL_BUCKET_ELEMENTS = 4_000_000  # 15 MiB in float32: gradients that CPUs reduce in one collective


class ZeroEngine:
    """A network whose optimizer state (stage 1), gradients (2) and weights (3) are sharded over the ranks."""

    def __init__(self, model: JiT, config: Config, world: World) -> None:
        """Shard `model`, the same on every rank, and the state of its optimizer."""
        # Imported here, because the import of DeepSpeed takes seconds and chooses the accelerator. Without
        # DS_ACCELERATOR it would choose a GPU even for a run on the CPU.
        os.environ["DS_ACCELERATOR"] = world.device.type
        import deepspeed  # noqa: PLC0415
        from deepspeed.accelerator import get_accelerator  # noqa: PLC0415
        from deepspeed.ops import __compatible_ops__ as compatible_ops  # noqa: PLC0415
        from deepspeed.runtime import bf16_optimizer, compiler  # noqa: PLC0415
        from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: PLC0415

        deepspeed.utils.logger.setLevel(logging.WARNING)
        # DeepSpeed calls deprecated collectives in every step. A user cannot change that.
        warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.\w+` is deprecated")
        # On CPUs DeepSpeed would compile a shared-memory collective for two minutes; gloo does the same.
        compatible_ops["deepspeed_shm_comm"] = False
        # DeepSpeed imports and compiles its own Muon for every optimizer, which takes two seconds.
        compiler.compile = lambda: lambda function: function
        self.stage, self.config = config.engine.zero_stage, config
        share = config.data.batch_size // world.size
        micro_batch = config.engine.micro_batch_size or share
        self.micro_batches = share // micro_batch
        self.execution = prepare(
            model, config.engine, world.device, training=True, batch=micro_batch, micro_batches=self.micro_batches
        )
        if self.execution.by_block and self.stage == 3:
            # The hooks of a leaf module gather all its weights at once, outside the block's graph.
            deepspeed.utils.set_z3_leaf_modules(model, [Block, FinalLayer])
        self.world, self._network = world, model
        self._bucket_elements = _bucket_elements(model, world)
        _name_device_as_deepspeed_does(world.device)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(model, config.optim),
            config=_deepspeed_config(config, world, self.micro_batches, self._bucket_elements),
        )
        self._optimizer = self._engine.optimizer
        self._parameters: list[tuple[str, Any]] = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._answer_on_device(get_accelerator())
        self._stage0_norm = torch.zeros(())
        self.fragments = list(self._fragments())
        self._base = getattr(self._optimizer, "optimizer", self._optimizer)
        if isinstance(self._base, Muon):
            self._lay_out(self._base)
        # AdamW skips a step if a tensor on the device (`found_inf`) tells it to, so the host need not wait for it.
        self._skips_on_device = not isinstance(self._base, Muon) and not config.engine.offload_optimizer
        self._in_step: list[Replacement] = [  # functions of the optimizer of bf16 in stage 1
            (bf16_optimizer, "get_global_norm_of_tensors", partial(whole_gradient_norm, world.device)),
            (bf16_optimizer, "clip_tensors_by_global_norm", clip_by_norm),
        ]
        if self.stage == 3 and world.device.type == "cuda" and not config.engine.offload_optimizer:
            # The current stream already waits for each of the last gathers; the host need not wait as well.
            self._in_step.append((get_accelerator(), "synchronize", lambda *_: None))
        if self._skips_on_device:
            asking = (stage_1_and_2, stage3, bf16_optimizer)
            self._in_step += [(module, "is_invalid_grad_norm", self._judge) for module in asking]
            if config.engine.precision == "bf16":  # DeepSpeed would call it before the norm, and wait for the result
                self._optimizer.check_overflow = lambda *_, **__: None
        self._moved = torch.ones((), dtype=torch.bool)
        if self.stage == 0 and not self._skips_on_device:
            # In stages 1 to 3 DeepSpeed skips gradients that are not finite. In stage 0 it would apply them.
            apply = self._optimizer.step
            self._optimizer.step = lambda *arguments, **named: (
                apply(*arguments, **named) if self._stage0_norm.isfinite() else None
            )

    def __call__(
        self,
        z: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        kept: torch.Tensor | None = None,
        *,
        middle: bool = False,
    ) -> torch.Tensor:
        """The network's prediction, as `JiT.forward` returns it, under the engine's precision."""
        return self._engine(z, t, y, kept, middle=middle)

    @property
    def subspace(self) -> torch.Tensor | None:
        """The network's subspace, on the device."""
        return self._network.subspace

    def stored_buffers(self) -> dict[str, torch.Tensor]:
        """See `JiT.stored_buffers`; every rank's device has the same whole buffers."""
        return self._network.stored_buffers()

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of one micro-batch's mean loss, divided by the number of micro-batches."""
        self._engine.backward(loss)

    def step(self, lr: float | None = None) -> torch.Tensor:
        """End a micro-batch; after the last one of a step, update the weights with learning rate `lr`.

        Returns a boolean () on the device: whether the last step moved the weights. A step with an infinite or NaN
        gradient does not. Reading the boolean waits for the device.
        """
        if lr is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = lr * group["lr_factor"]
            if self.stage == 0:
                self._stage0_norm = torch.nn.utils.get_total_norm([p.grad for p in self._flats() if p.grad is not None])
                self._judge(self._stage0_norm)
        with replaced(*self._in_step):
            self._engine.step()
        if lr is not None and not self._skips_on_device and self.stage > 0:
            # The host knows the outcome; the averages need it on their device. `torch.full` makes it there, because
            # a copy to a GPU would wait for the whole step.
            there = torch.device("cpu") if self.config.engine.offload_optimizer else self.world.device
            self._moved = torch.full((), self._engine.was_step_applied(), dtype=torch.bool, device=there)
        return self._moved

    def _answer_on_device(self, accelerator: Any) -> None:
        """Replace functions of DeepSpeed that let the host wait before the end of a step, or copy needlessly."""
        optimizer, config, device = self._optimizer, self.config, self.world.device
        offloaded = config.engine.offload_optimizer  # then the CPU reads the reduced gradients and their norm
        if hasattr(optimizer, "get_grad_norm_direct"):  # stages 1 to 3, except bf16 in stage 1
            optimizer.get_grad_norm_direct = partial(gradient_norm, device)
        if self.stage == 3 and device.type == "cuda" and not offloaded:
            order_after_reductions(optimizer, accelerator, optimizer.reduce_and_partition_stream)
        if self.stage in (1, 2) and hasattr(optimizer, "single_partition_of_fp32_groups"):
            skip_needless_work(optimizer)
            if not offloaded:
                # One rank has nothing to sum. On a GPU it still calls NCCL, so that errors of NCCL appear with one GPU
                # too. With CUDA graphs it does not, because the host has no time for the call.
                collective = self.world.size > 1 or (device.type == "cuda" and not self.execution.graphs)
                Reducer(optimizer, [p for _, p in self._parameters], self._bucket_elements, collective=collective)

    def _judge(self, norm: torch.Tensor) -> bool:
        """Let the optimizer skip the step if the gradient `norm` is not finite, or is -1, DeepSpeed's sign for that.

        It replaces DeepSpeed's `is_invalid_grad_norm`, which lets the host wait. It always returns False: the decision
        is made on the device.
        """
        self._moved = norm.isfinite() & (norm >= 0)
        if self._skips_on_device:
            self._base.found_inf = (~self._moved).float()
        return False

    def gradient_norm(self) -> float:
        """The global 2-norm of the last step's gradients before clipping."""
        norm = float(self._stage0_norm if self.stage == 0 else self._engine.get_global_grad_norm())
        return norm if norm >= 0 else float("inf")  # -1 and NaN mean: not finite

    def masters(self) -> list[torch.Tensor]:
        """This rank's flat float32 master tensors, in the order in which fragments number them."""
        return cast(list[torch.Tensor], self._owned(self._flats()))

    def moments(self) -> dict[str, Flats]:
        """The optimizer's moments, laid out like the masters; None where Muon has none. Empty before the first step."""
        states = self._optimizer_states()
        present = [name for name in MOMENTS if any(name in state for state in states)]
        return {name: self._owned([state.get(name) for state in states]) for name in present}

    def optimizer_step(self) -> int:
        """Number of updates that the moments have seen."""
        return max((int(state["step"]) for state in self._optimizer_states() if "step" in state), default=0)

    @torch.no_grad()
    def prepare_to_load(self, optimizer_step: int) -> dict[str, Flats]:
        """Make room for a saved state; returns the flat tensors to fill before `finish_loading`.

        They are `model` (the masters) and, if `optimizer_step` > 0, the moments.
        """
        if self.stage == 3:
            self._optimizer.checkpoint_event_prologue()  # shards the weights that are still gathered
        for flat, state, by_muon in zip(self._flats(), self._optimizer_states(), self._by_muon(), strict=True):
            state.clear()
            if optimizer_step > 0:
                state.update({name: torch.zeros_like(flat) for name in (("exp_avg",) if by_muon else MOMENTS)})
                if not by_muon:  # one tensor for each flat: a shared one would be advanced several times per step
                    state["step"] = torch.tensor(float(optimizer_step), device=flat.device)
        return {"model": self.masters(), **self.moments()}

    @torch.no_grad()
    def finish_loading(self) -> None:
        """Copy the loaded masters into the weights that the forward pass uses."""
        optimizer = self._optimizer
        if self.stage == 0:
            # Every rank holds whole tensors, but each rank has loaded only its share of them.
            for weight, whole in zip(self._flats(), self.gather(self.masters()).values(), strict=True):
                weight.copy_(whole)
            for moment, flats in self.moments().items():
                for state, whole in zip(self._optimizer_states(), self.gather(flats).values(), strict=True):
                    if moment in state:
                        state[moment].copy_(whole)
        elif self.stage < 3:
            optimizer.update_lp_params()
        else:
            weights, parameters_of = optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups
            for master, flat, parameters in zip(self._flats(), weights, parameters_of, strict=True):
                flat.copy_(master)
                for parameter, part in zip(parameters, optimizer.unflatten(flat, parameters), strict=True):
                    parameter.data = part.data
            optimizer.checkpoint_event_epilogue()  # gathers the parameters that stay whole on every rank

    def gather(self, flats: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """Whole float32 parameters, on every rank's device, from flat tensors laid out like the masters.

        A flat tensor that is None gives zeros. A collective call. One rank owns each element, so the sum is exact.
        """
        whole: dict[str, torch.Tensor] = {}
        self.gather_each(flats, whole.__setitem__)
        return whole

    @torch.no_grad()
    def gather_each(
        self, flats: Sequence[torch.Tensor | None], take: Callable[[str, torch.Tensor], object] | None
    ) -> None:
        """Like `gather`, but call `take(name, parameter)` for each; only one bucket of them is in memory at a time.

        A rank that needs no parameters passes None.
        """
        own = {f.name: f for f in self.fragments}
        shapes = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in self._parameters]
        for bucket in parallel.buckets(shapes, lambda named: _aligned(prod(named[1]))):
            buffer = torch.zeros(sum(_aligned(prod(shape)) for _, shape in bucket), device=self.world.device)
            parts = buffer.split([_aligned(prod(shape)) for _, shape in bucket])
            for (name, _), part in zip(bucket, parts, strict=True):
                if (f := own.get(name)) is not None and (flat := flats[f.flat]) is not None:
                    part[f.offset : f.offset + f.length] = flat[f.start : f.start + f.length]
            parallel.sum_over_ranks(buffer)
            if take is not None:
                for (name, shape), part in zip(bucket, parts, strict=True):
                    take(name, part[: prod(shape)].view(shape))
            del buffer, parts, part  # before the next bucket is allocated

    def release_memory(self) -> None:
        """Free CUDA graphs, and in stage 3 gathered weights, between two steps; the next step makes them again."""
        if self.execution.training_graphs is not None:
            self.execution.training_graphs.release()
        if self.stage == 3:
            self._engine.empty_partition_cache()

    def destroy(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()

    def _fragments(self) -> Iterator[Fragment]:
        """The positions in the flat masters of this rank's part of each parameter."""
        if self.stage == 0:
            yield from self._even_shares()
        elif self.stage < 3:
            for name, p in self._parameters:
                if (mapping := p._hp_mapping) is not None:
                    master, offset = mapping.get_hp_fragment_address(), mapping.lp_fragment_address.start
                    yield Fragment(name, tuple(p.shape), mapping.param_group_index, master.start, master.numel, offset)
        else:
            optimizer = self._optimizer
            for name, p in self._parameters:
                flat, start, length = optimizer.grad_position[optimizer.get_param_id(p)]
                offset = optimizer._get_param_partition_rank(p) * length
                owned = min(length, p.ds_numel - offset)  # the last ranks may hold padding
                if owned > 0:
                    yield Fragment(name, tuple(p.ds_shape), flat, start, owned, offset)

    def _even_shares(self) -> Iterator[Fragment]:
        """Stage 0 replicates the masters; each rank owns an even share of their concatenation, as slices of them."""
        total = sum(p.numel() for _, p in self._parameters)
        low = self.world.rank * total // self.world.size
        high = (self.world.rank + 1) * total // self.world.size
        position = flat = 0
        for name, p in self._parameters:
            first, last = max(low, position), min(high, position + p.numel())
            if first < last:
                yield Fragment(name, tuple(p.shape), flat, 0, last - first, first - position)
                flat += 1
            position += p.numel()

    def _flats(self) -> list[torch.Tensor]:
        """The tensors that the optimizer steps: flat masters, or in stage 0 the whole parameters."""
        if self.stage == 0:
            return [p for _, p in self._parameters]
        if self.stage == 3:
            return self._optimizer.fp32_partitioned_groups_flat
        if hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            return self._optimizer.single_partition_of_fp32_groups
        return self._optimizer.fp32_groups_flat_partition  # bf16 in stage 1

    def _optimizer_states(self) -> list[dict[str, torch.Tensor]]:
        return [self._base.state[flat] for flat in self._flats()]

    def _owned(self, flats: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """`flats` as they are (laid out like `_flats`); in stage 0, their slices that this rank's fragments own."""
        if self.stage > 0:
            return list(flats)
        whole = {name: flat for (name, _), flat in zip(self._parameters, flats, strict=True)}
        return [
            None if (flat := whole[f.name]) is None else flat.detach().view(-1)[f.offset : f.offset + f.length]
            for f in self.fragments
        ]

    def _by_muon(self) -> list[bool]:
        """For each of `_flats`, whether Muon updates it."""
        groups = self._optimizer.param_groups
        if self.stage == 0:
            muon = {id(p) for group in groups if group["muon"] for p in group["params"]}
            return [id(p) in muon for p in self._flats()]
        of_flat = self._optimizer.sub_group_to_group_id if self.stage == 3 else range(len(groups))
        return [bool(groups[of_flat[index]]["muon"]) for index in range(len(self._flats()))]

    def _lay_out(self, muon: Muon) -> None:
        """Tell the optimizer which matrices its flat tensors hold."""
        numbered = enumerate(zip(self._flats(), self._by_muon(), strict=True))
        flats = {number: flat for number, (flat, by_muon) in numbered if by_muon}
        if self.stage == 0:
            muon.lay_out(flats, [whole_fragments({name: tuple(p.shape) for name, p in self._parameters})], rank=0)
        else:
            muon.lay_out(flats, parallel.gather_objects(self.fragments), self.world.rank)


def _aligned(elements: int) -> int:
    """`elements` of a float32 tensor, rounded up so that the next tensor in a buffer is aligned."""
    return -(-elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS


def _name_device_as_deepspeed_does(device: torch.device) -> None:
    """Set LOCAL_RANK to the index of this rank's GPU: DeepSpeed uses it as such, now and in the steps of stage 3.

    A task that sees only its own GPU has index 0, whatever its local rank is. `World` keeps the local rank.
    """
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)
    # DeepSpeed requires that mpirun's variable has the same value. It may be inherited from the parent process.
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)


def _bucket_elements(model: JiT, world: World) -> int:
    """The number of elements of a bucket of gradients, which one collective reduces."""
    if world.device.type == "cpu":
        return SMALL_BUCKET_ELEMENTS
    sizes = [p.numel() for p in model.parameters()]
    return reduce_bucket_elements(sum(sizes), max(sizes), world.size)


def _deepspeed_config(config: Config, world: World, micro_batches: int, bucket_elements: int) -> dict[str, Any]:
    engine, ranks, cpu = config.engine, world.size, world.device.type == "cpu"
    zero: dict[str, Any] = {"stage": engine.zero_stage, "zero_hpz_partition_size": engine.hpz_group_size}
    if not cpu or engine.zero_stage in (1, 2):
        zero["reduce_bucket_size"] = bucket_elements
    if engine.zero_stage in (1, 2) and not cpu:
        zero["overlap_comm"] = ranks > 1  # DeepSpeed's default in stage 3 only; used where `Reducer` is not
    settings: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.data.batch_size // ranks // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        "steps_per_print": 10**12,  # the tracker prints
        "timers": {"throughput": {"enabled": False}},  # this timer would wait for the device twice in a micro-batch
        "zero_allow_untested_optimizer": True,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not cpu}
        # torch's fused AdamW runs on CPUs too; DeepSpeed's CPU optimizer would have to be compiled first.
        settings["zero_force_ds_cpu_optimizer"] = False
    if engine.precision == "bf16":
        settings |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    elif engine.precision == "autocast":
        # An empty list of modules keeps gradients (and stage-3 weights) in fp32 on the wire.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings
