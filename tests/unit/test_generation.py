"""Generation with a cache gives what transformers' own gives, token for token."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from support.closeness import assert_close
from support.megatron import Layout, gpt_model, microbatches, parallel, randomize, tiny_config

zaya = pytest.importorskip("support.zaya_model", reason="transformers >= 5.23 is not installed")

from cca_megatron._compat import InferenceMode  # noqa: E402
from cca_megatron.generation_cache import GenerationContext  # noqa: E402
from cca_megatron.hf import load_hf_state_dict  # noqa: E402
from cca_megatron.inference.generate import Sampling, generate, unpadded  # noqa: E402
from cca_megatron.specs import cca_decoder_block_spec  # noqa: E402

TOKENS = 64


@pytest.fixture(scope="module")
def models():
    theirs = zaya.random_zaya(torch.float32).eval()
    with parallel(Layout()), microbatches():
        (ours,) = zaya.ZayaPair().build(Layout(), torch.float32)
        load_hf_state_dict(ours, theirs.state_dict())
        yield ours.eval(), theirs


def prompts(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 96, (length,), generator=generator).tolist() for length in lengths]


def padded(rows, side):
    """[B, longest] tokens and mask, padded with zeros on one side."""
    longest = max(map(len, rows))
    tokens, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, prompt in enumerate(rows):
        place = slice(longest - len(prompt), None) if side == "left" else slice(len(prompt))
        tokens[row, place], mask[row, place] = torch.tensor(prompt), 1
    return tokens, mask


def generated_by_transformers(model, rows):
    tokens, mask = padded(rows, "left")
    out = model.generate(tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    return out[:, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("chunk_size", [2048, 5, 1])
@pytest.mark.parametrize("lengths", [(9,), (7, 7), (3, 11, 1, 8)], ids=str)
def test_greedy_tokens_are_those_of_transformers(models, lengths, chunk_size):
    ours, theirs = models
    rows = prompts(*lengths)
    new, _ = generate(ours, rows, TOKENS, chunk_size=chunk_size)
    assert new == generated_by_transformers(theirs, rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(models, side):
    ours, _ = models
    rows = prompts(3, 11, 6)
    alone = [generate(ours, [row], TOKENS)[0][0] for row in rows]
    assert generate(ours, unpadded(*padded(rows, side)), TOKENS)[0] == alone


@pytest.mark.parametrize("chunks", [(30,), (7, 1, 1, 12, 9), (1,) * 30], ids=str)
@pytest.mark.parametrize("context_type", [GenerationContext, StaticInferenceContext])
def test_cached_logits_equal_those_of_the_whole_sequence(models, chunks, context_type):
    ours, _ = models
    tokens = torch.tensor(prompts(30, 30, 30))
    positions = torch.arange(30).expand_as(tokens)
    context = context_type(3, 30)
    context.config.materialize_only_last_token_logits = False
    parts = []
    with torch.no_grad():
        whole = ours(tokens, positions, None)
        with InferenceMode.active():
            for part, at in zip(tokens.split(chunks, 1), positions.split(chunks, 1), strict=True):
                parts.append(ours(part, at, None, inference_context=context, runtime_gather_output=True))
                context.increment_sequence_len_offset(part.shape[1])
    assert_close("logits", whole, torch.cat(parts, 1), 1e-5)


@pytest.mark.parametrize("forgotten", ["latents", "value"])
def test_a_forgotten_row_is_noticed(models, forgotten, monkeypatch):
    """Without the rows that convs or the value shift look back to, the logits are others."""
    from cca_megatron.generation_cache import LayerCache

    boundary = LayerCache.boundary

    def without(self):
        kept = boundary(self)
        return kept and kept._replace(**{forgotten: torch.zeros_like(getattr(kept, forgotten))})

    monkeypatch.setattr(LayerCache, "boundary", without)
    with pytest.raises(AssertionError, match="relative error"):
        test_cached_logits_equal_those_of_the_whole_sequence(models, (7, 1, 1, 12, 9), GenerationContext)


@pytest.mark.usefixtures("models")  # for its process groups
def test_a_model_without_zayas_parts_generates_too():
    config = tiny_config(params_dtype=torch.float32)
    model = gpt_model(config, cca_decoder_block_spec(config)).eval()
    randomize(model)
    tokens = torch.randint(0, 96, (1, 9))
    new, _ = generate(model, tokens.tolist(), 5)
    for token in new[0]:
        with torch.no_grad():
            logits = model(tokens, torch.arange(tokens.shape[1])[None], None)
        assert logits[0, -1].argmax() == token
        tokens = torch.cat([tokens, torch.tensor([[token]])], 1)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("positions", ["learned_absolute", "rope", "none"])
def test_a_batch_is_what_its_prompts_are_alone(positions):
    config = tiny_config(params_dtype=torch.float32)
    spec = cca_decoder_block_spec(config)
    model = gpt_model(config, spec, position_embedding_type=positions, max_sequence_length=24).eval()
    randomize(model)
    rows = prompts(3, 11, 1)
    alone = [generate(model, [row], 12)[0][0] for row in rows]
    assert generate(model, rows, 12)[0] == alone
    if positions == "learned_absolute":
        with pytest.raises(ValueError, match="24 positions"):
            generate(model, rows, 14)


def test_a_context_is_reset_for_other_padding(models):
    ours, _ = models
    one, other = prompts(3, 7), prompts(6, 7)
    expected = generate(ours, other, 1)[0]
    context = GenerationContext(2, 8)
    logits = []
    with torch.no_grad(), InferenceMode.active():
        for rows in (one, other):
            tokens, mask = padded(rows, "left")
            context.reset()
            context.left_padding = 7 - mask.sum(1)
            positions = torch.arange(7).expand_as(tokens)
            out = ours(tokens, positions, None, inference_context=context, runtime_gather_output=True)
            logits.append(out[:, -1])
    assert logits[1].argmax(-1).tolist() == [row[0] for row in expected]


def test_sampling_is_repeatable_and_stays_within_top_p(models):
    ours, _ = models
    rows = prompts(5) * 200
    hot = Sampling(temperature=1.0, top_p=0.3, seed=3)
    new, _ = generate(ours, rows, 1, sampling=hot)
    assert new == generate(ours, rows, 1, sampling=hot)[0]
    with torch.no_grad():
        logits = ours(torch.tensor(rows[:1]), torch.arange(5)[None], None)[0, -1]
    ordered, tokens = logits.softmax(-1).sort(descending=True)
    allowed = tokens[ordered.cumsum(-1) - ordered < 0.3].tolist()
    drawn = {row[0] for row in new}
    assert len(drawn) > 1
    assert drawn <= set(allowed)


def test_a_sequence_ends_with_its_stop_token(models):
    ours, _ = models
    rows = prompts(6, 9)
    whole, _ = generate(ours, rows, 20)
    stop = whole[0][4]
    new, _ = generate(ours, rows, 20, stop=[stop])
    assert new[0] == whole[0][: whole[0].index(stop)]
    expected = whole[1][: whole[1].index(stop)] if stop in whole[1] else whole[1]
    assert new[1] == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, [[]], 5), "at least one token"),
        (lambda m: generate(m, [[96]], 5), "token 96 is outside of the vocabulary of 96"),
        (lambda m: generate(m, [[1]], 0), "max_new_tokens=0"),
        (lambda m: Sampling(top_p=0), "top_p=0"),
        (lambda m: Sampling(temperature=-1), "temperature=-1"),
        (lambda m: Sampling(temperature=float("nan")), "temperature=nan"),
    ],
    ids=["empty", "outside", "none", "top-p", "temperature", "nan"],
)
def test_wrong_settings_are_named(models, call, message):
    with pytest.raises(ValueError, match=message):
        call(models[0])


def test_the_cache_is_small(models):
    """Two KV heads of 8 channels in four layers, keys and values in fp32; MHA would keep all 32 channels."""
    _, context = generate(models[0], prompts(5, 5), 3)
    assert context.cache_bytes == 2 * 4 * 4 * 16 * (2 * 8)
