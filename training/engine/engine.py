"""DeepSpeed, wrapped: one engine over one module. Nothing else in the project imports deepspeed.

One module and one engine, because two engines, or two backward passes before one step, give silently wrong gradients
under ZeRO. What DeepSpeed does not do, and this file adds: a gradient norm and a clip per parameter group; an update
that happens on all ranks or, after a loss or gradient that is not finite on any of them, on none; weights gathered by
name under every ZeRO stage.

All methods that say *collective* are called by every rank in the same order. None waits longer than `timeout_s`.
"""

import contextlib
import functools
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.engine.engine_setup import check_groups, check_settings, concrete_precision, deepspeed_config
from training.engine.gated_adamw import GatedAdamW
from training.engine.ranks import Ranks, set_timeout
from training.models.parts.adapters import merged
from training.models.parts.named_weights import match_weights, named_weights
from training.training_settings import EngineConfig

GATHER_ELEMENTS = 64_000_000  # Number of ZeRO 3 weights made whole at once while gathering by name
TAG, LAYOUT = "state", "layout.json"

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outcome of one `Engine.step`."""

    at_boundary: bool  # False inside a gradient accumulation: nothing below was computed
    updated: bool  # False at a boundary: something was not finite, weights and optimiser state are as before
    grad_norm: dict[str, float]  # norm of each group over all ranks, before clipping; 0.0 if it does not train
    skipped_in_a_row: int  # Number of updates
    num_skipped: int  # Number of updates since the engine was made


class Engine(Ranks):
    """A module under DeepSpeed ZeRO 0 to 3; without a trainable parameter it computes forward only."""

    def __init__(
        self, module: nn.Module, config: EngineConfig, parameter_groups: Mapping[str, Sequence[nn.Parameter]]
    ) -> None:
        """Set up DeepSpeed, and copy the weights of rank 0 to all ranks. Collective. `parameter_groups` maps names to
        the parameters that train; a group may be empty. Raises ValueError for a setting that is not allowed, and if the
        groups are not exactly the parameters that require a gradient."""
        check_settings(config)
        self.module = module
        self._group_names = list(parameter_groups)
        self._trained = [name for name in self._group_names if parameter_groups[name]]
        check_groups(module, {name: parameter_groups[name] for name in self._trained})
        super().__init__(config.timeout_s)
        config = replace(config, precision=self.broadcast_object(concrete_precision(config.precision, module)))
        self.config = config
        self._parameters = {name: list(parameter_groups[name]) for name in self._trained}
        self._engine: Any = None
        self._optimizer: GatedAdamW | None = None
        if self._trained:
            groups = [{"params": self._parameters[n], "name": n, "gradient_scale": 1.0} for n in self._trained]
            betas = (config.beta1, config.beta2)
            self._optimizer = GatedAdamW(
                groups, lr=0.0, betas=betas, eps=config.epsilon, weight_decay=config.weight_decay, fused=True
            )
        if self._trained or config.zero_stage == 3:
            self._initialize()
        else:
            self._place_without_deepspeed()
        self._loss_is_finite = torch.ones((), dtype=torch.bool, device=self.device)
        self._awaits_step = False
        self.skipped_in_a_row, self.num_skipped = 0, 0

    @property
    def at_boundary(self) -> bool:
        """True if the next `step` ends a gradient accumulation."""
        return self._engine is not None and bool(self._engine.is_gradient_accumulation_boundary())

    @property
    def weights_dtype(self) -> torch.dtype:
        """The type of the weights that compute: bfloat16 or float32."""
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def __call__(
        self,
        method: Callable[Concatenate[Any, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """Return `method(module, *args, **kwargs)`, as in `engine(System.prior, batch, 1.0)`; collective under ZeRO 3.

        The call goes through the module's forward, whose hooks gather sharded weights; that forward takes the method
        as its first argument. If autocast is configured, it spans exactly this call, so that no 16-bit copy of a
        weight outlives it."""
        if self._engine is not None:
            return self._engine(method, *args, **kwargs)
        on = self.config.precision == "bf16_autocast"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on):
            return self.module(method, *args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a scalar `loss`; collective, once per micro-batch, before `step`. They are averaged
        over ranks and over the micro-batches of an accumulation. Each rank's loss must depend on every group that
        trains."""
        assert self._trained, "backward without a parameter that trains"
        assert not self._awaits_step, "two backward passes before one step: under ZeRO the first would be lost"
        self._awaits_step = True
        self._loss_is_finite &= torch.isfinite(loss.detach())
        self._prepared = False
        hook = loss.register_hook(lambda gradient: self._engine._backward_prologue())
        self._engine.backward(loss)
        hook.remove()

    def step(self, lr: Mapping[str, float]) -> StepResult:
        """End a micro-batch; collective. At the end of an accumulation, update each group with its learning rate
        (`lr` may name groups that do not train), its gradient clipped to `clip_norm` on its own."""
        assert self._awaits_step, "step without a backward pass"
        assert self._optimizer is not None
        self._awaits_step = False
        if not self.at_boundary:
            self._engine.step()
            return StepResult(
                at_boundary=False,
                updated=False,
                grad_norm={},
                skipped_in_a_row=self.skipped_in_a_row,
                num_skipped=self.num_skipped,
            )
        norms, finite = self._gradient_norms()
        for group in self._optimizer.param_groups:
            clip, norm = self.config.clip_norm, norms[group["name"]]
            group["lr"] = lr[group["name"]]
            group["gradient_scale"] = min(1.0, clip / (norm + 1e-6)) if clip > 0 and finite else 1.0
        self._optimizer.held = not finite
        self._engine.step()
        self._clear_gradient_buffers()
        self._loss_is_finite.fill_(True)
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.num_skipped += not finite
        grad_norm = {name: norms.get(name, 0.0) for name in self._group_names}
        return StepResult(
            at_boundary=True,
            updated=finite,
            grad_norm=grad_norm,
            skipped_in_a_row=self.skipped_in_a_row,
            num_skipped=self.num_skipped,
        )

    # ---------------------------------------------------------------- weights by name

    def consolidated_state(self, prefix: str | None = None) -> dict[str, Tensor]:
        """Return the weights that compute, as fp32 CPU tensors, on rank 0; {} elsewhere. Collective under ZeRO 3.
        Adapters are merged into the weights that they change.

        `prefix` names a submodule ("retriever.passage_encoder"), and the names are then relative to it. A tensor with
        several names appears under the first one.
        """
        root = self.module.get_submodule(prefix.rstrip(".")) if prefix else self.module
        state = {}
        for bucket in self._whole_buckets(named_weights(root), write=False):
            if self.rank == 0:
                for name, tensor in bucket:
                    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    state[name] = tensor.detach().to("cpu", dtype, copy=True)
        return merged(root, state) if state else state

    def load_consolidated(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy rank 0's `state` (that of other ranks is not read) into all ranks' weights; fp32 master copies follow,
        optimiser moments stay. Collective. Raises ValueError on all ranks as `match_weights` does."""
        matched, problem = {}, None
        if self.rank == 0:
            try:
                matched = match_weights(self.module, state, strict)
            except ValueError as error:
                problem = str(error)
        names, problem = self.broadcast_object((list(matched), problem))
        if problem is not None:
            raise ValueError(problem)
        weights = named_weights(self.module)
        with torch.no_grad():
            for bucket in self._whole_buckets({name: weights[name] for name in names}, write=True):
                for name, tensor in bucket:
                    if self.rank == 0:
                        tensor.copy_(matched[name])
                    if self.world_size > 1 and not hasattr(tensor, "ds_id"):  # DeepSpeed sends those of ZeRO 3
                        dist.broadcast(tensor.detach(), 0)
        if self._trained and hasattr(self._engine.optimizer, "refresh_fp32_params"):
            self._engine.optimizer.refresh_fp32_params()

    def save(self, directory: Path) -> None:
        """Write weights and optimiser state for `load`; collective, between accumulations.

        Raises OSError or RuntimeError on the ranks whose disk failed, after every rank is through."""
        assert self._trained, "nothing trains: there is no state to save"
        assert self._engine.micro_steps % self.config.gradient_accumulation == 0, "save inside an accumulation"
        failures: list[Exception] = []
        writer = self._engine.checkpoint_engine
        write = writer.save

        def save(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:  # leaving here would strand the other ranks in a barrier
                failures.append(error)

        writer.save = save
        try:
            self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
        finally:
            del writer.save
        if self.rank == 0 and not failures:
            (directory / LAYOUT).write_text(json.dumps(self._layout()))
        if failures:
            raise failures[0]

    def load(self, directory: Path) -> None:
        """Continue bit for bit from the files of `save`; collective, on an engine that has not stepped. The files are
        unpickled: load only those that this run wrote. Raises ValueError if ranks, ZeRO stage or groups differ."""
        assert self._trained, "nothing trains: weights come by `load_consolidated`"
        saved = json.loads((directory / LAYOUT).read_text())
        for setting, value in self._layout().items():
            if saved[setting] != value:
                raise ValueError(
                    f"{directory} was written with {setting} {saved[setting]}, this run has {value}: resume with the "
                    "same, or start a new run from its weights"
                )
        with contextlib.redirect_stdout(io.StringIO()):  # one stage prints
            path, _ = self._engine.load_checkpoint(str(directory), tag=TAG)
        if path is None:
            raise ValueError(f"{directory} holds no DeepSpeed state")

    # ---------------------------------------------------------------- inside

    def _initialize(self) -> None:
        config = deepspeed_config(self.config, sum(p.numel() for ps in self._parameters.values() for p in ps))
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory
            self._engine, *_ = _deepspeed().initialize(model=self.module, optimizer=self._optimizer, config=config)
        self._prepare_backward = self._engine._backward_prologue
        self._engine._backward_prologue = self._prepare_once
        self._engine._copy_recovery_script = lambda save_path: None  # no executable code in a checkpoint
        # DeepSpeed's group has a timeout of half an hour, whatever that of the group that it was made from.
        set_timeout(self._engine.data_parallel_group, self.config.timeout_s)

    def _prepare_once(self) -> None:
        """Prepare a backward pass, once. DeepSpeed does so when a gradient reaches a tensor that `forward` returned,
        but does not look into dataclasses; unprepared, an accumulation in bf16 under ZeRO 1 counts its first
        micro-batches again. So the loss starts the preparation, and this method keeps it from happening twice."""
        if not self._prepared:
            self._prepared = True
            self._prepare_backward()

    def _place_without_deepspeed(self) -> None:
        self.module.to(self.device)
        for parameter in self.module.parameters():
            if self.config.precision == "bf16" and parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
            if self.world_size > 1:
                dist.broadcast(parameter.detach(), 0)

    def _gradient_norms(self) -> tuple[dict[str, float], bool]:
        """Return the norm of each trained group's whole gradient, and whether all of them and all losses are finite."""
        squares = torch.zeros(len(self._trained) + 1, dtype=torch.float64, device=self.device)
        for index in range(len(self._trained)):
            gradients, on_every_rank = self._gradients(index)
            if self.rank == 0 or not on_every_rank:
                gradients = [g if g.dtype == torch.float32 else g.float() for g in gradients]
                squares[index] = torch.nn.utils.get_total_norm(gradients).double().square()
        squares[-1] = (~self._loss_is_finite).double()
        dist.all_reduce(squares)
        *totals, num_bad_losses = squares.tolist()
        norms = {name: math.sqrt(total) for name, total in zip(self._trained, totals, strict=True)}
        return norms, num_bad_losses == 0 and all(math.isfinite(norm) for norm in norms.values())

    def _gradients(self, index: int) -> tuple[list[Tensor], bool]:
        """Return this rank's averaged gradients of a group, and whether each rank has all of them rather than a part.

        The places are those where DeepSpeed 0.19 keeps them between backward and step, stage by stage.
        """
        optimizer, stage, offload = self._engine.optimizer, self.config.zero_stage, self.config.offload_optimizer
        if stage == 0:
            return [p.grad for p in self._parameters[self._trained[index]] if p.grad is not None], True
        if stage == 3:
            parts = [s for s, group in optimizer.sub_group_to_group_id.items() if group == index]
            if offload:
                return [optimizer.fp32_partitioned_groups_flat[part].grad for part in parts], False
            return [gradient for part in parts for gradient in optimizer.averaged_gradients[part]], False
        if offload:
            return [optimizer.single_partition_of_fp32_groups[index].grad], False
        if hasattr(optimizer, "fp32_groups_gradients"):  # bf16 under stage 1 has an optimiser of its own
            return list(optimizer.fp32_groups_gradients[index]), True
        return list(optimizer.averaged_gradients[index]), False

    def _clear_gradient_buffers(self) -> None:
        """Zero the buffers that DeepSpeed overwrites only for parameters with a gradient, so that no earlier step's is
        used."""
        optimizer, stage = self._engine.optimizer, self.config.zero_stage
        if stage == 3:
            optimizer.grad_partitions_flat_buffer.zero_()
        if stage > 0 and self.config.offload_optimizer:
            flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
            for part in flat:
                if part.grad is not None:
                    part.grad.zero_()

    def _whole_buckets(self, weights: Mapping[str, Tensor], write: bool) -> Iterator[list[tuple[str, Tensor]]]:
        """Yield `weights` in buckets; while one is handed out, its tensors are whole. With `write`, rank 0's changes
        are sent to all ranks when the next bucket is asked for."""
        if self.config.zero_stage < 3:
            yield list(weights.items())
            return
        optimizer = self._engine.optimizer
        if self._trained:
            optimizer.checkpoint_event_prologue()  # small parameters, kept whole, are partitioned like the others
        bucket: list[tuple[str, Tensor]] = []
        num_elements = 0
        for position, (name, tensor) in enumerate(weights.items(), 1):
            bucket.append((name, tensor))
            num_elements += getattr(tensor, "ds_numel", tensor.numel())
            if num_elements >= GATHER_ELEMENTS or position == len(weights):
                parameters = [tensor for _, tensor in bucket if hasattr(tensor, "ds_id")]
                with _deepspeed().zero.GatheredParameters(parameters, modifier_rank=0 if write else None):
                    yield bucket
                bucket, num_elements = [], 0
        if self._trained:
            optimizer.checkpoint_event_epilogue()

    def _layout(self) -> dict[str, Any]:
        return {
            "number of ranks": self.world_size,
            "engine.zero_stage": self.config.zero_stage,
            "engine.precision": self.config.precision,
            "trained groups": self._trained,
        }


@functools.cache
def _deepspeed() -> Any:
    """Import DeepSpeed at its first use (3 s), quietly."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    import deepspeed

    # Only inference uses this operator, and loading it would compile C++ on a machine that may have no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
