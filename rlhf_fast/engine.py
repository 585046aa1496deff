"""One trained model on DeepSpeed: forward, backward over any number of micro-batches, step, save, resume.

DeepSpeed averages gradients over ranks and may divide by accumulation steps. Both are undone here: losses arrive as
sums divided by the global token count, and the gradient is their plain sum, whatever the split.

Half precision keeps fp32 master weights, sums gradients in fp32 and sends them between ranks in fp32. DeepSpeed's
unpartitioned optimizers for half precision sum in half precision, so zero_stage 0 runs as stage 1 there: the same
update, less memory.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from torch.utils.serialization import config as serialization
from transformers import get_scheduler

from rlhf_fast.config import TrainerConfig
from rlhf_fast.distributed import (
    World,
    all_reduce_max,
    all_reduce_sum,
    any_rank,
    barrier,
    broadcast_object,
    gather_objects,
    init_distributed,
)
from rlhf_fast.ema import WeightAverage
from rlhf_fast.errors import CheckpointError, ConfigError
from rlhf_fast.on_disk import OptimizerOnDisk, move_weights

__all__ = [
    "Engine",
    "StepResult",
    "World",
    "all_reduce_max",
    "all_reduce_sum",
    "any_rank",
    "barrier",
    "broadcast_object",
    "gather_objects",
    "init_distributed",
]

TAG = "state"  # DeepSpeed's folder inside the one that save() is given
LAYOUT = "engine.json"  # what the files in it belong to
OLDEST = "0.19.8"  # those before let NaN through, or sum half-precision gradients in half precision: our tests fail
MAX_BUCKET = 50_000_000  # elements reduced or gathered at once; twice as many bytes as these take are buffers
PERSISTENT = 100_000  # elements up to which a weight stays whole on every rank under ZeRO-3: fetching it costs more


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    grad_norm: float  # 2-norm of the whole gradient, before clipping; not finite if the step was skipped
    skipped: bool  # not finite, or above skip_grad_norm: nothing changed on any rank (fp16: but the loss scale)


class Engine:
    """A module with its optimizer and learning-rate schedule. The module is moved to the world's device and dtype,
    and put in train mode.

    Args:
        module: its trainable parameters (requires_grad) are optimised with AdamW; biases and norms (fewer than two
            dimensions) without weight decay.
        config: dtype, zero_stage, offload_optimizer, max_grad_norm and the optimiser's fields.
        world: from init_distributed().
        total_steps: optimiser steps of the whole run, for the schedule. Warm-up takes floor(warmup_ratio * total).
        learning_rate, zero_stage: instead of the config's.
        ema_decay: keep an average of the weights with this decay, taken after each step; see averaged().
    Raises:
        ConfigError: DeepSpeed is not installed, or the dtype or offloading cannot work here.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        config: TrainerConfig,
        world: World,
        total_steps: int,
        learning_rate: float | None = None,
        zero_stage: int | None = None,
        ema_decay: float | None = None,
    ) -> None:
        stage = config.zero_stage if zero_stage is None else zero_stage
        if config.offload_optimizer and stage == 0:
            raise ConfigError("offload_optimizer: needs zero_stage 1, 2 or 3")
        if config.dtype == "float64" and (stage > 0 or world.world_size > 1):
            raise ConfigError("dtype: float64 needs zero_stage 0 and a single process; DeepSpeed has no more for it")
        self._deepspeed = _import_deepspeed(world)
        self._world = world
        self._max_grad_norm = config.max_grad_norm
        self._skip_grad_norm = config.skip_grad_norm
        self._stage = max(stage, 0 if config.dtype in ("float32", "float64") else 1)
        self._offloaded = config.offload_optimizer and memory_apart(world)
        self._layout = {"dtype": config.dtype, "zero_stage": self._stage, "world_size": world.world_size}
        module.train()  # gradient checkpointing acts in this mode only; models/loading.py has set all dropout to 0
        self._trained = [p for p in module.parameters() if p.requires_grad]
        if not self._trained:
            raise ConfigError("the model has no trainable parameter")
        self._frozen = len(self._trained) < len(list(module.parameters()))
        if self._frozen:
            module.register_state_dict_post_hook(_drop_frozen)
        warmup = int(config.warmup_ratio * total_steps)
        schedule = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
        try:
            self._engine, *_ = self._deepspeed.initialize(
                model=module,
                optimizer=self._optimizer(config, config.learning_rate if learning_rate is None else learning_rate),
                lr_scheduler=lambda optimizer: get_scheduler(schedule, optimizer, warmup, total_steps),
                config=self._deepspeed_config(config),
            )
        except ValueError as error:
            if "not supported on your device" not in str(error):
                raise
            raise ConfigError(
                f"dtype: {config.dtype} does not train on this {world.device.type}; use bfloat16 or float32"
            ) from None
        if config.dtype == "float16":  # skipped steps are counted by who calls step()
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._on_disk: OptimizerOnDisk | None = None
        if config.offload_param and config.nvme_path is not None:
            move_weights(self._engine.optimizer, Path(config.nvme_path))
        if config.offload_optimizer and config.nvme_path is not None:
            self._on_disk = OptimizerOnDisk(
                self._engine.basic_optimizer, self._master_weights(), Path(config.nvme_path)
            )
            if self._stage < 3:
                self._engine.optimizer._link_all_hp_params()  # its views of the weights kept the memory that they had
        self._norm: torch.Tensor | None = None  # of the gradient gathered so far, once somebody asked
        unsplit = self._stage == 0 or hasattr(self._engine.optimizer, "fp32_groups_gradients_flat")  # BF16_Optimizer
        if unsplit and world.world_size == 1:
            self._engine.enable_backward_allreduce = False  # it would only copy every gradient twice
        self._average = None if ema_decay is None else WeightAverage(self._master_weights(), ema_decay)

    def _optimizer(self, config: TrainerConfig, learning_rate: float) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in self._trained if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self._trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        settings: dict[str, Any] = {
            "lr": learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
        }
        groups = [group for group in groups if group["params"]]
        # Multi-tensor on a GPU, as DeepSpeed's FusedAdam; vectorised on a CPU, as its CPUAdam. But it has not to be
        # compiled, and goes on with the same bits after a resume.
        return torch.optim.AdamW(groups, fused=True, **settings)

    def _deepspeed_config(self, config: TrainerConfig) -> dict[str, Any]:
        bucket = 2 * math.ceil(min(sum(p.numel() for p in self._trained), MAX_BUCKET) / 2)
        zero: dict[str, Any] = {"stage": self._stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
        if self._stage == 3:
            zero["stage3_param_persistence_threshold"] = PERSISTENT
        if self._offloaded:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if config.offload_param and memory_apart(self._world):
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": sys.maxsize,
            "timers": {"throughput": {"enabled": False}},  # it would synchronise the GPU at every forward
            "gradient_clipping": config.max_grad_norm if self._stage else 0.0,  # stage 0: step() clips
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
            "fp16": {
                "enabled": config.dtype == "float16",
                "initial_scale_power": 12,  # a mean loss needs no more, and 16 would begin with dropped batches
                "hysteresis": 1,
            },
        }

    @property
    def module(self) -> nn.Module:
        """The module itself, weights in place: what it computes is what the engine trains."""
        return self._engine.module

    @property
    def learning_rate(self) -> float:
        """The rate that the next step will use."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward; every forward that is trained on must come through here."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient.

        Args:
            loss: scalar; a sum over this micro-batch's tokens divided by the step's token count over all ranks.
            last: True for the step's last micro-batch on this rank. All ranks pass as many micro-batches.
        """
        self._norm = None
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self._world.world_size, scale_wrt_gas=False)

    def gradients_are_finite(self) -> bool:
        """Whether step() would update: finite, and within skip_grad_norm. After the step's last micro-batch.

        The same answer on every rank.

        For engines that must move together or not at all: ask all, then step() all or zero_grad() all.
        """
        norm, scale = float(self._gradient_norm()), self._loss_scale
        if not math.isfinite(norm):
            if self._layout["dtype"] == "float16":
                self._engine.optimizer.loss_scaler.update_scale(True)  # as step() would, which will not be called
            return False
        return self._skip_grad_norm is None or norm <= self._skip_grad_norm * scale

    def step(self) -> StepResult:
        """Clip, update the weights, advance the schedule, clear the gradients.

        If any rank's gradient is not finite, no rank changes weights, optimiser state or schedule. The same if the
        norm is above skip_grad_norm.
        """
        result = self._step()
        if self._average is not None and not result.skipped:
            self._average.update()
        return result

    def _step(self) -> StepResult:
        if self._skip_grad_norm is not None and not self.gradients_are_finite():
            dropped = float(self._gradient_norm()) / self._loss_scale
            self.zero_grad()
            return StepResult(dropped, skipped=True)
        if self._stage == 0:
            # DeepSpeed looks for NaN, reports the norm and clips by it in its own optimizers; torch's AdamW is bare.
            norm = self._gradient_norm()
            if not torch.isfinite(norm):
                self.zero_grad()
                return StepResult(float(norm), skipped=True)
            if self._max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(self._trained, self._max_grad_norm, norm)
        self._engine.step()
        self._norm = None
        if self._stage == 0:
            return StepResult(float(norm), skipped=False)
        result = StepResult(float(self._engine.get_global_grad_norm()), skipped=bool(self._engine.optimizer.overflow))
        if result.skipped:
            self.zero_grad()  # offloading, DeepSpeed would add the next gradient to the one that it has dropped
        return result

    def zero_grad(self) -> None:
        """Forget the gradients gathered since the last step."""
        self._norm = None
        self._engine.zero_grad()
        if self._stage == 0:
            return
        optimizer = self._engine.optimizer
        optimizer.zero_grad()
        for name in ("averaged_gradients", "all_grad_tensors"):  # ZeRO's own store, which its zero_grad leaves alone
            store = getattr(optimizer, name, {})
            store.update(dict.fromkeys(store))
        if self._offloaded:
            optimizer.reset_cpu_buffers()
            optimizer.micro_step_id = 0 if self._stage == 3 else -1  # the next micro-batch overwrites

    @property
    def _loss_scale(self) -> float:
        """What fp16 gradients are multiplied by."""
        return float(self._engine.optimizer.loss_scaler.loss_scale) if self._layout["dtype"] == "float16" else 1.0

    def _gradient_norm(self) -> torch.Tensor:
        """2-norm of the whole gradient over all ranks (in fp16: times the loss scale). Needs every rank."""
        if self._norm is None:
            gradients, shared_out = self._gradients()
            norm = nn.utils.get_total_norm(gradients).to(self._world.device)
            if shared_out:
                norm = all_reduce_sum(norm**2, self._world) ** 0.5
            self._norm = norm
        return self._norm

    def _gradients(self) -> tuple[list[torch.Tensor], bool]:
        """Tensors with the norm of what this rank holds of the summed gradient before step(), and whether the other
        ranks hold the rest."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [p.grad for p in self._trained if p.grad is not None], False
        if hasattr(optimizer, "fp32_groups_gradients_flat"):  # BF16_Optimizer
            return optimizer.fp32_groups_gradients_flat, False
        if self._offloaded:
            return list(optimizer.norm_for_param_grads.values()), True  # taken before they left for the host
        return [gradient for group in optimizer.averaged_gradients.values() for gradient in group], True

    def _master_weights(self) -> Sequence[torch.Tensor]:
        """What the optimiser changes: this rank's part of the trained weights, fp32 under half precision."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return self._trained
        if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            return optimizer.fp32_groups_flat_partition
        return optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups

    def _refresh_module(self) -> None:
        """Give the module the master weights' values, as a step does at its end."""
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            optimizer.update_lp_params()
        elif self._stage == 3:
            optimizer.checkpoint_event_prologue()
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()

    def save(self, folder: Path) -> None:
        """Write trained weights, optimiser, schedule, loss scale and average under `folder`. Every rank calls it.

        Weights that are not trained are not saved: they come from the model's folder.
        """
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=self._frozen)
        if self._world.is_main:
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):  # DeepSpeed adds them; load() needs none
                (folder / script).unlink(missing_ok=True)
            (folder / LAYOUT).write_text(json.dumps(self._layout, indent=1) + "\n", encoding="utf-8")
        if self._average is not None and (self._stage or self._world.is_main):
            self._average.save(folder / self._average_file)
        barrier(self._world)

    @property
    def _average_file(self) -> str:
        """Each rank's part of the average; at stage 0 all ranks hold the same whole one."""
        return f"ema-{self._world.rank if self._stage else 0}.pt"

    def load(self, folder: Path) -> None:
        """Continue where save() was called: the same bits. Every rank calls it.

        DeepSpeed's files are pickles: load only folders whose hashes rlhf_fast.checkpoint has verified.

        Raises:
            CheckpointError: nothing there, or it belongs to another dtype, ZeRO stage or number of ranks.
        """
        try:
            layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: no saved engine ({error})") from None
        saved, ranks = layout.get("world_size"), self._world.world_size
        if saved != ranks:
            raise CheckpointError(
                f"{folder}: was saved by {saved} processes, this run has {ranks}. Optimizer state and random numbers "
                f"are each process's own: resume with {saved}"
            )
        for field, mine in self._layout.items():
            if layout.get(field) != mine:
                raise CheckpointError(
                    f"{folder}: was saved with {field} {layout.get(field)}, this run has {mine}; resume with the same"
                )
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),  # BF16_Optimizer prints
                serialization.patch("load.mmap", self._on_disk is not None),  # type: ignore[attr-defined]
            ):
                path, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._frozen)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            raise CheckpointError(f"{folder}: holds another model than the one of this run ({error})") from None
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it")
        if self._on_disk is not None:
            self._on_disk.take_in()
        if self._average is not None:
            self._average.load(folder / self._average_file)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, the module holds whole weights (to generate or to export), also under ZeRO-3. Read them only."""
        if self._stage < 3:
            yield
            return
        # DeepSpeed's hooks would partition each weight again after its module's forward, and a rank whose completions
        # end earlier than the others' would leave them waiting in a gather: inside there are no hooks.
        partitioning = self._engine.optimizer.parameter_offload
        with self._deepspeed.zero.GatheredParameters(list(self.module.parameters())):
            for hooks in (partitioning.forward_hooks, partitioning.backward_hooks):
                for hook in hooks:
                    hook.remove()
                hooks.clear()
            yield
        partitioning._register_deepspeed_module(partitioning.module)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """As gathered(), with the averaged weights (ema_decay) in the module's dtype. Every rank enters.

        Afterwards the trained weights are back, bit for bit.
        """
        assert self._average is not None, "the engine was made without ema_decay"
        self._average.swap()
        self._refresh_module()
        try:
            with self.gathered():
                yield
        finally:
            self._average.swap()
            self._refresh_module()


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Take what is not trained out of a state dict, under each of its names: DeepSpeed takes one of them."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            state.pop(prefix + name, None)


def memory_apart(world: World) -> bool:
    """Whether the device's memory is another than the host's, so that something can be offloaded."""
    return world.device.type != "cpu"


def partition_frozen(module: nn.Module, *, config: TrainerConfig, world: World, offload: bool) -> nn.Module:
    """A model that is only asked, under ZeRO-3: each rank keeps a part of its weights (offload: in the host's memory)
    and has a layer's whole while that runs. All ranks call its forward alike."""
    zero: dict[str, Any] = {"stage": 3, "stage3_param_persistence_threshold": PERSISTENT}
    if offload and memory_apart(world):
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    engine, *_ = _import_deepspeed(world).initialize(
        model=module,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": sys.maxsize,
            "zero_optimization": zero,
            "bf16": {"enabled": config.dtype == "bfloat16"},
            "fp16": {"enabled": config.dtype == "float16"},
        },
    )
    engine.eval()
    return engine


def _import_deepspeed(world: World) -> ModuleType:
    """DeepSpeed, told which device we use and joined to our process group; it compiles nothing here."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed insists on it
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"training needs DeepSpeed, which cannot be imported ({error}); pip install deepspeed"
        ) from None
    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ConfigError(f"DeepSpeed {deepspeed.__version__} is too old; pip install 'deepspeed>={OLDEST}'")
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It prints memory use and collects garbage a dozen times per model (seconds), whatever the configuration says.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    # Newer torch has renamed collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if world.device.type == "cpu":
        # Joining would compile a shared-memory all-reduce (half a minute); gloo does its work.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    deepspeed.init_distributed(
        dist_backend="gloo" if world.device.type == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False
    )
    return deepspeed
