"""A small vision-language model from nothing on easy-VQA, then the same with a tenth of its image tokens.

  python train.py --config=configs/vlm_easy.py --workdir=runs/easy
  python train.py --config=configs/vlm_easy.py:method=sit,seed=1 --workdir=runs/easy_sit --config.init=runs/easy

easy-VQA comes with a package (pip install -e '.[vqa]'), from which TFDS prepares it once in its own directory;
--config.data.data_dir names another one that has it.
Structural arguments: method (dense, a name of LEARNED, or one of configs/vlm_methods.py, fine-tuned), tokens (of an
image's 64 that the language model reads), steps, seed.  Expected results stand in README.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import vlm_methods
from tokred.config import arguments, default, nearest

# What a method adds to a recipe: groups of the config, for k of n image tokens, a tower and a language model so deep.
FRESH = dict(multipliers=((r".*/reduce/.*|projector/.*", 5.0),))
MASK, GATHER = dict(mode="mask"), dict(mode="gather")
LEARNED: dict[str, Any] = {
  "gumbel": lambda k, n, *_: dict(
    sites=dict(select=dict(reducer="gumbel", place="output", keep=k / n)),
    loss=dict(keep_ratio=50.0),
    optim=FRESH,
    train=MASK,
  ),
  "stts": lambda k, n, *_: dict(
    sites=dict(select=dict(reducer="stts", place="output", keep=k / n)), optim=FRESH, train=MASK
  ),
  "sit": lambda k, n, *_: dict(
    sites=dict(slim=dict(reducer="sit", place="output", keep=k / n)), optim=FRESH, train=GATHER
  ),
  "queries": lambda k, n, *_: dict(projector=dict(name="queries", num_tokens=k), optim=FRESH, train=GATHER),
  # Rates of tower and language model under one budget: the share of the dense multiply-adds.
  "rates": lambda k, n, depth, read: dict(
    sites=dict(
      tower=dict(reducer="tome", layers=tuple(range(1, depth)), rate="learned", granularity=4),
      llm=dict(
        stack="llm",
        reducer="topk",
        score="last_attention_ahead",
        layers=tuple(range(1, read)),
        place="before",
        rate="learned",
      ),
    ),
    loss=dict(budget=200.0, target=0.5),
    optim=dict(multipliers=((r".*/rate/.*", 100.0),)),
    train=MASK,
  ),
}


def reduced(config: ConfigDict, method: str, keep: float) -> bool:
  """Puts a method into a config of a VLM; whether there is one.

  Args:
    config: whose model, projector and llm are set.
    method: dense, a name of LEARNED, or one of configs/vlm_methods.py.
    keep: share of an image's tokens.
  """
  if method == "dense":
    return False
  m = config.model
  if method in LEARNED:
    patch = int(m.variant.rpartition("/")[2])
    patches = (m.image_size[0] // patch) * (m.image_size[1] // patch)
    own = LEARNED[method](round(keep * patches), patches, m.depth, config.llm.depth)
  else:
    if method not in vlm_methods.METHODS:
      raise ValueError(f"method={method!r} is unknown; {nearest(method, ('dense', *LEARNED, *vlm_methods.METHODS))}")
    cls = m.pool == "cls" or m.class_token
    sites = vlm_methods.sites(method, keep, depth=m.depth, llm_depth=config.llm.depth, cls=cls)
    own = dict(sites=sites, train=GATHER)
  config.sites = ConfigDict(own.pop("sites", {}))
  for group, fields in own.items():
    config[group].update(fields)
  if config.train.mode == "mask":  # else what is switched off drowns what is not
    m.gate_cap = 30.0
  return True


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(arg, method="dense", tokens=6, steps=0, seed=0, runlocal=False)
  config = default()
  config.seed = args.seed
  config.model.update(dict(name="vlm", variant="mu/8", width=64, depth=4, num_heads=2, image_size=(64, 64)))
  config.model.update(dict(num_classes=0, pool="avg", position="sincos2d"))
  config.llm.update(dict(vocab=64, width=64, depth=3, num_heads=2, mlp_dim=192, max_length=96, prompt=16))
  config.text.update(dict(max_length=168, share=True))
  config.data.update(dict(name="easy_vqa", pad_crop=6, flip=True))
  config.train.update(
    dict(batch_size=32, steps=args.steps or 4000, checkpoint_every=500, eval_every=1000, log_every=50)
  )
  config.optim.update(dict(lr=2e-3, warmup_steps=min(200, config.train.steps // 2), weight_decay=0.05))
  config.eval.batch_size = 250
  if reduced(config, args.method, args.tokens / 64):
    config.train.steps = args.steps or 1000
    config.optim.update(dict(lr=5e-4, warmup_steps=min(50, config.train.steps // 2)))
    config.loss.distill_logits = 1.0
    config.text.share = all(site.get("stack", "encoder") == "encoder" for site in config.sites.values())
    config.text.max_length = 168 if config.text.share else 88
  if args.runlocal:
    config.loss.distill_logits = 0.0  # there is no teacher
    config.data.train_split, config.data.eval_split = "train[:64]", "test[:16]"
    config.train.update(dict(steps=2, batch_size=8, log_every=1, checkpoint_every=2))
    config.optim.warmup_steps = 1
    config.eval.batch_size = 16
  if args.method == "rates":
    config.rates.freeze_step = config.train.steps // 2
  return config
