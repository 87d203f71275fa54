"""A digits run of seconds: a tiny ViT on 4x4 images, six steps of eight examples."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tokred import checkpoint
from tokred.config import complete, default

STEPS = 6
PAIR = dict(reducer=("topk", "diffrate_merge"), layers=(1,), rate="learned")


def config(sites: dict[str, Any] | None = None, **overrides: Any) -> ConfigDict:
  """The micro recipe; overrides are `group=dict(field=value)` or `field=value`."""
  c = default()
  c.model.update(dict(variant="mu/1", width=16, depth=2, num_heads=2, mlp_dim=32, image_size=(4, 4), channels=1))
  c.model.num_classes = 10
  c.data.update(dict(name="digits", mean=(0.5,), std=(0.5,), train_split="train[:60]", eval_split="test[:30]"))
  c.train.update(dict(steps=STEPS, batch_size=8, log_every=1, checkpoint_every=3))
  c.optim.update(dict(lr=3e-3, warmup_steps=1))
  c.eval.batch_size = 16
  c.sites.update(sites or {})
  for name, value in overrides.items():
    if isinstance(value, dict):
      c[name].update(value)
    else:
      c[name] = value
  return complete(c)


def vlm() -> ConfigDict:
  """The least vision-language model whose sites, in both stacks, have counts that depend on the prompt."""
  c, site = default(), dict(reducer="topk", score="token_norm", keep=0.25)
  c.model.update(dict(name="vlm", variant="mu/4", image_size=(8, 8), num_classes=0, depth=1))
  c.llm.update(dict(vocab=16, width=8, depth=2, num_heads=2, mlp_dim=8))
  c.sites = dict(seen=dict(site, place="output"), read=dict(site, stack="llm", layers=(1,), place="before"))
  return complete(c)


def talks(lengths: Sequence[int]) -> dict[str, np.ndarray]:
  """A batch with an image of four patches and so many ids of text behind it, a third of them answers; 0: padding."""
  rng, length = np.random.default_rng(0), np.array(lengths)[:, None]
  place, valid = np.arange(28), length > 0
  ids = np.where(place < 4, 3, rng.integers(4, 16, (len(lengths), 28)))
  return dict(
    ids=np.where(valid, ids, 0).astype(np.int32),
    mask=valid & (place < 4 + length),
    answer=valid & (place < 4 + length) & (place >= 4 + length - length // 3),
    slot=np.where(valid, np.arange(4), -1)[:, None].astype(np.int32),
    image=rng.normal(size=(len(lengths), 1, 8, 8, 3)).astype(np.float32),
    valid=valid[:, 0],
  )


def state(workdir: Path) -> dict[str, np.ndarray]:
  """All arrays of the last checkpoint, by path."""
  leaves = {}
  for part in ("step", "params", "opt_state", "ema"):
    try:
      tree = checkpoint.restore_params(workdir, part)
    except checkpoint.CheckpointError as error:
      assert "has no 'ema'" in str(error)
      continue
    paths = jax.tree_util.tree_leaves_with_path({part: tree})
    leaves |= {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
  return leaves


def metrics(workdir: Path, prefix: str = "") -> list[dict[str, Any]]:
  """Lines of metrics.jsonl without what depends on the clock; those with a name that begins with `prefix`."""
  lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
  lines = [{name: value for name, value in line.items() if not name.startswith("speed/")} for line in lines]
  return [line for line in lines if any(name.startswith(prefix) for name in line)]


def assert_same_run(a: Path, b: Path) -> None:
  """Checkpoints and logs equal bit for bit."""
  one, other = state(a), state(b)
  assert one.keys() == other.keys()
  for name in one:
    assert one[name].dtype == other[name].dtype
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  assert metrics(a) == metrics(b)


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], atol: float, part: str = "params/") -> None:
  """Arrays of two states equal to rounding."""
  assert a.keys() == b.keys()
  for name in a:
    if name.startswith(part):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=atol, err_msg=name)


def two_processes() -> ConfigDict:
  """What two processes train: learned rates that are frozen on the way, over a mesh of two devices."""
  optim = dict(name="sgd", momentum=0.0, lr=0.1, clip_norm=0.0, ema=0.5)
  loss = dict(budget=1.0, target=0.85)
  return config(dict(rates=PAIR), mesh=dict(data=2), optim=optim, loss=loss, rates=dict(freeze_step=5))
