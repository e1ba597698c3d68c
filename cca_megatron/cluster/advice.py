"""What to do about each kind of failure. docs/troubleshooting.md says the same with its reasons."""

from cca_megatron.cluster.failures import Failure
from cca_megatron.cluster.kinds import FailureKind

_MEMORY = (
    "megatron.micro-batch-size=1, with megatron.global-batch-size as it is, first: it costs no accuracy",
    "cca.recompute_mix=true computes the mix again in the backward pass; megatron.recompute-granularity=full "
    "megatron.recompute-method=uniform megatron.recompute-num-layers=1 whole layers",
    "megatron.loss-chunk-size=1024 never holds the logits of all tokens",
    "megatron.context-parallel-size=2 halves the tokens of a GPU, megatron.tensor-model-parallel-size=2 its "
    "weights; megatron.use-distributed-optimizer=true shares out the optimizer's state",
    "if the host's memory ran out: megatron.num-workers=1, or ask SLURM for more (--sbatch=--mem=0)",
)

_ADVICE: dict[FailureKind, tuple[str, ...]] = {
    "out of memory": _MEMORY,
    "NaN": (
        "if it came in the first hundreds of steps: a smaller megatron.lr, a longer warm-up "
        "(megatron.lr-warmup-fraction) or megatron.clip-grad=1.0",
        "if it came late and the same step is fine when repeated: look for a bad GPU with "
        "cca-megatron preflight",
        "look at the data of that step: the same step fails again after a resume if the data is the reason",
    ),
    "data": (
        "check that data.prefix names files that every node sees: PREFIX.bin and PREFIX.idx",
        "if they were cut off: cca-megatron data prepare ... --overwrite makes them anew",
        "if they were made anew since: remove the folder PREFIX/cache, which Megatron fills again",
    ),
    "network": (
        "cca-megatron preflight measures each link between the nodes, and names slow and bad ones",
        "if it fails at the start: NCCL_SOCKET_IFNAME names the network that nodes reach each other by; "
        "NCCL_DEBUG=INFO shows what NCCL chose",
        "if the port is taken, or nodes wait for each other: another attempt takes another port",
    ),
    "node lost": ("ask the administrators what became of the node; until then keep the job off it",),
    "time limit": (
        "submit with a longer --time, or go on: the job saves and queues itself again before the limit",
        "if no checkpoint was saved: give it more time for one, CCA_LEAD_SECONDS in slurm/site.env, at least "
        "twice what saving takes",
    ),
    "hang": (
        "read the stack in the log of the rank that stopped first: it shows the call in which it waits",
        "the flight recorder's files lie in the attempt's folder: torchfrtrace -p nccl_trace_rank_ ATTEMPT "
        "names the collective that ranks do not agree on",
        "if a step or a checkpoint takes longer than the limit: a larger launch.hang_minutes, or "
        "megatron.distributed-timeout-minutes=30 for NCCL's own",
        "if it is the same node each time, keep the job off it",
    ),
    "checkpoint": (
        "if it was read: the job goes back to the checkpoint before by itself; by hand "
        "megatron.ckpt-step=ITERATION does",
        "if it was written: look at df -h and the quota of the output folder, which all nodes must share",
        "if names or shapes do not match: the recipe's model has changed; output=FOLDER starts another run",
    ),
    "killed": (
        "if nobody did: look for the kernel's out-of-memory killer on the node (dmesg, or sacct -j JOB "
        "--format=MaxRSS), and use megatron.num-workers=1 or --sbatch=--mem=0",
        "if a loader's worker died: /dev/shm of a container is often too small",
    ),
    "GPU": (
        "have the GPU checked: nvidia-smi -q -d ECC, dmesg | grep Xid",
        "cca-megatron preflight checks all",
    ),
    "transient fault": (
        "let the job go on: it repeats the step elsewhere, to tell a bad GPU from a wrong program",
        "if it comes back on another GPU, the program is at fault: see NaN",
    ),
    "result validation": (
        "read Megatron's diagnosis: 'not reproducible' in the first rerun means a bad GPU of this node, in "
        "the second one of the attempt before; avoid that node and submit again",
        "'likely correct' means that the numbers are what the program computes: see NaN",
    ),
    "settings": (
        "the message names the setting; cca-megatron train RECIPE --print-args checks it and starts nothing",
    ),
    "program": (
        "read the traceback in the log; cca-megatron train on one GPU or on the CPU may show the same sooner",
        "CUDA_LAUNCH_BLOCKING=1 makes a CUDA error's traceback point at its kernel",
    ),
}
_OF_A_NODE: set[FailureKind] = {"node lost", "GPU", "hang", "network", "transient fault", "result validation"}
"""Where another node may be the cure."""


def advice(failure: Failure) -> list[str]:
    """What to do, the likeliest first."""
    steps = list(_ADVICE[failure.kind])
    is_innocent = failure.kind == "result validation" and "First rerun" not in failure.message
    if failure.node is not None and failure.kind in _OF_A_NODE and not is_innocent:
        steps.append(f"without the node: cca-megatron submit ... --sbatch=--exclude={failure.node}")
    return steps
