"""Names for torchrun's log files that say which rank wrote them: ``--logs-specs cca_ranks``."""

from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """``rank-00003.out`` and ``rank-00003.err`` in the log folder, by global rank.

    The first rank and the last, which log for all in Megatron, are shown on the terminal too.
    """

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Files for the local ranks that have these environments."""
        folder = Path(self.root_log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        logs = LogsDest()
        for local_rank, environment in envs.items():
            rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            name = folder / f"rank-{rank:05}"
            logs.stdouts[local_rank] = f"{name}.out"
            logs.stderrs[local_rank] = f"{name}.err"
            logs.error_files[local_rank] = f"{name}.error.json"
            environment["TORCHELASTIC_ERROR_FILE"] = f"{name}.error.json"
            if rank in (0, size - 1):
                logs.tee_stdouts[local_rank] = f"{name}.out"
        logs.filtered_stdout = logs.filtered_stderr = str(folder / "filtered.log")
        return logs

    @property
    def root_log_dir(self) -> str:
        """Where the files lie."""
        return str(self._root_log_dir)
