"""From one checkpoint, every layout and memory option trains the same curve."""

import json

import pytest
from training.conftest import MODEL, CommonStart, losses, pretrain

STEPS = 5
RUN = f"--train-iters {STEPS} --micro-batch-size 2 --global-batch-size 4 --eval-interval {STEPS}".split()
DOCUMENTS = ["--dataloader-inter-document-masking"]
EXPERTS = """
    --num-experts 4 --moe-router-topk 2 --moe-layer-freq [0,1] --moe-ffn-hidden-size 24
    --moe-aux-loss-coeff 0
""".split()

# name: (model, processes, arguments)
VARIANTS = {
    "tensor parallel": ("dense", 2, "--tensor-model-parallel-size 2"),
    "sequence parallel": ("dense", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pipeline": ("dense", 2, "--pipeline-model-parallel-size 2"),
    "data parallel": (
        "dense",
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    ),
    "full recompute": (
        "dense",
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        " --cca-recompute-mix",
    ),
    "selective recompute": (
        "dense",
        1,
        "--recompute-granularity selective --recompute-modules core_attn layernorm --cca-recompute-mix",
    ),
    "hybrid stack": ("dense", 1, "--hybrid-layer-pattern *-*-"),
    "documents, sequence parallel": (
        "documents",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ),
    "context, ring": ("dense", 2, "--context-parallel-size 2"),
    "context, all-gather": ("dense", 2, "--context-parallel-size 2 --cp-comm-type all_gather"),
    "context, all-to-all": ("dense", 2, "--context-parallel-size 2 --cp-comm-type a2a --cca-recompute-mix"),
    "context, deterministic": ("dense", 2, "--context-parallel-size 2 --deterministic-mode"),
    "one group, tensor parallel": ("one group", 2, "--tensor-model-parallel-size 2"),
    "one group, distributed optimizer": (
        "one group",
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "documents, context": ("documents", 2, "--context-parallel-size 2"),
    "documents, context, one sample": (
        "documents",
        2,
        "--context-parallel-size 2 --micro-batch-size 1 --cp-comm-type all_gather",
    ),
    "conversations, context": ("conversations", 2, "--context-parallel-size 2"),
    "conversations, context, all-to-all": (
        "conversations",
        2,
        "--context-parallel-size 2 --cp-comm-type a2a",
    ),
    "experts, context": ("experts", 2, "--context-parallel-size 2 --expert-model-parallel-size 2"),
    "predictions, tensor": ("predictions", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "predictions, pipeline": ("predictions", 2, "--pipeline-model-parallel-size 2"),
    "documents, context, evaluation by one": (
        "documents",
        2,
        "--context-parallel-size 2 --cp-comm-type all_gather --eval-micro-batch-size 1 --cca-recompute-mix",
    ),
    "tensor, evaluation by one": (
        "dense",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --eval-micro-batch-size 1",
    ),
    "context, full recompute": (
        "dense",
        2,
        "--context-parallel-size 2 --recompute-granularity full --recompute-method uniform"
        " --recompute-num-layers 1",
    ),
    "expert documents, balanced by sample": ("expert documents", 2, "--expert-model-parallel-size 2"),
    "documents, pipeline": ("documents", 2, "--pipeline-model-parallel-size 2 --micro-batch-size 1"),
    "experts, all-to-all": (
        "experts",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall",
    ),
    "experts, all-gather": (
        "experts",
        2,
        "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather",
    ),
    "experts, pipeline": ("experts", 2, "--pipeline-model-parallel-size 2"),
    "documents, loss in chunks": (
        "documents",
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --eval-micro-batch-size 1 --loss-chunk-size 24",
    ),
    "data parallel, loss in chunks": (
        "dense",
        2,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --loss-chunk-size 24",
    ),
    "pipeline, loss in chunks": ("dense", 2, "--pipeline-model-parallel-size 2 --loss-chunk-size 24"),
    "conversations, context, loss in chunks": (
        "conversations",
        2,
        "--context-parallel-size 2 --loss-chunk-size 7",
    ),
    "zaya, full recompute, loss in chunks": (
        "zaya",
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        " --loss-chunk-size 24",
    ),
    "zaya, experts": ("zaya", 2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"),
    "zaya, tensor": ("zaya", 2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "zaya, pipeline": ("zaya", 2, "--pipeline-model-parallel-size 2"),
    "zaya, context": ("zaya", 2, "--context-parallel-size 2 --cp-comm-type a2a"),
    "zaya, full recompute": (
        "zaya",
        1,
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
QUICK = ["documents, context, evaluation by one", "documents, loss in chunks"]
# A high balancing rate, so that the biases move the choice of experts within a few steps.
ZAYA = """
    --zaya --zaya-router-hidden-size 12 --zaya-balancing-rate 0.05
    --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --moe-ffn-hidden-size 24
    --moe-router-load-balancing-type none --window-size (7,0) --window-attn-skip-freq [1,0]
    --cca-window-rotary-base 100
""".split()
MODELS = {
    "dense": [],
    "one group": ["--num-query-groups", "1", "--clip-grad", "0.1"],
    "documents": DOCUMENTS,
    "experts": EXPERTS,
    "zaya": ZAYA,
    "expert documents": [
        *DOCUMENTS,
        *EXPERTS[:-1],
        *("0.1", "--moe-router-load-balancing-type", "seq_aux_loss"),
    ],
    "conversations": ["--sft"],
    "predictions": ["--mtp-num-layers", "1", "--untie-embeddings-and-output-weights"],
}


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> list[str]:
    """Chats whose lengths need no padding for two ranks, so that one rank packs the same tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chats")
    words = {word: number for number, word in enumerate(["<unk>", "<pad>", *"0123456789 su"])}
    characters = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "tokenizer")
    lines = []
    for first in range(40):
        messages = []
        for n in range(first, first + 5):
            messages.append({"role": "system", "content": str(n % 10)})
            messages.append({"role": "user", "content": f"{n % 10:0{1 + 4 * (n % 3)}}"})
        lines.append(json.dumps({"messages": messages}))
    (folder / "chats.jsonl").write_text("\n".join(lines))
    return [
        *("--data-path", f"{folder}/chats.jsonl", "--tokenizer-type", "SFTTokenizer"),
        *("--tokenizer-model", f"{folder}/tokenizer", "--sft-tokenizer-prompt-format", "default"),
    ]


@pytest.fixture(scope="module")
def starts(dataset, conversations, tmp_path_factory):
    """For each model where its runs start; made when first asked for."""
    made = {}

    def start(name):
        if name not in made:
            data = conversations if name == "conversations" else ["--data-path", dataset]
            made[name] = CommonStart(tmp_path_factory.mktemp("start"), [*MODEL, *RUN, *MODELS[name], *data])
        return made[name]

    return start


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in VARIANTS]
)
def test_same_curve_as_one_process(name, starts, tmp_path):
    model, processes, arguments = VARIANTS[name]
    start = starts(model)
    got, validation = start.train(processes, arguments.split(), tmp_path)
    assert start.validation
    assert validation == pytest.approx(start.validation, rel=1e-5)
    assert sorted(got) == sorted(start.curve) == list(range(1, STEPS + 1))
    assert start.curve[STEPS] < start.curve[1]
    for step, loss in start.curve.items():
        assert got[step] == pytest.approx(loss, rel=1e-5), f"iteration {step}"


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["optim_grads", "optim_grads_params"])
def test_megatron_fsdp(strategy, dataset, tmp_path):
    """From the same seed. Gradients are summed: their mean over ranks is a reduction that gloo lacks."""
    common = [*RUN, "--data-path", dataset, "--calculate-per-token-loss"]
    pretrain(2, *common, "--tensorboard-dir", f"{tmp_path}/plain")
    fsdp = ["--use-megatron-fsdp", "--data-parallel-sharding-strategy", strategy]
    fsdp += ["--use-distributed-optimizer", "--ckpt-format", "fsdp_dtensor"]
    pretrain(2, *common, *fsdp, "--tensorboard-dir", f"{tmp_path}/sharded")
    expected, got = losses(tmp_path / "plain"), losses(tmp_path / "sharded")
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected[STEPS] < expected[1]
