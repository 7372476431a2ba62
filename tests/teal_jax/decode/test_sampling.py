"""Samplers against float64 numpy written from the definitions, and drawn distributions against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.decode.sampling import Greedy, Sampling, process_logits, sample


def reference_probs(logits, sampler, seen=None):
    """Probabilities of one row, float64, token by token."""
    logits = np.array(logits, np.float64)
    if sampler.repetition_penalty != 1.0:
        for token in np.flatnonzero(seen):
            logits[token] = (
                logits[token] / sampler.repetition_penalty
                if logits[token] > 0
                else logits[token] * sampler.repetition_penalty
            )
    if isinstance(sampler, Greedy) or sampler.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    logits /= sampler.temperature
    kept = set(range(len(logits)))
    if sampler.top_k is not None:
        kth = sorted(logits, reverse=True)[min(sampler.top_k, len(logits)) - 1]
        kept = {t for t in kept if logits[t] >= kth}
    probs = {t: np.exp(logits[t] - logits.max()) for t in kept}
    if sampler.top_p is not None:
        total, mass, chosen = sum(probs.values()), 0.0, set()
        for token in sorted(probs, key=lambda t: (-probs[t], t)):
            chosen.add(token)
            mass += probs[token] / total
            if mass >= sampler.top_p:
                break
        probs = {t: probs[t] for t in chosen}
    if sampler.min_p is not None:
        best = max(probs.values())
        probs = {t: p for t, p in probs.items() if p >= sampler.min_p * best}
    result = np.zeros(len(logits))
    for token, p in probs.items():
        result[token] = p / sum(probs.values())
    return result


SAMPLERS = [
    Greedy(),
    Greedy(repetition_penalty=1.7),
    Sampling(),
    Sampling(temperature=0.0),
    Sampling(temperature=0.3),
    Sampling(temperature=1e-37),
    Sampling(top_k=1),
    Sampling(top_k=7),
    Sampling(top_k=1000),
    Sampling(top_p=0.05),
    Sampling(top_p=0.8),
    Sampling(top_p=1.0),
    Sampling(min_p=0.0),
    Sampling(min_p=0.2),
    Sampling(min_p=1.0),
    Sampling(repetition_penalty=1.5),
    Sampling(repetition_penalty=0.7, temperature=1.4),
    Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=2.0, top_k=9, top_p=0.6),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_distribution_is_that_of_the_definition(sampler):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 40)).astype(np.float32) * 3
    seen = rng.random((5, 40)) < 0.4
    got = process_logits(jnp.asarray(logits), sampler, jnp.asarray(seen))
    if isinstance(sampler, Greedy) or sampler.temperature == 0:
        got = np.eye(40)[np.argmax(np.asarray(got), axis=-1)]
    else:
        got = np.asarray(jax.nn.softmax(got, axis=-1))
    want = np.stack([reference_probs(row, sampler, s) for row, s in zip(logits, seen, strict=True)])
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_top_k_keeps_ties_and_top_p_takes_the_lower_id_first():
    logits = jnp.log(jnp.array([[0.25, 0.25, 0.25, 0.25]]))
    assert np.isfinite(process_logits(logits, Sampling(top_k=1))).all()
    np.testing.assert_array_equal(
        np.isfinite(process_logits(logits, Sampling(top_p=0.4)))[0], [True, True, False, False]
    )


@pytest.mark.parametrize(
    "sampler", [Sampling(), Sampling(temperature=0.5, top_k=6), Sampling(top_p=0.7), Sampling(min_p=0.1)], ids=str
)
def test_drawn_tokens_follow_the_distribution(sampler):
    draws, vocab = 20_000, 12
    logits = np.random.default_rng(1).normal(size=vocab).astype(np.float32) * 1.5
    probs = reference_probs(logits, sampler)
    keys = jax.random.split(jax.random.key(3), draws)
    tokens = jax.jit(sample, static_argnums=2)(jnp.broadcast_to(logits, (draws, vocab)), keys, sampler)
    assert tokens.dtype == jnp.int32
    counts = np.bincount(np.asarray(tokens), minlength=vocab)
    assert counts[probs == 0].sum() == 0
    expected = probs[probs > 0] * draws
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * degrees)


def test_a_row_depends_on_its_own_key_alone():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, 50)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    together = sample(logits, keys, Sampling(top_p=0.9))
    alone = [int(sample(logits[i : i + 1], keys[i : i + 1], Sampling(top_p=0.9))[0]) for i in range(6)]
    assert together.tolist() == alone
    assert sample(logits, keys, Sampling(top_p=0.9)).tolist() == together.tolist()
    other = [sample(logits, jax.random.split(jax.random.key(s), 6), Sampling()).tolist() for s in range(4)]
    assert len({tuple(o) for o in other}) == 4


def test_samplers_are_static_values():
    assert hash(Sampling(top_k=3)) == hash(Sampling(top_k=3))
    assert Sampling(top_k=3) != Sampling(top_k=4)
    with pytest.raises(AttributeError):
        Greedy().repetition_penalty = 2.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Sampling(**arguments)


def test_a_penalty_without_the_seen_tokens_is_refused():
    with pytest.raises(ValueError, match="seen"):
        process_logits(jnp.zeros((1, 3)), Greedy(repetition_penalty=2.0))
