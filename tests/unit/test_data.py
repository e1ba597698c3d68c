"""Datasets: what goes in comes out, whole or not at all."""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from cca_megatron.data import prepare as prepare_module
from cca_megatron.data import sources
from cca_megatron.data.bigram import bigram_cross_entropy
from cca_megatron.data.prepare import dataset_files, prepare, read_manifest
from cca_megatron.data.sources import DataError, find_units
from cca_megatron.data.tokenizer import load_encoder, megatron_arguments
from cca_megatron.data.workers import map_in_order

EOD = 256


def make(inputs, prefix, **options):
    options = {"tokenizer": "bytes", "workers": 1} | options
    return prepare([str(i) for i in inputs], str(prefix), **options)


def texts(prefix) -> list[str]:
    """The documents of a byte-level dataset; each must end with the end-of-document token."""
    documents = []
    for ids in IndexedDataset(str(prefix)):
        assert ids[-1] == EOD
        documents.append(bytes(ids[:-1].astype(np.uint8)).decode())
    return documents


def test_a_file_is_a_document(tmp_path):
    (tmp_path / "b.txt").write_text("second ünïcode\n")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.py").write_text("third")
    (tmp_path / ".hidden").write_text("not this")
    manifest = make([tmp_path], tmp_path / "out" / "data")
    assert texts(tmp_path / "out" / "data") == ["first", "second ünïcode\n", "third"]
    size = sum(len(t.encode()) for t in texts(tmp_path / "out" / "data"))
    assert (manifest.documents, manifest.text_bytes, manifest.tokens) == (3, size, size + 3)
    assert read_manifest(tmp_path / "out" / "data") == manifest


def test_a_json_line_is_a_document(tmp_path):
    lines = [{"body": "one"}, {"body": "zwei\nmit Umbruch"}, {"body": "trois", "other": 1}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    make([tmp_path / "x.jsonl"], tmp_path / "data", text_key="body")
    assert texts(tmp_path / "data") == [line["body"] for line in lines]


@pytest.mark.parametrize("unit", [1, 7, 64, 10_000])
def test_large_json_files_are_cut_at_lines(tmp_path, monkeypatch, unit):
    """Whatever the size of a unit, every line is read once, by the unit in which it begins."""
    monkeypatch.setattr(sources, "_JSONL_UNIT", unit)
    expected = [f"document {n} " + "x" * (n % 40) for n in range(50)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in expected))  # no newline at the end
    documents = [d for u in find_units([str(path)]) for d in sources.read_documents(u, "text")]
    assert documents == expected


def test_a_parquet_row_is_a_document(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["one", None, "", "four"]}), tmp_path / "x.parquet", row_group_size=2)
    manifest = make([tmp_path / "x.parquet"], tmp_path / "data")
    assert texts(tmp_path / "data") == ["one", "four"]
    assert manifest.skipped == {"no text field": 1, "empty": 1}
    with pytest.raises(DataError, match=r"no column 'body'; its columns are text"):
        make([tmp_path / "x.parquet"], tmp_path / "data2", text_key="body")


def test_the_result_does_not_depend_on_the_number_of_workers(tmp_path):
    for n in range(30):
        (tmp_path / f"{n}.txt").write_text(f"text {n} " * (n + 1))
    make([tmp_path], tmp_path / "one" / "d", workers=1)
    make([tmp_path / f"{n}.txt" for n in sorted(map(str, range(30)))], tmp_path / "three" / "d", workers=3)
    for suffix in (".bin", ".idx"):
        one, three = (tmp_path / name / f"d{suffix}" for name in ("one", "three"))
        assert one.read_bytes() == three.read_bytes()


BAD = {
    "empty": b"  \n",
    "binary": b"PK\x03\x04\x00\x00",
    "not UTF-8": "ünïcode".encode("latin-1"),
}


@pytest.mark.parametrize("reason", BAD)
def test_unusable_files_are_counted_or_refused(tmp_path, reason):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt").write_bytes(BAD[reason])
    assert make([tmp_path], tmp_path / "o" / "d").skipped == {reason: 1}
    assert texts(tmp_path / "o" / "d") == ["good"]
    with pytest.raises(DataError, match=f"bad.txt is {reason}"):
        make([tmp_path / "good.txt", tmp_path / "bad.txt"], tmp_path / "s" / "d", strict=True)
    assert not list((tmp_path / "s").iterdir())


def test_unusable_json_lines_are_counted(tmp_path):
    lines = [b'{"text": "good"}', b"{broken", b'{"text": 5}', b"[]", b'{"text": ""}', b'{"text": "\xff"}']
    lines.append(b'{"text": "\\ud800"}')  # a lone surrogate
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    manifest = make([tmp_path / "x.jsonl"], tmp_path / "d")
    assert texts(tmp_path / "d") == ["good"]
    assert manifest.skipped == {"not JSON": 1, "no text field": 2, "empty": 1, "not UTF-8": 2}


def test_what_cannot_be_read_is_named_and_writes_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"input 'nothere' does not exist \(looked for /"):
        make(["nothere"], tmp_path / "d")
    with pytest.raises(DataError, match="no text in"):
        make([tmp_path / "empty"], tmp_path / "d")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_dataset_is_not_overwritten_unless_asked(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    make([tmp_path / "a.txt"], tmp_path / "d")
    (tmp_path / "a.txt").write_text("new")
    with pytest.raises(DataError, match="exists already; --overwrite"):
        make([tmp_path / "a.txt"], tmp_path / "d")
    assert texts(tmp_path / "d") == ["old"]
    with pytest.raises(DataError, match="does not exist"):
        make(["nothere"], tmp_path / "d", overwrite=True)
    assert texts(tmp_path / "d") == ["old"]
    make([tmp_path / "a.txt"], tmp_path / "d", overwrite=True)
    assert texts(tmp_path / "d") == ["new"]


def test_a_killed_run_leaves_no_dataset(tmp_path):
    """Killed while it writes: no index, and the next run removes what is left."""
    for n in range(2000):
        (tmp_path / f"{n}.txt").write_text("some text " * 100)
    prefix = tmp_path / "out" / "d"
    program = (
        "from cca_megatron.data.prepare import prepare\n"
        "if __name__ == '__main__':\n"
        f"    prepare([{str(tmp_path)!r}], {str(prefix)!r}, 'bytes', workers=1)\n"
    )
    script = tmp_path / ".run.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, "-W", "ignore", str(script)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/d.part-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob("out/d.part-*"))
    assert not any(f.exists() for f in dataset_files(prefix))
    make([tmp_path / "1.txt"], prefix)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["d.bin", "d.idx", "d.json"]


@pytest.mark.parametrize("prefix", ["out/", ""])
def test_a_prefix_needs_a_name(tmp_path, prefix):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=f"prefix '{prefix}': must end in a name, .*; data/corpus works"):
        make([tmp_path / "a.txt"], prefix)


def test_a_dead_worker_is_reported(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("text")
    monkeypatch.setattr(prepare_module, "_encoder_of_units", _deadly)
    with pytest.raises(DataError, match="a worker process died of status 3, perhaps for lack of memory"):
        make([tmp_path], tmp_path / "o" / "d", workers=2)


def _deadly(tokenizer, text_key):
    return lambda unit: os._exit(3)


def test_workers_keep_the_order_and_hand_on_exceptions():
    items = list(range(40))
    assert list(map_in_order(_squares, items, workers=3)) == [(n, n * n) for n in items]
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(_inverses, items, workers=2))
    with pytest.raises(LookupError, match="no function"):
        list(map_in_order(_no_function, items, workers=2))


def _squares():
    return lambda n: time.sleep(0.01 * (n % 3)) or n * n


def _inverses():
    return lambda n: 1 / n


def _no_function():
    raise LookupError("no function")


def test_progress_reaches_the_end(tmp_path):
    (tmp_path / "a.txt").write_text("12345")
    (tmp_path / "b.txt").write_text("123")
    seen = []
    make([tmp_path], tmp_path / "o" / "d", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(5, 8), (8, 8)]


def test_the_standard_library_is_text():
    units = find_units([sources.STDLIB])
    assert len(units) > 100
    assert {u.path.suffix for u in units} == {".py"}
    assert not any("site-packages" in u.path.parts or "test" in u.path.parts for u in units)


@pytest.fixture(scope="module")
def hf_tokenizer(tmp_path_factory):
    """A small Hugging Face tokenizer on disk."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train_from_iterator(
        ["the quick brown fox"] * 3, trainers.BpeTrainer(special_tokens=["<eos>"], vocab_size=60)
    )
    path = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return path


def test_a_hugging_face_tokenizer_gives_megatrons_ids(hf_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("the quick fox")
    name = f"hf:{hf_tokenizer}"
    make([tmp_path / "a.txt"], tmp_path / "d", tokenizer=name)
    dataset, encoder = IndexedDataset(str(tmp_path / "d")), load_encoder(name)
    (ids,) = dataset
    assert ids.tolist() == [*encoder.encode("the quick fox"), encoder.end_of_document]
    assert encoder.end_of_document == 0
    assert megatron_arguments(name)["tokenizer-type"] == "HuggingFaceTokenizer"


def test_a_sentencepiece_model_gives_megatrons_ids(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=30,
        minloglevel=2,
    )
    name = f"sentencepiece:{tmp_path / 'sp.model'}"
    make([tmp_path / "corpus.txt"], tmp_path / "d", tokenizer=name)
    dataset, encoder = IndexedDataset(str(tmp_path / "d")), load_encoder(name)
    (ids,) = dataset
    assert ids[-1] == encoder.end_of_document
    assert len(ids) == len(encoder.encode((tmp_path / "corpus.txt").read_text())) + 1


@pytest.mark.parametrize("name", ["byte", "hf:", "sentencepiece:/nothere.model", "hf:/nothere"])
def test_unknown_tokenizers_are_named(name):
    with pytest.raises(DataError, match=f"tokenizer '{name}'"):
        load_encoder(name)


def test_the_bigram_baseline_is_the_definition(tmp_path):
    """Against counts made by hand; and a text that its own bigram explains has almost no entropy."""
    for n, text in enumerate(["abab", "abba", "ab"]):
        (tmp_path / f"{n}.txt").write_text(text)
    make([tmp_path], tmp_path / "o" / "d")
    train, valid = [*b"abab", EOD, *b"abba", EOD], [*b"ab", EOD]
    expected = 0.0
    for first, second in pairwise(valid):
        follows = [b for a, b in pairwise(train) if a == first]
        probability = (follows.count(second) + 0.1) / (len(follows) + 0.1 * 257)
        expected -= np.log(probability) / 2
    got = bigram_cross_entropy(str(tmp_path / "o" / "d"), "66,34,0", 257)
    assert got == pytest.approx(expected)
    with pytest.raises(ValueError, match="the validation part"):
        bigram_cross_entropy(str(tmp_path / "o" / "d"), "100,0,0", 257)
