"""Reading Megatron's lines back, and finding the essence of a failure."""

import io
import math

from rich.console import Console

from cca_megatron.training.launch import explain
from cca_megatron.training.progress import Iteration, LiveBar, Note, parse

LINE = (
    " [2026-11-23 18:18:02.419180] iteration       30/      40 | consumed samples:          240 | elapsed "
    "time per iteration (ms): 1039.1 | learning rate: 1.100000E-03 | global batch size:     8 | lm loss: "
    "2.861836E+00 | load_balancing_loss: 1.181078E+00 | loss scale: 1.0 | grad norm: 1.349 | number of "
    "skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_an_iteration_is_read():
    assert parse(LINE) == Iteration(30, 40, 2.861836, 1.0391)
    nan = parse(LINE.replace("2.861836E+00", "nan"))
    assert isinstance(nan, Iteration)
    assert math.isnan(nan.loss)
    skipped = parse(LINE.replace(" lm loss: 2.861836E+00 |", ""))
    assert skipped == Iteration(30, 40, None, 1.0391)


def test_events_are_read():
    lines = {
        " validation loss at iteration 20 | lm loss value: 3.133255E+00 | lm loss PPL: 2.29E+01 | ": (
            "iteration 20: validation loss 3.1333"
        ),
        " validation loss at iteration 40 on test set | lm loss value: 2.567349E+00 | lm loss PPL: 1 | ": (
            "iteration 40: final test loss 2.5673"
        ),
        "  [x] successfully saved checkpoint from iteration      40 to runs/q [ t 1/1, p 1/1 ]": (
            "iteration 40: checkpoint saved"
        ),
        "  successfully loaded checkpoint from runs/q [ t 1/1, p 1/1 ] at iteration 40": (
            "resumed from the checkpoint of iteration 40"
        ),
    }
    for line, text in lines.items():
        assert parse(line) == Note(text)
    assert parse("INFO: anything else | lm loss: 3 |") is None


def test_the_bar_shows_loss_speed_and_time_left():
    out = io.StringIO()
    bar = LiveBar(Console(file=out, force_terminal=True, width=120), total=40, tokens_per_iteration=2048)
    with bar.shown():
        bar.feed(LINE)
        bar.feed(" validation loss at iteration 30 | lm loss value: 2.5E+00 | lm loss PPL: 1E+01 | ")
    text = out.getvalue()
    for part in ("30/40", "loss 2.862", "1,971 tokens/s", "1.04 s/step", "validation loss 2.5000"):
        assert part in text


def test_a_failure_is_explained_by_its_first_exception():
    lines = [
        "lots of output",
        "['Traceback (most recent call last):\\n', '  File']",  # Megatron's own print of one
        "[rank1]: Traceback (most recent call last):",
        '[rank1]:   File "x.py", line 1, in f',
        "[rank1]:     assert a < b",
        "[rank1]:            ~~^~~~",
        "[rank1]: AssertionError: a is too large",
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "y.py", line 2, in g',
        "[rank0]: RuntimeError: connection closed by peer",
    ]
    assert explain(lines, 1) == "AssertionError: a is too large"
    bare = [line.replace(": a is too large", "") for line in lines]
    assert explain(bare, 1) == "AssertionError: assert a < b"
    nested = [
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "x.py", line 1, in f',
        "[rank0]: torch.checkpoint.CheckpointException: CheckpointException ranks:dict_keys([0])",
        "[rank0]: Traceback (most recent call last): (RANK 0)",
        '[rank0]:   File "y.py", line 1, in f',
        "[rank0]: SomeException: shape mismatch for key x",
    ]
    assert explain(nested, 1) == "SomeException: shape mismatch for key x"
    assert explain(nested[:3], 1).startswith("torch.checkpoint.CheckpointException")
    crashed = [
        "Traceback (most recent call last):",
        '  File "run.py", line 1, in f',
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
        "  traceback : Signal 8 (SIGFPE) received by PID 4711",
    ]
    assert explain(crashed, 1) == "a worker died of Signal 8 (SIGFPE)"
    assert explain(["killed"], 9) == "killed"
    assert "status 9" in explain([], 9)
