"""Writing: stop tokens, sampling, prompts of many lengths, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from languages import tiny

from tokred.nn import generate as writing
from tokred.nn.generate import generate, sample

IDS = np.random.default_rng(5).integers(0, 50, (2, 6)).astype(np.int32)


def test_rows_end_with_a_stop_token():
  module, params = tiny()
  free = generate(module, params, IDS, max_new_tokens=6, stop_tokens=(77,))  # none of the vocabulary
  tokens = np.asarray(free.tokens)
  stop = int(tokens[0, 2])
  got = generate(module, params, IDS, max_new_tokens=6, stop_tokens=(stop,))
  for row in range(2):
    where = np.flatnonzero(tokens[row] == stop)
    length = where[0] + 1 if len(where) else 6
    assert got.length[row] == length
    np.testing.assert_array_equal(got.tokens[row], np.where(np.arange(6) < length, tokens[row], 0))
  assert got.length[0] <= 3


def test_sampling_draws_by_seed_and_row():
  module, params = tiny()
  kinds = dict(max_new_tokens=6, temperature=1.5, top_p=0.9)
  one = generate(module, params, IDS, **kinds, seed=1)
  np.testing.assert_array_equal(one.tokens, generate(module, params, IDS, **kinds, seed=1).tokens)
  assert (np.asarray(one.tokens) != generate(module, params, IDS, **kinds, seed=2).tokens).any()
  alike = generate(module, params, np.stack([IDS[0], IDS[0]]), **kinds, seed=1)
  np.testing.assert_array_equal(alike.tokens[0], one.tokens[0])  # whatever stands in the other row
  assert (np.asarray(alike.tokens[0]) != alike.tokens[1]).any()
  cold = generate(module, params, IDS, **kinds | dict(temperature=1e-4))
  np.testing.assert_array_equal(cold.tokens, generate(module, params, IDS, max_new_tokens=6, stop_tokens=(77,)).tokens)


def test_top_p_by_hand():
  """Probabilities 0.5, 0.3, 0.15, 0.05: 0.8 of them are the first two, which are then drawn 5 to 3."""
  logits = jnp.tile(jnp.log(jnp.array([[0.15, 0.5, 0.05, 0.3]])), (4000, 1))
  drawn = np.asarray(sample(logits, jax.random.key(0), 0, jnp.float32(1.0), jnp.float32(0.79)))
  assert set(drawn) == {1, 3}
  np.testing.assert_allclose((drawn == 1).mean(), 0.625, atol=0.03)
  assert set(np.asarray(sample(logits, jax.random.key(0), 0, jnp.float32(1.0), cut=False))) == {0, 1, 2, 3}


def test_a_cache_of_one_length_serves_all_prompts():
  module, params = tiny()
  kinds = dict(max_new_tokens=6, cache_length=14, stop_tokens=(77,))
  mask = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
  free = generate(module, params, IDS, max_new_tokens=6, stop_tokens=(77,))
  before = writing.run._cache_size()
  for ids, there in ((IDS, None), (IDS, mask), (IDS[:, :3], None), (np.pad(IDS, ((0, 0), (5, 0))), None)):
    if ids.shape[1] > 8:
      there = np.arange(ids.shape[1])[None].repeat(2, 0) >= 5
    got = generate(module, params, ids, there, **kinds)
    assert got.tokens.shape == (2, 6)
    if ids.shape[1] > 8 or (there is None and ids.shape[1] == 6):
      np.testing.assert_array_equal(got.tokens, free.tokens)
  assert writing.run._cache_size() - before == 1


@pytest.mark.parametrize(
  "arguments, message",
  [
    (
      dict(cache_length=9),
      r"a prompt of 6 tokens and max_new_tokens=4 are longer than the cache: cache_length=9; valid",
    ),
    (dict(temperature=-1.0), r"temperature=-1.0; valid: 0 \(the likeliest token\) or more"),
    (dict(top_p=0.0), r"top_p=0.0; valid: above 0, at most 1"),
    (dict(temperature=float("nan")), r"temperature=nan; valid: 0"),
    (dict(top_p="0.9"), r"top_p='0.9'; valid: above 0"),
    (dict(max_new_tokens=0), r"max_new_tokens=0; valid: 1 or more"),
    (dict(max_new_tokens="4"), r"max_new_tokens='4'; valid: 1 or more"),
    (dict(stop_tokens=2), r"stop_tokens=2; valid: ids, such as \(2,\)"),
    (dict(stop_tokens="</s>"), r"stop_tokens='</s>'; valid: ids"),
    (dict(seed=0.5), r"seed=0.5; valid: an integer"),
    (dict(seed=2**63), r"seed=9223372036854775808; valid: an integer below"),
    (dict(mask=np.array([[1] * 6, [0] * 6])), r"row 1 of mask has no token: an empty prompt"),
    (dict(mask=np.ones((2, 5))), r"mask of shape \(2, 5\) for prompts of shape \(2, 6\)"),
    (dict(ids=IDS + 45), r"ids from 4\d to 9\d; valid: 0 to 49, the vocabulary"),
    (dict(ids=IDS[0]), r"ids must be \(batch, tokens\), with one token at least; got shape \(6,\)"),
    (dict(x=IDS), r"generate takes ids or x, one of them"),
  ],
)
def test_what_cannot_be_written(arguments, message):
  module, params = tiny()
  with pytest.raises(ValueError, match=message):
    generate(module, params, **dict(ids=IDS, max_new_tokens=4) | arguments)
