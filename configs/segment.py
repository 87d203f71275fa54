"""Digits with half of the tokens gone, and a linear probe that segments what is left of the map.

A dense model, a reduced one from it, and the probe, which needs no labels but the digit's class (tokred/probe.py):

  python train.py --config=configs/segment.py --workdir=runs/segment_dense
  python train.py --config=configs/segment.py:method=hot --workdir=runs/segment_hot --config.init=runs/segment_dense
  python -m tokred.probe --workdir=runs/segment_hot

Expected, mean intersection over union on 360 test images (CPU, seed 0; 3 and 2 minutes on 2 cores): dense 0.898, hot
0.711 at 61 % of the FLOPs, classifying 99.4 %.  Of the dense checkpoint without training, by last values and owners
and, in brackets, with zeros for what is no token: topk 0.765 (0.702), dpcknn alone 0.831 (0.736), tome 0.871 (0.666).
So one cross-attention from learned queries is no match here for remembering where tokens went.

Structural arguments: method (dense; topk drops, tome merges, hot prunes by density peaks and recovers at the end, where
it learns the dense model's tokens), keep (tokens left of 65, for topk and hot), runlocal.
"""

from ml_collections import ConfigDict

from tokred.config import arguments, default

METHODS = ("dense", "topk", "tome", "hot")


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(arg, method="dense", keep=33, runlocal=False)
  if args.method not in METHODS:
    raise ValueError(f"config argument method={args.method!r} is unknown; valid: {', '.join(METHODS)}")
  config = default()
  model = dict(variant="mu/4", width=64, depth=6, num_heads=2, image_size=(32, 32), position="sincos2d")
  config.model.update(dict(model, channels=1, num_classes=10))
  config.data.update(dict(name="digits", mean=(0.5,), std=(0.5,), pad_crop=3))
  config.train.update(dict(batch_size=64, steps=800, checkpoint_every=200))
  config.optim.update(dict(lr=1.5e-3, warmup_steps=50, weight_decay=0.05))
  config.loss.label_smoothing = 0.1
  if args.method == "topk":
    config.sites.tokens = dict(reducer="topk", layers=(1,), keep=args.keep)
  elif args.method == "tome":
    config.sites.tokens = dict(reducer="tome", layers=(1, 2, 3), r=11)
  elif args.method == "hot":
    config.sites.tokens = dict(reducer="dpcknn", layers=(2,), place="before", keep=args.keep)
    config.sites.map = dict(reducer="recover", place="output")
  if args.method != "dense":
    config.train.steps = 400
    config.optim.update(dict(lr=3e-4, warmup_steps=10, multipliers=((r".*/recover/.*", 10.0),)))
    config.loss.update(dict(distill_logits=0.5, distill_tokens=1.0 if args.method == "hot" else 0.0))
  if args.runlocal:
    config.train.update(dict(steps=2, batch_size=8, log_every=1, checkpoint_every=2))
    config.optim.warmup_steps = 1
    config.loss.update(dict(distill_logits=0.0, distill_tokens=0.0))  # there is no teacher
    config.eval.batch_size = 64
  return config
