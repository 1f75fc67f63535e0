"""Sets the engine up: checks settings and makes DeepSpeed's configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from indexing.declare import check_values, refuse
from training.training_settings import EngineConfig

PERSISTENT_ELEMENTS = 100_000  # Number of elements below which ZeRO 3 keeps a parameter whole on every rank
BUCKET_ELEMENTS = 200_000_000  # Number of elements of the largest piece of a reduction
WIDE = 384  # Width of a matrix from which a CPU gains by 16-bit products


def deepspeed_config(config: EngineConfig, num_elements: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; its buffers hold at most `num_elements`, the number of all that train."""
    on_gpu = torch.cuda.is_available()
    bucket = max(2, min(num_elements + num_elements % 2, BUCKET_ELEMENTS))
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
    }
    if not on_gpu:
        zero["overlap_comm"] = False
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed uses it for counters only
        "gradient_accumulation_steps": config.gradient_accumulation,
        "gradient_clipping": 0.0,  # the engine clips each group; DeepSpeed's default is 1.0 over everything
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # GatedAdamW is torch's AdamW by another name
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW needs no compiler
    }
    if config.precision == "bf16":
        result["bf16"] = {"enabled": True}
        if config.zero_stage > 0 and config.gradient_accumulation > 1:
            result["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.precision == "bf16_autocast":  # an empty list keeps gradients fp32 between ranks
        result["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return result


def check_settings(config: EngineConfig) -> None:
    """Raise ValueError naming the setting, its value and what is allowed."""
    check_values(config, "engine.")
    if config.offload_optimizer and config.zero_stage == 0:
        raise refuse("engine.offload_optimizer", "true", "must be false with engine.zero_stage=0")


def concrete_precision(precision: str, module: nn.Module) -> str:
    """Return the meaning of `auto` for `module` on this machine: 16-bit products if the processor has them, on a CPU
    only for matrices of WIDE or more, because every product first converts its weights. On a Xeon with AMX, training
    steps of width 128 took 1.3 times as long as in fp32, of 256 1.1; those of a BERT of width 384 .67 times with 512
    tokens and .4 with 4,096."""
    if precision != "auto":
        return precision
    widths = sorted(min(parameter.shape) for parameter in module.parameters() if parameter.dim() == 2)
    wide = torch.cuda.is_available() or (bool(widths) and widths[len(widths) // 2] >= WIDE)
    return "bf16_autocast" if wide and multiplies_bf16() else "fp32"


def multiplies_bf16() -> bool:
    """Return true if the GPU, or without one the processor, has products of bf16. A processor without them emulates
    them, a CPU ten times slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return processor_multiplies_bf16()


def processor_multiplies_bf16() -> bool:
    """Return true if products of bf16 are instructions of the CPU (AVX512-BF16, AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_groups(module: nn.Module, groups: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Raise ValueError unless the groups hold exactly the module's parameters that require a gradient, each once."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    grouped: set[int] = set()
    for group, parameters in groups.items():
        for parameter in parameters:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(f"parameter group {group} has a parameter that is not of this module")
            if id(parameter) in grouped:
                raise ValueError(f"{name} stands twice in the parameter groups, the second time in {group}")
            if not parameter.requires_grad:
                raise ValueError(f"{name} of parameter group {group} requires no gradient")
            grouped.add(id(parameter))
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            raise ValueError(f"{names[id(parameter)]} requires a gradient and is in no parameter group")
        if parameter.dim() == 0:
            raise ValueError(
                f"{names[id(parameter)]} has no dimension, which DeepSpeed cannot send: give it shape (1,)"
            )
