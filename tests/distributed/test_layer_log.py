"""Values of each layer in the log: in every layout those of one rank, which are those of the parameters."""

import math
from argparse import Namespace
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
import torch.distributed as dist
from megatron import training
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from support.comparison import Model, forward_backward
from support.megatron import MOE, Layout, load, parallel, randomize, save, shared_directory

from cca_megatron import CCAConfig
from cca_megatron.mix_parameters import GroupShare
from cca_megatron.training import expert_load, layer_log
from cca_megatron.zaya.settings import ZayaSettings

LAYERS = 4
EXPERTS = MOE | {"num_layers": LAYERS, "moe_layer_freq": [0, 1, 0, 1]}
DENSE = Model({"num_layers": LAYERS}, CCAConfig(temperature="exp"))
ONE_GROUP = Model({"num_layers": LAYERS, "num_query_groups": 1}, CCAConfig(conv0=False))
ROUTED = Model(EXPERTS)
ITERATION = 10


def zaya() -> Model:
    module = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")
    return module.ZayaPair()


def arguments(model: Model, **settings) -> Namespace:
    """What the log reads of Megatron's arguments, at a step that is logged."""
    is_zaya = type(model) is not Model
    settings = {
        "curr_iteration": ITERATION - 1,
        "tensorboard_dir": "log",
        "tensorboard_log_interval": 5,
        "log_interval": 5,
        "use_megatron_fsdp": False,
        "use_torch_fsdp2": False,
        "hybrid_layer_pattern": None,
        "num_experts": 4 if is_zaya else model.settings.get("num_moe_experts"),
        "zaya": is_zaya,
        **{f"zaya_{f.name}": f.default for f in fields(ZayaSettings)},
        **settings,
    }
    return Namespace(**settings)


@dataclass
class Writer:
    """Stands for Megatron's writers, of TensorBoard and of Weights & Biases."""

    scalars: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)

    def add_scalar(self, tag: str, value: float, iteration: int) -> None:
        assert iteration == ITERATION
        self.scalars[tag] = value

    def add_tensor(self, tag: str, value: torch.Tensor, iteration: int) -> None:
        assert iteration == ITERATION
        self.tensors[tag] = value

    def log(self, values: dict[str, float], iteration: int) -> None:
        assert iteration == ITERATION
        self.logged |= values


@pytest.fixture(scope="module")
def weights():
    """Where the random weights of a model are; made when first asked for."""
    made = {}
    with shared_directory() as directory:

        def of(model: Model) -> str:
            key = repr(model)
            if key not in made:
                made[key] = f"{directory}/{len(made)}"
                with parallel(Layout()):
                    (chunk,) = model.build(Layout(), torch.float64)
                    randomize(chunk)
                    save([chunk], made[key])
            return made[key]

        yield of


@pytest.fixture
def train(monkeypatch, weights):
    """A step of training in a layout: what was written, on every rank, and the chunks of the model."""

    def step(model: Model, layout: Layout, **settings):
        args, path = arguments(model, **settings), weights(model)
        writer = Writer() if dist.get_rank() == dist.get_world_size() - 1 else None
        monkeypatch.setattr(training, "get_args", lambda: args)
        monkeypatch.setattr(training, "get_tensorboard_writer", lambda: writer)
        monkeypatch.setattr(training, "get_wandb_writer", lambda: writer)
        with parallel(layout):
            chunks = model.build(layout, torch.float64)
            load(chunks, path)
            expert_load.count_tokens(chunks)
            for chunk in chunks:
                chunk.config.finalize_model_grads_func = layer_log.finalize_and_log
            config = DistributedDataParallelConfig(overlap_grad_reduce=False)
            ddps = [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]
            forward_backward(model, layout, ddps)
        box = [writer]
        dist.broadcast_object_list(box, dist.get_world_size() - 1)
        return box[0], chunks

    return step


TWO = [
    (DENSE, Layout(tp=2)),
    (DENSE, Layout(pp=2)),
    (DENSE, Layout(pp=2, vpp=2)),
    (DENSE, Layout(cp=2)),
    (ONE_GROUP, Layout(tp=2)),
    (ROUTED, Layout(ep=2)),
    (ROUTED, Layout(tp=2, sp=True)),
    (ROUTED, Layout(pp=2)),
    (zaya, Layout(ep=2)),
    (zaya, Layout(tp=2, sp=True)),
    (zaya, Layout(pp=2)),
]
FOUR = [
    (DENSE, Layout(tp=4)),
    (ROUTED, Layout(tp=2, sp=True, pp=2)),
    (ROUTED, Layout(pp=2, vpp=2, ep=2)),
    (ROUTED, Layout(cp=2, ep=2)),
    (zaya, Layout(tp=2, sp=True, pp=2)),
]
CASES = [*TWO, *(pytest.param(*case, marks=pytest.mark.ranks(4)) for case in FOUR)]
NAMES = {id(DENSE): "dense", id(ONE_GROUP): "one group", id(ROUTED): "experts", id(zaya): "zaya"}


def name(value) -> str:
    return NAMES.get(id(value), str(value))


@pytest.mark.parametrize(("model", "layout"), CASES, ids=name)
def test_every_layout_logs_what_one_rank_does(model, layout, train):
    model = model() if model is zaya else model
    expected, _ = train(model, Layout())
    got, _ = train(model, layout)
    assert expected.scalars
    assert got.scalars == pytest.approx(expected.scalars, rel=1e-6)
    assert got.logged == got.scalars
    assert got.tensors.keys() == expected.tensors.keys()
    for tag, tensor in expected.tensors.items():
        assert torch.allclose(got.tensors[tag], tensor, rtol=1e-6), tag


@pytest.mark.parametrize("model", [DENSE, ONE_GROUP, ROUTED, zaya], ids=name)
def test_values_are_those_of_the_parameters(model, train):
    model = model() if model is zaya else model
    writer, (chunk,) = train(model, Layout())
    expected = {}
    for layer in chunk.decoder.layers:
        attention, label = layer.self_attention, f"layer {layer.layer_number}"
        tau = attention.temperature.detach()
        tau = tau.exp() if model.cca.temperature == "exp" else tau
        expected[f"temperature mean/{label}"] = tau.mean().item()
        expected[f"temperature max/{label}"] = tau.abs().max().item()
        expected[f"logit bound/{label}"] = tau.abs().max().item() * math.sqrt(8)
        for conv in ("conv0", "conv1"):
            weight = getattr(attention, f"{conv}_weight")
            if weight is not None:
                expected[f"{conv} norm/{label}"] = weight.detach().norm().item()
    bounds = [value for tag, value in expected.items() if tag.startswith("logit bound")]
    expected["logit bound/largest"] = max(bounds)
    got = {tag: value for tag, value in writer.scalars.items() if not tag.startswith("expert load")}
    assert got == pytest.approx(expected, rel=1e-6)


def test_loads_are_those_of_the_whole_batch(train, monkeypatch):
    """Counted once more by another hook, over all ranks."""
    seen = torch.zeros(LAYERS, 4)
    count_tokens = expert_load.count_tokens

    def count(router, inputs, outputs):
        seen[router.layer_number - 1] += outputs[1].cpu().sum(0)

    def count_twice(chunks):
        for layer in chunks[0].decoder.layers:
            if hasattr(layer.mlp, "router"):
                layer.mlp.router.register_forward_hook(count)
        return count_tokens(chunks)

    monkeypatch.setattr(expert_load, "count_tokens", count_twice)
    writer, _ = train(ROUTED, Layout())
    total = seen.cuda()
    dist.all_reduce(total)
    shares = (total / total.sum(-1, keepdim=True).clamp(min=1)).cpu()
    assert shares.std(-1).max() > 0.01, "the load is even: nothing is compared"
    assert torch.allclose(writer.tensors["expert share"], shares)
    for layer in (2, 4):
        largest = 4 * shares[layer - 1].max().item()
        assert writer.scalars[f"expert load/layer {layer}"] == pytest.approx(largest)
    assert "expert load/layer 1" not in writer.scalars


@pytest.mark.parametrize("settings", [{"curr_iteration": ITERATION}, {"tensorboard_dir": None}], ids=str)
def test_other_steps_cost_nothing(settings, train, monkeypatch):
    """No reading of parameters, no counting, nothing sent."""

    def unwanted(*_, **__):
        raise AssertionError("must not be called at this step")

    monkeypatch.setattr(layer_log, "layer_values", unwanted)
    monkeypatch.setattr(expert_load, "shares_of", unwanted)
    writer, (chunk,) = train(ROUTED, Layout(), **settings)
    assert writer == Writer()
    assert not any(hasattr(module, "counts_for_log") for module in chunk.modules())


class FirstPlace(GroupShare):
    place = property(lambda self: 0)


def filled_with(share_of):
    """A way to break the log: what a layer believes of its share of the groups, there only."""

    def mistake(monkeypatch):
        fill = layer_log._fill

        def broken(attention, *columns):
            share = attention.group_share
            attention.group_share = share_of(share)
            fill(attention, *columns)
            attention.group_share = share

        monkeypatch.setattr(layer_log, "_fill", broken)

    return mistake


counted_by_every_sharer = filled_with(lambda share: FirstPlace(share.num_groups, share.tp_group))
groups_of_the_first_rank = filled_with(lambda share: replace(share, tp_group=None))


def numbered_by_stage(monkeypatch):
    row = layer_log._Numbering._row

    def broken(self, module, depth):
        return row(self, module, depth) % 2

    monkeypatch.setattr(layer_log._Numbering, "_row", broken)


def own_tokens_only(monkeypatch):
    monkeypatch.setattr(expert_load, "dist", Namespace(all_reduce=lambda *_, **__: None))


def own_stage_only(monkeypatch):
    monkeypatch.setattr(layer_log, "dist", Namespace(all_reduce=lambda *_, **__: None))


MISTAKES = {
    "counted by every sharer": (ONE_GROUP, Layout(tp=2), counted_by_every_sharer),
    "groups of the first rank": (DENSE, Layout(tp=2), groups_of_the_first_rank),
    "numbered by stage": (DENSE, Layout(pp=2), numbered_by_stage),
    "own stage only": (DENSE, Layout(pp=2), own_stage_only),
    "own tokens only": (ROUTED, Layout(ep=2), own_tokens_only),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake, train, monkeypatch):
    model, layout, make = MISTAKES[mistake]
    expected, _ = train(model, Layout())
    make(monkeypatch)
    got, _ = train(model, layout)
    assert got.scalars != pytest.approx(expected.scalars, rel=1e-6)
