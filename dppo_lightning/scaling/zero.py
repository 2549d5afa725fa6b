"""ZeroStrategy: DeepSpeed's ZeRO stages 1, 2 and 3, on GPUs and on CPU ranks."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import Tensor, nn
from torch.optim import Optimizer

from dppo_lightning.base.errors import ConfigError
from dppo_lightning.scaling.extensions import EXTENSIONS, stale_locks
from dppo_lightning.scaling.resume import is_universal, ranks_of
from dppo_lightning.scaling.sharding import ShardingStrategy, local_part

log = logging.getLogger(__name__)

Offload = Literal["none", "cpu", "nvme"]


class ZeroStrategy(ShardingStrategy, DeepSpeedStrategy):
    """Shards of optimizer state (stage 1), of gradients too (2), of parameters too (3).

    Differs from Lightning's DeepSpeedStrategy: CPU ranks are allowed; deepspeed is imported when the run starts, once
    the accelerator is set; a model is loaded straight into shards; and a step's gradient is the sum over its
    micro-batches that it is under any other strategy, not that sum divided by their number.

    Args:
        stage: ZeRO stage, see above.
        offload_optimizer: Place of the optimizer state when not on the device. "cpu" works at every stage, "nvme" at 3.
        offload_parameters: Place of the parameters when not on the device; stage 3 only.
        nvme_path: Folder on a local disk, for offload to "nvme".
        param_persistence_threshold: Number of elements below which stage 3 keeps a parameter whole on every rank.
        reduce_bucket_size: Number of elements in a piece of gradients that is reduced at a time.
        allgather_bucket_size: Number of elements in a piece of parameters that is gathered at a time (stages 1 and 2).
        prefetch_bucket_size: Number of elements gathered ahead of their use (stage 3).
        max_live_parameters: Number of elements that may be whole at a time (stage 3).
        timeout_minutes: Longest time of one collective operation of training, in minutes; waiting for a rollout is not
            one.

    Raises:
        ConfigError: deepspeed is not installed, or two settings do not fit together.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: Offload = "none",
        offload_parameters: Offload = "none",
        nvme_path: str | None = None,
        param_persistence_threshold: int = 100_000,
        reduce_bucket_size: int = 200_000_000,
        allgather_bucket_size: int = 200_000_000,
        prefetch_bucket_size: int = 50_000_000,
        max_live_parameters: int = 1_000_000_000,
        timeout_minutes: float = 30.0,
    ) -> None:
        _check(stage, offload_optimizer, offload_parameters, nvme_path)
        # not DeepSpeedStrategy's: it imports deepspeed, which picks its accelerator once and for all
        DDPStrategy.__init__(self, timeout=timedelta(minutes=timeout_minutes))
        self.stage = stage
        self.config: dict[str, Any] = _config(
            _zero_section(
                stage,
                offload_optimizer,
                offload_parameters,
                nvme_path,
                {
                    "reduce_bucket_size": reduce_bucket_size,
                    "allgather_bucket_size": allgather_bucket_size,
                    "stage3_param_persistence_threshold": param_persistence_threshold,
                    "stage3_prefetch_bucket_size": prefetch_bucket_size,
                    "stage3_max_live_parameters": max_live_parameters,
                },
            )
        )
        # From here on the fields that DeepSpeedStrategy's constructor would set: its other methods read them, and fail
        # with an AttributeError where one is missing.
        self.remote_device = None
        self.load_full_weights = False
        self.exclude_frozen_parameters = False
        self.loss_scale = 0.0  # dynamic; this and the four below are Lightning's defaults for float16
        self.initial_scale_power = 16
        self.loss_scale_window = 1000
        self.hysteresis = 2
        self.min_loss_scale = 1
        self._config_initialized = False  # the trainer's settings are not in self.config yet
        self._frozen_engines: list[Any] = []

    def setup_environment(self) -> None:
        """Set the accelerator before deepspeed looks for one itself, and join the process group."""
        assert self.parallel_devices is not None
        if isinstance(self.accelerator, CPUAccelerator):
            os.environ["DS_ACCELERATOR"] = "cpu"
            self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS.expanduser()))
        if self.global_rank == 0 and (locks := stale_locks([Path(os.environ["TORCH_EXTENSIONS_DIR"])], time.time())):
            log.warning(
                "a build of a DeepSpeed operation was killed, and a run that needs the operation waits for ever for "
                f"its lock: if nothing is being compiled, rm {' '.join(map(shlex.quote, locks))}"
            )
        import deepspeed

        deepspeed.utils.logging.logger.setLevel(logging.WARNING)
        if isinstance(self.accelerator, CPUAccelerator):
            if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
                raise ConfigError("deepspeed was imported for another accelerator: set DS_ACCELERATOR=cpu")
            # deepspeed's own table of operations that can be compiled here. Without this line it spends a minute on
            # compiling one that is of use in inference only.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.precision_plugin = ZeroPrecision(self.precision_plugin.precision)  # type: ignore[arg-type]
        DDPStrategy.setup_environment(self)

    def setup(self, trainer: pl.Trainer) -> None:
        """Start the engine.

        Stage 3 learns the order in which modules are called and gathers ahead by it. How often the loss is called
        depends on a rank's tokens, so it is kept out: ranks that disagree on the order would wait for each other.
        """
        super().setup(trainer)
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if next(child.parameters(), None) is None:
                remove_module_hooks(child)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Context for loading a model, which transformers cuts into shards tensor by tensor under stage 3."""
        # Private to Lightning. Without this call the config that transformers reads has no precision yet, and the
        # shards are made in another dtype than the run's.
        self._init_config_if_needed()
        if not self.zero_stage_3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        keep_alive = HfDeepSpeedConfig(self.config)  # transformers itself holds only a weak reference
        yield
        del keep_alive

    def shard_frozen(self, reference: nn.Module) -> None:
        """Give the reference an engine of its own under stage 3, without an optimizer."""
        if not self.zero_stage_3:
            return
        import deepspeed

        keep = {"zero_optimization", "zero_allow_untested_optimizer", "bf16", "fp16", "data_types"}
        keep.add("train_micro_batch_size_per_gpu")
        engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.root_device.index),
            config={name: value for name, value in self.config.items() if name in keep},
            model=reference,
            model_parameters=[],
            dist_init_required=False,
        )
        self._frozen_engines.append(engine)

    @contextmanager
    def scoring(self) -> Generator[None, None, None]:
        """Context for passes without gradient, which are kept out of stage 3's order of modules.

        Stage 3 gathers ahead by the order of a training step, which such a pass does not finish. So the order begins
        again before and after the pass, and parameters that were gathered and not used are let go: the next step, or
        the sending of weights to the engine, would find them half gathered.
        """
        if self.zero_stage_3:
            self._restart_order()
        yield
        if self.zero_stage_3:
            self._restart_order()

    def _restart_order(self) -> None:
        for engine in (self.deepspeed_engine, *self._frozen_engines):
            offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
            # Internal to deepspeed, which offers nothing else. Without these calls the pass is recorded as a part of
            # the order, and parameters stay gathered after it.
            coordinator = offload.get_param_coordinator()
            offload.partition_all_parameters()
            if coordinator.is_record_trace():
                coordinator._invalidate_trace()  # the order recorded so far is that of no training step
            coordinator.reset_step()

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Keep deepspeed from dividing the loss by the number of micro-batches: Lightning has done it already."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def gradient_norm(self) -> float | None:
        """Norm before clipping of the last step's gradient, or None before the first step."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def gradient_is_finite(self, norm: float) -> bool:
        """Whether what DeepSpeed has kept of the gradient is finite; ``norm`` says nothing here."""
        if flat := self._flat_gradients():
            return all(bool(gradient.isfinite().all()) for gradient in flat)
        return not self.deepspeed_engine.optimizer.has_overflow(partition_gradients=True)

    def _flat_gradients(self) -> list[Tensor]:
        """Gradients that DeepSpeed's optimizer for stage 1 in bfloat16 keeps; nothing of its other ones."""
        return getattr(self.deepspeed_engine.optimizer, "fp32_groups_gradients_flat", [])

    def gradient_of(self, parameter: nn.Parameter) -> Tensor | None:
        import deepspeed

        return deepspeed.utils.safe_get_full_grad(parameter) if parameter.requires_grad else None

    def discard_step(self) -> None:
        """Make the step that follows one that DeepSpeed lets go of, as it does when float16 overflows."""
        optimizer = self.deepspeed_engine.optimizer
        if flat := self._flat_gradients():  # this one looks at the norm alone, and then clears them
            for gradient in flat:
                gradient.fill_(float("nan"))
            return
        # Internal to deepspeed, which looks for an overflow in these places, and has none to be told of one. Without
        # this a step is refused only where the gradient is at fault, and not where the loss or the weights are.
        place = "_overflow_check_and_loss_scale_update" if self.zero_stage_3 else "check_overflow"
        looks, optimizer.check_grad_overflow = getattr(optimizer, "check_grad_overflow", False), True

        def find_one(*_: Any, **__: Any) -> bool:
            delattr(optimizer, place)  # the method of the class is in force again
            optimizer.check_grad_overflow = looks
            optimizer.overflow = True
            if not self.zero_stage_3:  # with the optimizer on the CPU the next step would be given this gradient too
                optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)
            return True

        setattr(optimizer, place, find_one)

    @property
    def step_was_dropped(self) -> bool:
        """Whether DeepSpeed let go of the last step, as it does where the gradient's norm is not finite."""
        return not self.deepspeed_engine.was_step_applied()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint of this number of ranks, or one that ``scaling.resume.reshape`` has written.

        Raises:
            ConfigError: Another number of ranks has written the checkpoint.
        """
        universal = is_universal(checkpoint_path)
        # Private to deepspeed, which sets it when the engine is made, before the checkpoint is known. Without this line
        # a reshaped checkpoint is read as one with a file per rank, which it does not have.
        self.deepspeed_engine._config.load_universal_checkpoint = universal
        ranks = ranks_of(checkpoint_path)
        if not universal and ranks and ranks != self.world_size:
            raise ConfigError(
                f"{str(checkpoint_path)!r} was written by {ranks} ranks and this run has {self.world_size}: "
                "write it again with dppo_lightning.scaling.resume.reshape, and resume from that"
            )
        state = super().load_checkpoint(checkpoint_path, weights_only)
        engine = self.deepspeed_engine
        # deepspeed finds a step's end by this count, which is that of the run that saved: its steps may have had
        # another number of micro-batches
        engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()
        return state

    def teardown(self) -> None:
        self._frozen_engines.clear()
        super().teardown()


class ZeroPrecision(DeepSpeedPrecision):
    """Precision that leaves batches as they are: log-probs, advantages and weights of the loss stay float32.

    A model's parameters are cast as under any precision, its buffers are not: see ``KeepsBuffers`` in train/policy.py.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def gathered_parameters(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Make parameters that ZeRO-3 holds in shards whole, on every rank, for as long as the context lasts."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def local_weight(parameter: nn.Parameter) -> Tensor | None:
    """What this rank holds of a parameter; None where ZeRO-3 has moved it to a disk."""
    part = getattr(parameter, "ds_tensor", None)
    if part is None:
        return local_part(parameter)
    return part if part.status.name == "AVAILABLE" else None


def gradient_norm_of_step(trainer: pl.Trainer) -> float | None:
    """Gradient norm of the last step where only the strategy knows it, else None."""
    strategy = trainer.strategy
    return strategy.gradient_norm if isinstance(strategy, ZeroStrategy) else None


def _check(stage: int, offload_optimizer: Offload, offload_parameters: Offload, nvme_path: str | None) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("deepspeed is not installed: pip install 'dppo-lightning[deepspeed]'")
    if stage not in (1, 2, 3):
        raise ConfigError(f"trainer.strategy.stage must be 1, 2 or 3, got {stage}")
    if offload_parameters != "none" and stage != 3:
        raise ConfigError(f"offload_parameters={offload_parameters!r} needs stage 3, got stage {stage}")
    if offload_optimizer == "nvme" and stage != 3:
        raise ConfigError(f"offload_optimizer='nvme' needs stage 3, got stage {stage}: use 'cpu'")
    if "nvme" in (offload_optimizer, offload_parameters) and nvme_path is None:
        raise ConfigError("offload to 'nvme' needs nvme_path: a folder on a local disk")


def _zero_section(
    stage: int, offload_optimizer: Offload, offload_parameters: Offload, nvme_path: str | None, sizes: dict[str, int]
) -> dict[str, Any]:
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": True,
        **{name: size for name, size in sizes.items() if stage == 3 or not name.startswith("stage3_")},
    }
    for name, device in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
        if device != "none":
            section[name] = {"device": device, "pin_memory": True}
        if device == "nvme":
            section[name]["nvme_path"] = nvme_path
    return section


def _config(zero: dict[str, Any]) -> dict[str, Any]:
    """Config of deepspeed; Lightning adds precision, micro-batches per step and clipping of the trainer."""
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # the run's own optimizer, not one that must be compiled
        "train_micro_batch_size_per_gpu": 1,  # used in deepspeed's own logs only
        "data_types": {
            "grad_accum_dtype": "fp32",  # in 16 bits the small gradients of later micro-batches would be lost
            "keep_in_fp32_modules": ["*"],  # buffers: stage 3 makes the model's tensors in 16 bits as it loads
        },
    }
