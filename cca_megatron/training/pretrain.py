"""What torchrun starts: Megatron's own ``pretrain`` with a CCA model.

    torchrun --nproc-per-node 8 -m cca_megatron.training.pretrain --num-layers 24 ...

takes every Megatron argument and the ``--cca-*`` settings. ``cca-megatron train RECIPE`` writes this
command line; ``--print-args`` shows it.
"""

import os
import sys
import time

from torch.distributed.elastic.multiprocessing.errors import record

PROGRAM_START = time.time()


@record  # an exception goes to torchrun's error file with its time
def main() -> None:
    """Parse the arguments and train."""
    from cca_megatron.training.device import choose_connections, describe, select_device

    device = select_device()
    if os.environ.get("RANK", "0") == "0":
        print(describe(device), flush=True)
    choose_connections(bool({"--use-megatron-fsdp", "--use-torch-fsdp2"}.intersection(sys.argv)))
    if device == "cpu":
        from cca_megatron.training import cpu_backend

        cpu_backend.install()

    from megatron.core.enums import ModelType
    from megatron.training import pretrain, set_startup_timestamps
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args, parse_args

    from cca_megatron.training import flops, megatron_fixes, utilization
    from cca_megatron.training.argument_rules import argument_problems
    from cca_megatron.training.arguments import add_arguments
    from cca_megatron.training.batch import build_datasets, forward_step
    from cca_megatron.training.checkpoint import checkpoint_problems
    from cca_megatron.training.model import model_config_from_args

    megatron_fixes.apply()
    flops.correct_flops()
    utilization.log_mfu()
    set_startup_timestamps(program_start=PROGRAM_START, main_entry=time.time())
    given = parse_args(extra_args_provider=add_arguments(device))
    if not given.use_checkpoint_args and given.yaml_cfg is None:  # which bring arguments of their own
        # Before Megatron completes the arguments, as it then forgets what was not given.
        problems = [*argument_problems(given), *checkpoint_problems(given)]
        if problems:
            raise SystemExit(
                "ValueError: CCA cannot run with these settings:\n  - " + "\n  - ".join(problems)
            )
    args = parse_and_validate_args(extra_args_provider=add_arguments(device))
    pretrain(
        pretrain_cfg_container_from_args(args, model_config_from_args(args)),
        build_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )


# The guard matters: saving a checkpoint spawns processes, which import this module again.
if __name__ == "__main__":
    main()
