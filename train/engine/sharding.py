"""What DeepSpeed needs of process group and teacher: joined before models load, sharded or placed after, and left."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import _lru_cache_wrapper, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import HfDeepSpeedConfig, set_hf_deepspeed_config, unset_hf_deepspeed_config

from shoal.runtime import device

from .arguments import resolved_deepspeed

if TYPE_CHECKING:
    from transformers import Trainer  # with datasets and pandas, which take a second

OF_STUDENT = ("bf16", "bfloat16", "fp16", "torch_autocast", "optimizer", "scheduler")
"""Sections of a DeepSpeed configuration that a teacher has not, or has of its own."""
REDUCED_AT_ONCE = 2**24
"""Gradients in one buffer that ranks add up without ZeRO; a larger tensor has one of its own."""


def _free_memory(self: object, device_index: int | None = None) -> int:
    """Bytes free on a GPU. DeepSpeed's own asks pynvml, and takes names in CUDA_VISIBLE_DEVICES for numbers."""
    return torch.cuda.mem_get_info(device_index)[0]


def join_deepspeed() -> None:
    """Let DeepSpeed know the process group; otherwise ZeRO-3 takes the world size as 1 while it loads models."""
    import deepspeed
    from deepspeed.accelerator import cuda_accelerator

    cuda_accelerator.CUDA_Accelerator.available_memory = _free_memory
    compile_no_collectives()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def compile_no_collectives() -> None:
    """On a CPU DeepSpeed would first compile shared-memory collectives, which takes minutes, fails without a C++
    compiler and waits for ever where another process died while it compiled; gloo does their work."""
    import deepspeed.ops

    if device().type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def leave_deepspeed(trainer: Trainer) -> None:
    """Let another training follow in this process. DeepSpeed's hooks hold the models, under ZeRO 3 so do a list and a
    cache that outlive it, and transformers would go on sharding whatever is built."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    trainer.accelerator.free_memory()
    FWD_MODULE_STACK.clear()
    for method in vars(PartitionedParameterCoordinator).values():  # which do not say what they wrap
        for cell in getattr(method, "__closure__", None) or ():
            if isinstance(cell.cell_contents, _lru_cache_wrapper):
                cell.cell_contents.cache_clear()
    unset_hf_deepspeed_config()


@contextmanager
def loaded_in(dtype: torch.dtype, arguments: TrainingArguments) -> Iterator[None]:
    """Let from_pretrained keep ``dtype``: under ZeRO 3 it makes models in the precision of the DeepSpeed configuration,
    whatever it is asked for."""
    of_student: Any = arguments.hf_deepspeed_config
    if of_student is None or not of_student.is_zero3():
        yield
        return
    own = HfDeepSpeedConfig(_in_precision(of_student.config, dtype))  # in force for as long as it is held
    try:
        yield
    finally:
        del own
        set_hf_deepspeed_config(of_student)


def _in_precision(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """``config`` for a model that nothing is trained of, and that computes in ``dtype``, without autocast."""
    named = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    own = copy.deepcopy({key: value for key, value in config.items() if key not in OF_STUDENT})
    own["zero_optimization"].pop("offload_optimizer", None)
    own["zero_optimization"].pop("zero_hpz_partition_size", None)  # DeepSpeed can make the groups for one model alone
    return own | ({} if named is None else {named: {"enabled": True}})


def place_teacher(teacher: PreTrainedModel, trainer: Trainer, *, offload: bool) -> None:
    """Under ZeRO-3 the teacher is an inference engine of its own, sharded like the student; else it sits on the device,
    or with ``offload`` in CPU memory, from where its layers come over one by one.

    The engine has the teacher's precision, not the student's: of weights marked for autocast ranks would gather rounded
    ones. Its wrapper is not kept: sharded parameters gather themselves wherever the teacher's modules are called.
    """
    config = resolved_deepspeed(trainer.args) or {}
    if config.get("zero_optimization", {}).get("stage") == 3:
        import deepspeed

        plugin: Any = trainer.accelerator.state.deepspeed_plugin
        deepspeed.initialize(model=teacher, config=_in_precision(plugin.deepspeed_config, teacher.dtype))
    elif offload:
        from accelerate import cpu_offload

        # not the Trainer's device: on a CPU its number, which no tensor has, would make parameters plain tensors
        cpu_offload(teacher, execution_device=device())
    else:
        teacher.to(trainer.args.device)  # pyright: ignore[reportArgumentType]
    teacher.eval()


def keep_gradient_norm(engine: Any) -> None:
    """Let DeepSpeed's engine know the norm of its gradients without ZeRO too, where it clips by it and forgets it."""
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        limit = engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(engine.module.parameters(), limit, mpu=engine.mpu)

    engine.clip_fp32_gradients = clip


def reduce_in_parts(engine: Any) -> None:
    """Without ZeRO DeepSpeed copies up to 500 million gradients into one buffer before ranks add them up; here fewer at
    a time, and on one rank none, as the estimate of memory counts it."""
    engine.enable_backward_allreduce = engine.dp_world_size > 1 or engine.zero_optimization()
    engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=REDUCED_AT_ONCE)


def record_reduced(engine: Any) -> None:
    """Let the memory of a gradient that ranks add up on a stream of its own wait for that stream.

    At ZeRO 1 and 2 with overlap_comm a gradient larger than the bucket is divided in place there and let go at once;
    DeepSpeed 0.19.8 records the stream for it only where the optimizer is offloaded.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()

    def record(tensor: Tensor, stream: Any) -> None:
        if not accelerator.resolves_data_dependency():
            tensor.record_stream(stream)

    if getattr(engine.optimizer, "overlap_comm", False) and hasattr(engine.optimizer, "_record_gradient_stream"):
        engine.optimizer._record_gradient_stream = record


@contextmanager
def forwards_uncounted(engine: Any) -> Iterator[None]:
    """Inside, ranks may run a student that is whole on each of them unlike often: under ZeRO 3 a hook at its beginning
    compares the order of its layers with the other ranks', and waits for them."""
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield
        return
    hooks, number = offload.module._forward_pre_hooks, offload.fwd_pre_hook.id
    hook = hooks.pop(number)
    try:
        yield
    finally:
        hooks[number] = hook
        hooks.move_to_end(number, last=False)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The module's parameters in full where ZeRO-3 has sharded them, and on the device where they are offloaded;
    elsewhere nothing happens."""
    if (hook := getattr(module, "_hf_hook", None)) is not None:  # accelerate's, which brings them for every call
        hook.pre_forward(module)
        try:
            yield
        finally:
            hook.post_forward(module, None)
        return
    sharded = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield
