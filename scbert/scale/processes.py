"""Several processes that train one model: started here, by torchrun, or by srun, they run the same code."""

import logging
import os
import pickle
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from ..paths import count_processes
from .checkpoint import write_checkpoint


def check_devices(devices: int, nodes: int, strategy: str) -> None:
    """Raise a ValueError unless so many processes can be had, or were started by torchrun or srun."""
    if strategy not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"strategy must be 'auto', 'ddp' or 'fsdp', not {strategy!r}.")
    if devices < 1 or nodes < 1:
        raise ValueError(f"devices and nodes must be at least 1, not {devices} and {nodes}.")
    launched = count_processes()
    # A notebook knows the devices of a machine, and leaves it to torchrun and srun how many machines there are.
    if launched > 1 and devices * nodes != launched and (devices, nodes) not in ((1, 1), (_local(), 1)):
        raise ValueError(
            f"{launched} processes were started, but devices={devices} and nodes={nodes} ask for {devices * nodes}: "
            "leave them out under torchrun and srun."
        )
    if launched == 1 and nodes > 1:
        raise ValueError(
            f"nodes={nodes} needs a program started on each of them: srun --nodes {nodes} --ntasks-per-node {devices} "
            f"..., or torchrun --nnodes {nodes} --nproc-per-node {devices} ... on each."
        )
    found = torch.cuda.device_count()
    if launched == 1 and 0 < found < devices:
        raise ValueError(f"devices={devices}, but this machine has {found} GPUs: ask for {found} or accelerator='cpu'.")


def make_fabric(accelerator: str, strategy: str, precision: str) -> Fabric:
    """Return Fabric for this process, with as many beside it as were started.

    "auto" is DDP for several processes. FSDP shards weights and optimiser state, and needs GPUs.
    """
    n_processes = count_processes()
    if n_processes == 1:
        if strategy == "fsdp":
            raise ValueError("strategy='fsdp' shards a model over GPUs: set devices to two or more.")
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    if strategy == "fsdp" and not torch.cuda.is_available():
        raise ValueError("strategy='fsdp' needs GPUs: use strategy='ddp' on CPUs.")
    chosen = FSDPStrategy(state_dict_type="full") if strategy == "fsdp" else DDPStrategy()
    # The processes are there: Fabric has none to start, and would refuse to in the kernel of a notebook.
    chosen._configure_launcher = lambda: None
    machines = {"devices": _local(), "num_nodes": n_processes // _local()}
    fabric = Fabric(accelerator=accelerator, strategy=chosen, precision=precision, **machines)
    fabric.launch()
    return fabric


def _local():
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or count_processes() // int(os.environ.get("SLURM_NNODES") or 1))


def add_up(fabric: Fabric, numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all processes, on the CPU."""
    if fabric.world_size == 1:
        return numbers
    return fabric.all_reduce(numbers.to(fabric.device, copy=True), reduce_op="sum").cpu()


def save_state(fabric: Fabric, path: str | Path, state: dict) -> None:
    """Write a checkpoint of all processes, see `scbert.checkpoint.write_checkpoint`; each of them must call this."""

    def write(file):
        try:
            fabric.save(file, state)
        except Exception:
            fabric.barrier()  # the others wait in fabric.save
            raise

    if fabric.is_global_zero:
        write_checkpoint(path, write)
    else:
        fabric.save(path, state)


def gather_random_state(fabric: Fabric) -> list[torch.Tensor]:
    """Return the state of torch's global generators of each process: of the CPU and, with one, of the GPU."""
    states = [torch.get_rng_state()]
    if fabric.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(fabric.device))
    if fabric.world_size == 1:
        return [state[None] for state in states]
    return [fabric.all_gather(state.to(fabric.device)).cpu() for state in states]  # (processes, bytes)


def set_random_state(fabric: Fabric, states: list[torch.Tensor]) -> None:
    """Set what `gather_random_state` returned, where as many processes run; training itself draws from seeds."""
    if len(states[0]) != fabric.world_size:
        return
    # Cloned: PyTorch 2.13 crashes on a view that begins inside its storage.
    torch.set_rng_state(states[0][fabric.global_rank].clone())
    if fabric.device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1][fabric.global_rank].clone(), fabric.device)


def gather_weights(model: nn.Module, module: nn.Module, is_sharded: bool) -> dict[str, torch.Tensor]:
    """Return all weights, of a sharded model too, where each process must call this."""
    if not is_sharded:
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(module._forward_module, options=StateDictOptions(full_state_dict=True))


def launch(function: Callable, n_processes: int, *arguments):
    """Call a function in so many new processes, as torchrun would, and return what the first of them returns.

    Function, arguments and result travel by pickle. In a script, the call belongs below
    ``if __name__ == "__main__":``, since each process imports the script. An error in one ends all.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    call = pickle.dumps((function, arguments))
    processes = torch.multiprocessing.start_processes(
        _run, (call, n_processes, port, results), nprocs=n_processes, join=False, daemon=True
    )
    try:
        result = None
        while not processes.join(timeout=0.2):
            if not results.empty():  # drained while the process lives, or a large result would block it
                result = results.get()
        return pickle.loads(result if results.empty() else results.get())
    finally:
        for process in processes.processes:
            process.terminate()


def _run(rank, call, n_processes, port, results):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(n_processes),
        "LOCAL_WORLD_SIZE": str(n_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "scbert",  # how PyTorch tells that torchrun started a process
    }
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n_processes))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if rank:
        warnings.simplefilter("ignore")  # the first says it for all
    function, arguments = pickle.loads(call)
    result = function(*arguments)
    if rank == 0:
        results.put(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
