"""``cca-megatron generate``: what it prints, and what it says of wrong input."""

import pytest
from typer.testing import CliRunner

from cca_megatron import generate
from cca_megatron.cli import app
from cca_megatron.inference.worker import Answer
from cca_megatron.training import checkpoint, session


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Answers with a fixed text, so that no checkpoint is needed."""
    text = " [bold]:key: x[:key:]\tend"
    result = Answer([text], [7], 1.0, cache_bytes=512, mha_bytes=4096, state_bytes=640)
    monkeypatch.setattr(generate, "_answer", lambda request: result)
    monkeypatch.setattr(session, "load_megatron_here", lambda: "cpu")
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda folder, step: (folder, None))
    return text


def run(*words):
    return CliRunner().invoke(app, ["generate", *map(str, words)])


def test_text_is_printed_as_it_is(answers):
    result = run("checkpoint", "--prompt", "a\tb :key:")
    assert result.exit_code == 0, result.output
    assert "a\tb :key:" + answers + "\n" in result.output
    assert "512 bytes per token, 8 times less than MHA's 4,096" in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "no prompt"),
        (("--prompt", ""), "no prompt"),
        (("--prompt", "a", "--top-p", "1.5"), "top-p=1.5"),
        (("--prompt", "a", "--dtype", "fp8"), "dtype='fp8'"),
        (("--prompt", "a"), "no checkpoint in"),
        (("--prompt-file", "nowhere.txt"), "nowhere.txt"),
    ],
    ids=str,
)
def test_wrong_input_is_one_line(tmp_path, words, message):
    result = run(tmp_path, *words)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
