"""What estimators are compared on: constructed heads attend as said, and captured queries and keys are the model's own."""

import pytest
import sources
import torch
from english.batches import Drawer, Mixture
from english.corpus import held_out_text, unwrap

import tl_stream


def attention(source):
    keys = source.k.repeat_interleave(source.q.shape[1] // source.k.shape[1], 1)
    scores = source.q @ keys.transpose(-1, -2) * source.q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def wanted_share(source):
    return attention(source)[:, :, source.readers, source.wanted].mean().item()


@pytest.mark.parametrize("shuffled", [False, True])
def test_an_induction_head_reads_what_followed_the_same_token_earlier(shuffled):
    source = sources.induction(1024, heads=2, shuffled=shuffled)
    assert wanted_share(source) > 0.95
    assert (source.wanted <= source.readers).all()
    assert len(source.wanted.unique()) == 512
    neighbours = (source.wanted.diff() == 1).float().mean()
    assert neighbours < 0.01 if shuffled else neighbours == 1


@pytest.mark.parametrize("readers", [1, 32])
def test_a_needle_is_read_by_its_readers_alone(readers):
    source = sources.needle(1024, readers)
    assert wanted_share(source) > 0.99
    assert len(source.readers) == 16 * readers
    others = torch.ones(1024, dtype=torch.bool)
    others[source.readers] = False
    others[: source.wanted[0]] = False
    assert attention(source)[:, :, others, source.wanted[0]].mean() < 0.05


def test_captured_queries_and_keys_give_the_dense_patterns():
    model = tl_stream.models.load("mini")
    text = model.to_tokens("The grass is green. The sky is blue. Here we go.")
    _, cache = model.run_with_cache(text)
    for layer, source in enumerate(sources.read_by(model, text, "text")):
        torch.testing.assert_close(attention(source), cache["pattern", layer], atol=1e-5, rtol=1e-4)


def test_english_reads_the_held_out_text_in_stretches():
    first, second = sources.english(128)[0], sources.english(128, part=1)[0]
    assert first.name == "English 128, layer 0"
    assert first.q.shape == (1, 4, 128, 64)
    assert first.k.shape == (1, 2, 128, 64)
    assert not torch.equal(first.q[:, :, 1:], second.q[:, :, 1:])
    with pytest.raises(ValueError, match="part: 9999 of 128 tokens ends at"):
        sources.english(128, part=9999)


def test_the_held_out_text_is_long_enough_for_128k_tokens():
    assert len(sources.english_ids()) > 200_000
    assert held_out_text().startswith(":goat file:")


def test_unwrapping_leaves_paragraphs_without_marks():
    text = "# A heading\n\nA **long** paragraph with a [link](page.md#part),\nwhich goes on here.\n\nshort\n\n:entry: n."
    assert unwrap(text) == "A long paragraph with a link, which goes on here.\n:entry: n."


def test_training_samples_have_their_length_and_repeat_what_they_should():
    tokenizer = tl_stream.models.load_tokenizer(sources.ENGLISH_MODEL)
    drawer = Drawer(tokenizer, list(range(3, 4096)), max_position=131072, seed=0)
    for kind in ("text", "repeats", "random"):
        shares = dict.fromkeys(("text", "repeats", "random"), 0.0) | {kind: 1.0}
        batch = drawer.batch(Mixture(**shares, lengths=(256,), contiguous=0.0), tokens=1024)
        assert batch.ids.shape == batch.positions.shape == batch.weights.shape == (4, 256)
        assert (batch.positions.diff() > 0).all()
        assert batch.positions.max() < 131072
        assert (batch.ids[:, 0] == tokenizer.bos_token_id).all()


def test_what_counts_of_random_runs_was_there_before():
    tokenizer = tl_stream.models.load_tokenizer(sources.ENGLISH_MODEL)
    ids, weights, _ = Drawer(tokenizer, [3], max_position=131072, seed=0).random_runs(255)
    pairs = [tuple(ids[i - 1 : i + 1]) for i in range(1, len(ids))]
    counted = [i for i, weight in enumerate(weights) if weight]
    assert len(counted) > 80
    assert all(pairs[i - 1] in pairs[: i - 12] for i in counted)
