"""A checkpoint that is not whole is never loaded, and never lost."""

import pickle
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from cca_megatron.training.checkpoint import latest_iteration
from cca_megatron.training.checkpoint_repair import broken_part, repair

ITERATIONS = (10, 20, 30)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints in Megatron's format."""
    import os

    folder = tmp_path_factory.mktemp("checkpoints")
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29777"}
    began = not torch.distributed.is_initialized()
    if began:
        os.environ |= environment
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    try:
        for iteration in ITERATIONS:
            path = folder / f"iter_{iteration:07d}"
            path.mkdir()
            weight = ShardedTensor.from_rank_offsets("weight", torch.arange(1000.0))
            state = {"weight": weight, "iteration": iteration}
            dist_checkpointing.save(state, str(path))
    finally:
        if began:
            torch.distributed.destroy_process_group()
            for name in environment:
                os.environ.pop(name, None)
    (folder / "latest_checkpointed_iteration.txt").write_text("30")
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def cut(file, keep=-10):
    file.write_bytes(file.read_bytes()[:keep])


def data_file(folder):
    return max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)


DAMAGES = {
    "data cut short": lambda folder: cut(data_file(folder)),
    "data missing": lambda folder: data_file(folder).unlink(),
    "index cut short": lambda folder: cut(folder / ".metadata"),
    "index missing": lambda folder: (folder / ".metadata").unlink(),
    "index of something else": lambda folder: (folder / ".metadata").write_bytes(pickle.dumps({})),
    "format missing": lambda folder: (folder / "metadata.json").unlink(),
    "format empty": lambda folder: (folder / "metadata.json").write_text(""),
    "all missing": shutil.rmtree,
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


def test_what_is_whole_stays(checkpoints):
    assert broken_part(checkpoints / "iter_0000030") is None
    assert repair(checkpoints, "torch_dist") == []
    assert latest_iteration(checkpoints) == 30


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_one_before_takes_the_place_of_a_damaged_one(checkpoints, damage):
    damage(checkpoints / "iter_0000030")
    warnings = repair(checkpoints, "torch_dist")
    assert "iteration 30 is damaged: iter_0000030" in warnings[0]
    assert warnings[-1] == "going on from the checkpoint of iteration 20 instead"
    assert latest_iteration(checkpoints) == 20
    assert repair(checkpoints, "torch_dist") == []


def test_what_is_damaged_is_kept(checkpoints):
    cut(data_file(checkpoints / "iter_0000030"))
    repair(checkpoints, "torch_dist")
    assert data_file(checkpoints / "damaged-iter_0000030-1").exists()


def test_all_damaged_starts_anew(checkpoints):
    for iteration in ITERATIONS:
        cut(checkpoints / f"iter_{iteration:07d}" / ".metadata")
    assert repair(checkpoints, "torch_dist")[-1] == "there is no whole checkpoint: training starts anew"
    assert latest_iteration(checkpoints) is None
    assert len(list(checkpoints.glob("damaged-*"))) == 3


def test_one_that_was_not_finished_is_not_taken(checkpoints):
    """A job died while it wrote the newest: the tracker names the one before."""
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("20")
    (checkpoints / "iter_0000030" / ".metadata").unlink()
    assert repair(checkpoints, "torch_dist") == []
    assert latest_iteration(checkpoints) == 20


@pytest.mark.parametrize("text", ["", "3\x00"])
def test_a_tracker_that_was_cut_short_is_written_anew(checkpoints, text):
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(text)
    assert repair(checkpoints, "torch_dist")[0] == "latest_checkpointed_iteration.txt is damaged"
    assert latest_iteration(checkpoints) == 30


def test_one_that_could_not_be_loaded_is_passed_over(checkpoints):
    assert "could not be loaded" in repair(checkpoints, "torch_dist", distrusted=30)[0]
    assert latest_iteration(checkpoints) == 20
    assert repair(checkpoints, "torch_dist", distrusted=30) == []


def test_there_may_be_none(tmp_path):
    assert repair(tmp_path / "checkpoints", "torch_dist") == []
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert repair(tmp_path, "torch_dist") == []


def test_other_formats_have_no_description(checkpoints):
    """Megatron-FSDP's have an index and no metadata.json, the oldest have neither."""
    directory = checkpoints / "iter_0000030"
    (directory / "metadata.json").unlink()
    assert broken_part(directory, "fsdp_dtensor") is None
    cut(data_file(directory))
    assert "bytes of" in broken_part(directory, "fsdp_dtensor")
    shutil.rmtree(directory)
    (directory / "mp_rank_00").mkdir(parents=True)
    assert broken_part(directory, "torch") is None
