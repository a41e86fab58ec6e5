"""Several processes, as torchrun and `accelerate launch` start them: how they agree, and what is refused."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState, is_initialized
from accelerate.utils import (
    DistributedType,
    broadcast_object_list,
    gather_object,
    get_cpu_distributed_information,
    parse_flag_from_env,
)
from torch import nn
from transformers import TrainingArguments

from sparselet import errors
from sparselet.errors import ConfigError, SelectionError, SparseletError, WorkerFailed
from sparselet.tuner.distributed import ddp_wrappers
from sparselet.tuner.weights import is_sharded

T = TypeVar("T")

UNSUPPORTED = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}
LAUNCH_VARIABLES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def process_count() -> int:
    """The number of processes that torchrun, `accelerate launch` or MPI has started for this run."""
    return get_cpu_distributed_information().world_size


def is_first() -> bool:
    """Whether this process writes and prints for all processes of the run."""
    return get_cpu_distributed_information().rank == 0


def share_of_batch(batch_size: int, accumulation: int) -> int:
    """Rows of one forward pass of one process. Raises ConfigError where a step's rows cannot be divided so."""
    processes = process_count()
    if batch_size % (accumulation * processes):
        raise ConfigError(
            f"batch_size {batch_size}, the rows of an optimizer step, cannot be divided over {processes} processes with "
            f"{accumulation} accumulation steps each. Take a multiple of {accumulation * processes}."
        )
    return batch_size // (accumulation * processes)


def refuse_parallelism() -> None:
    """Raise ConfigError for several devices in one process, and for any parallelism of `accelerate launch` other than DDP."""
    for variable, parallelism in LAUNCH_VARIABLES.items():
        if parse_flag_from_env(variable):
            raise ConfigError(
                f"a run over several processes trains by DistributedDataParallel, not by {parallelism} ({variable}). Start it "
                "with torchrun, or choose multi-GPU or multi-CPU in accelerate's configuration."
            )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise ConfigError(
            f"accelerate's mixed_precision is {os.environ['ACCELERATE_MIXED_PRECISION']}, but a run computes in what its own "
            "settings say. Start it with --mixed_precision no, and set dtype instead."
        )
    devices = torch.cuda.device_count()
    if devices > 1 and process_count() == 1:
        raise ConfigError(
            f"a run trains on one device a process, but {devices} are visible to this one, over which transformers copies the "
            "model in every step (DataParallel). Choose one, CUDA_VISIBLE_DEVICES=0, or start a process for each: torchrun "
            f"--nproc-per-node {devices} -m sparselet train …"
        )


def needs_cpu() -> bool:
    """Whether transformers must be set to the CPU, which it does not detect for several processes."""
    return process_count() > 1 and (not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def join_processes() -> None:
    """Connect this process with the others of the run."""
    if process_count() > 1:
        PartialState(cpu=needs_cpu())


def leave_processes() -> None:
    """End the connection with the others, before this process ends."""
    if dist.is_initialized():
        PartialState().destroy_process_group()


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """All processes leave the block without an error, or all raise the error of the lowest rank that has one.

    The block must not communicate.
    """
    if process_count() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures: list[tuple[str, str] | None] = gather_object([failure and (type(failure).__name__, str(failure))])
    rank = next((rank for rank, name_and_message in enumerate(failures) if name_and_message is not None), None)
    if rank is None:
        return
    if failure is not None and rank == dist.get_rank():
        raise failure
    name, message = cast(tuple[str, str], failures[rank])
    error_class = vars(errors).get(name)
    if isinstance(error_class, type) and issubclass(error_class, SparseletError):
        raise error_class(message)
    raise SparseletError(f"another process failed with {name}: {message}")


@contextlib.contextmanager
def convert_lost_process() -> Iterator[None]:
    """Raise WorkerFailed for the errors that the backend raises when another process has ended during the run."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise WorkerFailed("another process of the run has ended. The same command with `resume=True` continues.") from error


def from_first(value: T) -> T:
    """The value of the first process, on all of them."""
    return broadcast_object_list([value])[0] if process_count() > 1 else value


def first_then_others(function: Callable[[], T]) -> T:
    """Call a function on the first process, which may fill a cache, then on the others."""
    results: list[T] = []
    for turn in (True, False):
        with agreed():
            if is_first() is turn:
                results.append(function())
    return results[0]


def require_equal(described: Mapping[str, Any]) -> None:
    """Raise ConfigError unless all processes have the same description of the run."""
    first = from_first(described)
    with agreed():
        for key, value in first.items():
            if described.get(key) != value:
                raise ConfigError(
                    f"the processes of a run differ in {key}: the first has {value!r}, this one {described.get(key)!r}. Start "
                    "all with one command, and give all the same files."
                )


def first_to_fail() -> bool:
    """Whether this process is the first of the run to call this: it reports for all why the run failed."""
    if not dist.is_initialized():
        return is_first()
    try:
        return dist.distributed_c10d._get_default_store().add("sparselet: failed", 1) == 1
    except RuntimeError:  # the process that kept the count has ended, so it was first
        return False


def refuse_sharding(args: TrainingArguments, model: nn.Module) -> None:
    """Raise SelectionError if the model or its optimizer is sharded, or one process holds several copies."""
    parallelism = UNSUPPORTED.get(AcceleratorState().distributed_type) if is_initialized() else None
    if args.fsdp:
        parallelism = "FSDP"
    elif args.deepspeed:
        parallelism = "DeepSpeed"
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        parallelism = "a model of sharded tensors (DTensor)"
    elif args.n_gpu > 1:
        parallelism = f"DataParallel over {args.n_gpu} devices in one process"
    if parallelism is not None:
        raise SelectionError(
            f"sparse adapters cannot be trained with {parallelism}: their values are written into whole weights, in place, and "
            "masks change the size of what is trained. Use DistributedDataParallel, which each process of `torchrun "
            "--nproc-per-node N` gets where neither fsdp nor deepspeed is set, or one process with one device "
            "(CUDA_VISIBLE_DEVICES=0)."
        )


def selected_on(args: TrainingArguments, model: nn.Module) -> list[nn.Module]:
    """The modules to select masks on: the model itself, or with several processes each DistributedDataParallel around it.

    There are several if earlier Trainers have wrapped the model too. Raises SelectionError if there is none.
    """
    if args.world_size == 1:
        return [model]
    ddp_models = ddp_wrappers(model)
    if not ddp_models:
        raise SelectionError(
            f"there are {args.world_size} processes, but no DistributedDataParallel around the model, the only way in which "
            "masks can be selected over several. Start the Trainer with torchrun, without another kind of parallelism."
        )
    return list(ddp_models)
