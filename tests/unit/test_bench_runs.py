"""Benchmarks of layers, ranks, steps and data compare like with like, and say what their figures are."""

import re
from pathlib import Path

import pytest
import torch
from support.megatron import Layout, parallel
from support.small_recipe import small_recipe
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typer.testing import CliRunner

from cca_megatron.bench import clock, context, lines, matched, run_plots, tables
from cca_megatron.bench.command import app
from cca_megatron.bench.context import measure_context, planned_bytes, ways
from cca_megatron.bench.data import measure_data
from cca_megatron.bench.matched import measure_matched
from cca_megatron.bench.modules import PaddedCoreAttention, build
from cca_megatron.bench.published import ratio_to_mha
from cca_megatron.bench.results import CPU_FIGURES, Result, read_all
from cca_megatron.bench.sizes import METHODS, parameters
from cca_megatron.bench.sizes import matched as matched_sizes
from cca_megatron.bench.step import _Reader, measure_step
from cca_megatron.terminal import console
from cca_megatron.training.recipe import load_recipe

ROOT = Path(__file__).parents[2]
MACHINE = {
    "device": "a CPU",
    "load": "1.0 on 2 cores",
    "figures": CPU_FIGURES,
    "torch": "2.13.0",
    "megatron-core": "0.19.2",
    "date": "2026-01-02T03:04:05Z",
    "command": "cca-megatron bench block --matched width",
}


@pytest.mark.parametrize(("hidden", "dim"), [(1024, 64), (2048, 128), (4096, 128)])
def test_matched_layers_are_alike(hidden, dim):
    """Whole heads come within a twelfth of the parameters, and to the byte with the cache."""
    layers = matched_sizes("parameters", hidden, dim)
    assert tuple(layers) == METHODS
    goal = parameters(layers["CCGQA"])
    assert all(parameters(layer) == pytest.approx(goal, rel=1 / 12) for layer in layers.values())
    layers = matched_sizes("kv-cache", hidden, dim)
    assert {layer.cache_elements() for layer in layers.values()} == {layers["CCGQA"].cache_elements()}


@pytest.mark.parametrize("matching", ["width", "parameters", "kv-cache"])
def test_built_layers_have_the_parameters_that_are_told(matching):
    with parallel(Layout()):
        for name, layer in matched_sizes(matching, 128, 8).items():
            built = build(layer, torch.float32)
            assert sum(p.numel() for p in built.parameters()) == parameters(layer), name


def test_padded_values_change_nothing():
    """MLA on the common core attention is attention with values narrower than keys."""
    with parallel(Layout()):
        layer = build(matched_sizes("width", 128, 8)["MLA"], torch.float64)
        core = layer.core_attention
        assert isinstance(core, PaddedCoreAttention)
        q, k, v = (torch.randn(32, 2, 16, width, dtype=torch.float64) for width in (12, 12, 8))
        out = core(q, k, v, None)
    rows = [x.permute(1, 2, 0, 3) for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=True)
    torch.testing.assert_close(out, exact.permute(2, 0, 1, 3).flatten(2))


class Exponential(nn.Module):
    """Its backward pass needs its output alone."""

    def forward(self, x, mask, rotary_pos_emb):
        return x.exp(), None


class Square(nn.Module):
    """Its backward pass needs its input alone."""

    def forward(self, x, mask, rotary_pos_emb):
        return x * x, None


def test_kept_and_peak_bytes_are_those_of_the_operations():
    x = torch.ones(64, 1, 16, requires_grad=True)
    found = matched._memory(Exponential(), x, None, torch.ones(64, 1, 16))
    # At most there are the output and the gradient of the input.
    assert found == {"kept_bytes": x.nbytes, "peak_bytes": 2 * x.nbytes}
    assert matched._memory(Square(), x, None, torch.ones(64, 1, 16))["kept_bytes"] == 0


def test_ratios_are_taken_round_by_round():
    """A machine that slows down changes seconds and no ratio; what comes before the rounds warms up."""
    of_round = iter([100, 100, 1, 1, 5, 5])

    def run(factor):
        return lambda: {"forward": factor * next(of_round)}

    seconds = clock.in_turn({"MHA": run(2), "CCA": run(1)}, rounds=2)
    assert seconds == {"MHA": {"forward": [2, 10]}, "CCA": {"forward": [1, 5]}}
    found = clock.summary(seconds["CCA"]["forward"], seconds["MHA"]["forward"])
    assert found == {"seconds": 3, "ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5}


@pytest.fixture(scope="module")
def rows():
    """Of every matching and method, at a size of milliseconds."""
    with parallel(Layout()):
        events = list(
            measure_matched(["width", "parameters", "kv-cache"], [16, 32], 128, 8, torch.float32, 2)
        )
    assert all(lines.matched_line(event) for event in events)
    return [event.row for event in events]


def test_every_method_and_pass_is_measured(rows):
    assert [(row["tokens"], row["matched"]) for row in rows] == [
        (tokens, matching) for tokens in (16, 32) for matching in ("width", "parameters", "kv-cache")
    ]
    for row in rows:
        assert tuple(row["methods"]) == METHODS
        for name, method in row["methods"].items():
            for which in ("forward", "backward", "both"):
                assert method[which]["seconds"] > 0
                assert method[which]["ratio"] > 0
                assert name != "MHA" or method[which]["ratio"] == 1
            assert ("core" in method) == (row["matched"] == "width" and name != "MLA")


def test_ratios_are_to_mha(monkeypatch):
    passes = ("forward", "backward", "both", "core")

    def in_turn(runs, rounds):
        return {name: {which: [1.0 if name == "MHA" else 3.0] for which in passes} for name in runs}

    monkeypatch.setattr(matched.clock, "in_turn", in_turn)
    with parallel(Layout()):
        (event,) = measure_matched(["width"], [16], 128, 8, torch.float32, 1)
    for name, method in event.row["methods"].items():
        ratios = {method[which]["ratio"] for which in passes if which in method}
        assert ratios == {1.0 if name == "MHA" else 3.0}


def test_work_of_several_ranks_is_told_as_a_share_of_that_of_one(monkeypatch):
    def run(ranks, numbers, device):
        case = {"method": "CCA", "ranks": ranks, "comm_type": "p2p" if ranks > 1 else None}
        return [case | {"work_seconds": 6.0 / ranks, "sent_bytes": 0.0}]

    monkeypatch.setattr(context, "_run", run)
    rows = [event.row for event in measure_context([1, 2, 4], 64, 128, 8, rounds=1, device="cpu")]
    assert [row["work_ratio"] for row in rows] == [1, 1 / 2, 1 / 4]


def test_bytes_grow_with_the_sequence(rows):
    """Kept for the backward pass: in proportion, but for what is kept once per layer."""
    for short, long in zip(rows[:3], rows[3:], strict=True):
        for name in METHODS:
            kept = [row["methods"][name]["kept_bytes"] for row in (short, long)]
            assert 1.9 < kept[1] / kept[0] <= 2
            assert long["methods"][name]["peak_bytes"] > kept[1]


@pytest.fixture
def results(rows):
    context = [
        {"method": "MHA", "ranks": ranks, "comm_type": way, "tokens": 64, "hidden": 128}
        | {"sent_bytes": 10.0 * ranks, "planned_bytes": 10.0 * ranks, "work_ratio": 1 / ranks}
        for ranks, way in ((1, None), (2, "p2p"), (2, "a2a"))
    ]
    found = [Result("matched", MACHINE), Result("cp", MACHINE)]
    found[0].rows, found[1].rows = rows, context
    return [vars(result) for result in found]


def test_tables_say_that_a_cpu_gives_ratios(results):
    for name in ("width", "parameters", "kv-cache", "published", "cp"):
        text = tables.table(name, results)
        assert "a CPU (torch 2.13.0, megatron-core 0.19.2, 2026-01-02, load 1.0 on 2 cores)" in text
        assert "CPU ratios" in text
    assert tables.table("step", results) == tables.NOT_MEASURED
    assert "| MHA | 2 | a2a | 0.50 | 20 | 20 |" in tables.table("cp", results)


def test_plots_say_that_a_cpu_gives_ratios(results, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: titles.append(text))
    names = {path.name for path in run_plots.plot_runs(results, tmp_path)}
    assert names == {
        f"{name}-a-cpu.png" for name in ("matched-latency", "matched-kept", "matched-memory", "cp")
    }
    assert all((tmp_path / name).stat().st_size > 10_000 for name in names)
    assert len(titles) == 4
    assert all("CPU: compare within this run only" in title for title in titles)


def test_documented_tables_are_those_of_the_stored_results(tmp_path):
    docs, copy = ROOT / "docs/benchmarks.md", tmp_path / "benchmarks.md"
    copy.write_text(docs.read_text())
    tables.update_docs(copy, ROOT / "benchmarks/results")
    assert copy.read_text() == docs.read_text()
    shown = re.findall(r"<!-- bench (\S+) -->", docs.read_text())
    assert sorted(shown) == sorted(tables.TABLES)
    assert tables.NOT_MEASURED not in docs.read_text()


def test_stored_results_name_their_machine_and_claim_no_gpu():
    stored = [
        r
        for r in read_all(ROOT / "benchmarks/results")
        if r["benchmark"] in ("matched", "cp", "step", "data")
    ]
    assert {r["benchmark"] for r in stored} == {"matched", "cp", "step", "data"}
    for result in stored:
        machine = result["machine"]
        assert all(machine[key] for key in ("device", "torch", "megatron-core", "commit", "date", "command"))
        assert machine["driver"] or machine["figures"] == CPU_FIGURES


def test_documents_without_such_a_table_are_refused(tmp_path):
    path = tmp_path / "docs.md"
    path.write_text("<!-- bench speed -->\n<!-- /bench -->\n")
    with pytest.raises(ValueError, match="bench speed -->: the tables are width, parameters"):
        tables.update_docs(path, tmp_path)


def test_published_ratios():
    assert ratio_to_mha("CCA", 16384) == pytest.approx(1.43 / 2.325)
    assert ratio_to_mha("MHA", 512) == 1
    assert ratio_to_mha("CCA", 131072) is None


def test_every_way_of_exchange_that_fits_is_planned():
    layer = matched_sizes("width", 128, 8)["CCGQA"]  # 8 and 2 heads
    assert ways(layer, 1) == (None,)
    assert ways(layer, 2) == ("p2p", "all_gather", "a2a")
    assert ways(layer, 16) == ("p2p", "all_gather")
    assert planned_bytes(layer, 64, 1, None) == 0
    # Of 32 tokens 2 heads of k and of v, forward, again backward, and their gradients; before one chunk two
    # rows of 10 latent heads and of a delayed value head, and their gradients; all in fp32.
    assert planned_bytes(layer, 64, 2, "all_gather") == (32 * 3 * 4 + 2 * 2 * 11) * 8 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("block --matched speed", "matched=speed: unknown; width, parameters, kv-cache are known"),
        ("block --matched width --hidden-size 96 --head-dim 16", "hidden-size=128 works"),
        ("block --matched width --tokens 1k", "tokens=1k: must be whole numbers of at least 1"),
        ("cp --ranks 2,4", "ranks=2,4: one rank is what the others are compared with; ranks=1,2 works"),
        ("cp --tokens 1022 --ranks 1,2", "tokens=1022 over 2 ranks"),
        ("step nowhere.yaml", "cannot read recipe"),
        ("data configs/recipes/quickstart.yaml data.inputs=[]", "data.inputs is not set"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(arguments, message, tmp_path):
    run = CliRunner().invoke(app, [*arguments.split(), "--output", str(tmp_path)])
    assert run.exit_code == 1
    assert message in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_stop_is_no_error(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(context, "_run", stopped)
    run = CliRunner().invoke(app, ["cp", "--output", str(tmp_path)])
    assert (run.exit_code, run.stderr) == (130, "")


LOG = """
 iteration 1/ 2 | consumed samples: 4 | elapsed time per iteration (ms): 2000.0 | lm loss: 5.0E+00 |
(min, max) time across ranks (ms):
    batch-generator ................................: (10.00, 100.00)
    forward-compute ................................: (900.00, 1000.00)
    optimizer ......................................: (190.00, 200.00)
 iteration 2/ 2 | consumed samples: 8 | elapsed time per iteration (ms): 1000.0 | lm loss: 4.0E+00 |
    batch-generator ................................: (10.00, 50.00)
    forward-compute ................................: (400.00, 500.00)
    optimizer ......................................: (90.00, 100.00)
"""


def test_steps_and_their_parts_are_read_from_the_log():
    reader = _Reader()
    for line in LOG.splitlines():
        reader.feed(line)
    assert reader.seconds == [2.0, 1.0]
    assert reader.parts == {
        "batch-generator": [0.1, 0.05],
        "forward-compute": [1.0, 0.5],
        "optimizer": [0.2, 0.1],
    }


def test_shares_of_a_step_count_nothing_twice():
    """Megatron fetches the batch within its forward pass; the first step warms up."""
    reader = _Reader()
    for line in LOG.splitlines():
        reader.feed(line)
    expected = {"batch-generator": 0.05, "forward-compute": 0.5, "optimizer": 0.1, "all else": 0.4}
    assert reader.shares(warmup=1) == pytest.approx(expected)


def test_data_is_prepared_and_read(tmp_path):
    recipe = load_recipe(small_recipe(tmp_path, 1), [])
    events = list(measure_data(recipe, batches=4, rounds=1))
    assert all(lines.data_line(event) for event in events)
    prepared = [event.row for event in events if event.row["part"] == "prepare"]
    read = {event.row["kind"]: event.row for event in events if event.row["part"] == "read"}
    text = sum(len(path.read_bytes()) + 1 for path in (tmp_path / "texts").iterdir())
    assert {row["tokens"] for row in prepared} == {text}
    assert prepared[0] | {"workers": 1, "ratio": 1} == prepared[0]
    for rows in (prepared, list(read.values())):  # the first is what the others are compared with
        for row in rows:
            assert row["ratio"] == pytest.approx(rows[0]["seconds"] / row["seconds"])
    assert read["loader"]["tokens"] == 4 * 2 * 32
    assert not (tmp_path / "data").exists()


@pytest.mark.long
def test_a_step_is_measured_by_the_real_entry(tmp_path):
    event = measure_step(small_recipe(tmp_path, 1), [], steps=3, warmup=1, console=console)
    row = event.row
    assert lines.step_line(event)
    assert row["steps"] == 3
    assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["seconds"])
    assert sum(row["share"].values()) - row["share"]["batch-generator"] == pytest.approx(1)
    assert row["share"]["forward-compute"] > 0.05
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_ranks_send_what_is_planned():
    rows = [event.row for event in measure_context([1, 2], 64, 128, 8, rounds=1, device="cpu")]
    assert {(row["method"], row["comm_type"]) for row in rows if row["ranks"] == 2} == {
        (method, way) for method in ("MHA", "GQA", "CCA", "CCGQA") for way in ("p2p", "all_gather", "a2a")
    }
    for row in rows:
        assert row["sent_bytes"] == row["planned_bytes"], row
        assert (row["sent_bytes"] == 0) == (row["ranks"] == 1)
