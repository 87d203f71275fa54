"""Video: what has not changed goes, or merges along time."""

import jax
import numpy as np
from golden import quick
from golden_vlm import needs_golden, order, recorded, reduced, tokens_of

from tokred import rates
from tokred.reducers.temporal import DifferentialTokenDrop, TemporalMerge

DEGREE = np.pi / 180


def test_temporal_merge_by_hand():
  """Three frames of two places; angles of the first 0, 5, 90 and of the second 0, 60, 60 degrees.

  Changes 1 - cos: .0038, .996 and .5, 0.  Four stay: the first frame, the first place's third and the second's second;
  its third joins it, and the first's second joins the first.
  """
  angles = np.array([[0, 0], [5, 60], [90, 60]]).reshape(-1) * DEGREE
  x = np.stack([np.cos(angles), np.sin(angles)], -1)
  out, report = reduced(TemporalMerge(patches=2), tokens_of(x), 4)
  assert order(out) == [[0, 1, 3, 4]] and np.asarray(out.owner[0]).tolist() == [0, 1, 0, 2, 3, 2]
  np.testing.assert_allclose(out.x[0], [(x[0] + x[2]) / 2, x[1], x[3], x[4]], atol=1e-6)
  np.testing.assert_allclose(report["score"][0, 2:], 1 - np.cos(np.array([5, 60, 85, 0]) * DEGREE), atol=1e-6)
  out, _ = reduced(TemporalMerge(patches=2), tokens_of(x), 3)  # runs grow: of the second place all three are two
  assert order(out) == [[0, 1, 4]] and np.asarray(out.owner[0]).tolist() == [0, 1, 0, 1, 2, 1]


def test_text_between_frames_is_no_frame():
  """Frames of two tokens behind one time stamp each: places are compared, stamps stay."""
  x = np.array([[9.0, 0], [1, 0], [0, 1], [0, 9], [1, 0], [1, 1], [9, 9]])
  tokens = tokens_of(x).replace(protected=np.array([[True, False, False, True, False, False, True]]))
  out, _ = reduced(DifferentialTokenDrop(patches=2), tokens, 6)
  assert order(out) == [[0, 1, 2, 3, 5, 6]]


@needs_golden
def test_differential_token_drop_recorded():
  g = recorded("dtd_feature")
  frames, tau = g["frames"], float(g["threshold"])
  tokens = tokens_of(frames.reshape(1, -1, frames.shape[-1]))
  module = DifferentialTokenDrop(patches=frames.shape[1])
  run = jax.jit(
    lambda t: module.apply({}, t, rates.Threshold(1 - tau, 80), train=False, mode="mask"), compiler_options=quick()
  )
  out, report = run(tokens)
  np.testing.assert_allclose(1 - report["score"].reshape(g["keep"].shape)[1:], g["sim"], atol=1e-5)
  assert order(out) == [g["kept_flat_index"].tolist()]
