"""Fine-tunes a checkpoint that is there already, with learned keep-rates or any method of configs/methods.py.

`init` is a Hugging Face directory or hub name, a timm file, a run directory or an export: architecture, image size and
preprocessing come from it, and only the rest stands here.  Where the classes are new, first the dense model, for it is
the teacher of the reduced one:

  python train.py --config=configs/finetune.py:init=google/vit-base-patch16-224,dataset=cifar10,method=dense \
    --workdir=runs/cifar10_dense
  python train.py --config=configs/finetune.py:init=runs/cifar10_dense,dataset=cifar10,budget=0.5 --workdir=runs/cifar10

Structural arguments: init; num_heads (where a bare timm file does not tell them; or variant, size/patch, of the file's
width); dataset (digits, those of configs/vit.py, or any other of TFDS with classes=N); image_size (pixels, square; 0:
the checkpoint's, else its positions are resized); classes; data_dir; method (diffrate: learned rates; dense; any
other); budget (share of the dense cost); steps; tune (what learns: full, lora, reducers); runlocal.

Leaves that one may want to set: `--config.loss.target=8.5 --config.loss.target_unit=gmacs` (or gflops, tokens) for a
budget in other units, `--config.optim.ema=0.999`, `--config.data.mixup=0.8`, `--config.model.drop_path=0.1`,
`--config.optim.layer_decay=0.65`, `--config.lora.rank=16`, `--config.teacher=runs/other_dense`.
"""

from ml_collections import ConfigDict

from configs.methods import METHODS, RATE
from tokred.config import arguments, complete, default, nearest

CLASSES = {"digits": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100, "imagenet2012": 1000, "image_folder": 0}
MIRRORED = ("cifar10", "cifar100", "imagenet2012", "image_folder")  # where left and right mean the same
TUNES = ("full", "lora", "reducers")
RATE_LR = 0.03  # of the logits of learned rates, which start at 0 and end a few units away


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(
    arg, init="", variant="", num_heads=0, dataset="cifar10", image_size=0, classes=0, data_dir="", method="diffrate",
    budget=0.5, steps=2000, tune="full", runlocal=False,
  )  # fmt: skip
  if not (args.init or args.runlocal):
    raise ValueError("config argument init is missing; valid: a run directory, export, weights file or hub name")
  classes = args.classes or CLASSES.get(args.dataset, 0)
  if not classes and args.dataset in CLASSES:
    raise ValueError(
      f"config argument classes is missing; valid with dataset={args.dataset!r}: the number of its classes"
    )
  if not classes:
    known = nearest(args.dataset, CLASSES)
    raise ValueError(f"config argument dataset={args.dataset!r} is unknown; {known}; with classes=N any of TFDS")
  for name, value, valid in (("tune", args.tune, TUNES), ("method", args.method, METHODS)):
    if value not in valid:
      raise ValueError(f"config argument {name}={value!r} is unknown; {nearest(value, valid)}")

  config, had = default(), classes
  if args.init:
    from tokred.loading import read_config  # JAX comes with it: only now

    told = {name: args[name] for name in ("variant", "num_heads") if args[name]}
    size = {"image_size": (args.image_size, args.image_size)} if args.image_size else {}
    given = read_config(args.init, told | size)
    for name, value in told.items():
      if given.model[name] != value:
        raise ValueError(
          f"config argument {name}={value!r}, but {args.init} has {given.model[name]!r} of its own; leave it out"
        )
    had = given.model.num_classes
    config.model.update(given.model)
    config.data.update({name: given.data[name] for name in ("mean", "std", "resize", "crop_fraction")})
  else:  # runlocal: the least that has all parts
    config.model.update(dict(variant="mu/4", width=32, depth=3, num_heads=2, mlp_dim=64, image_size=(16, 16)))
    args.budget = max(args.budget, 0.8)  # three blocks cannot save half
  if args.image_size:
    config.model.image_size = (args.image_size, args.image_size)
  config.model.num_classes = classes
  config.data.update(dict(name=args.dataset, data_dir=args.data_dir, flip=args.dataset in MIRRORED))
  config.data.update(dict(pad_crop=max(1, config.model.image_size[0] // 14), in_memory=args.dataset != "image_folder"))
  config.train.update(
    dict(steps=2 if args.runlocal else args.steps, batch_size=128, checkpoint_every=500, log_every=50)
  )
  lr = {"full": 2e-4, "lora": 1e-3, "reducers": 1e-3}[args.tune]
  config.optim.update(dict(lr=lr, warmup_steps=max(1, config.train.steps // 20)))
  config.optim.layer_decay = 0.75 if args.tune == "full" else 0.0
  config.lora.rank = 8 if args.tune == "lora" else 0
  if args.runlocal:
    splits = {name: f"{config.data[name]}[:{n}]" for name, n in (("train_split", 64), ("eval_split", 16))}
    config.data.update(dict(in_memory=False, **splits))
    config.train.update(dict(batch_size=8, log_every=1, checkpoint_every=2))
    config.eval.batch_size = 16
  return _reduced(config, args, same_head=had == classes)


def _reduced(config: ConfigDict, args: ConfigDict, same_head: bool) -> ConfigDict:
  """The config with the method's sites, loss and counts, and with `init` and what is frozen."""
  import jax

  from tokred import sharding, sweep
  from tokred.model import build, init
  from tokred.nn import vit

  table = METHODS
  if args.method == "diffrate" and not vit.shape(config.model).has_cls:  # no CLS token that could tell who matters
    sites = dict(tokens=dict(reducer="topk", score="column_mean", layers="every", rate="learned"))
    table = table | {"diffrate": RATE | dict(sites=sites)}
  finetune = dict(loss=dict(distill_logits=0.5), train=dict(mode="gather"))
  made = ConfigDict(dict(table=table, dense=config, finetune=finetune))
  full = sweep.recipe(made, args.method, args.budget, config.seed, args.init).unlock()
  dense = not len(full.sites)
  if dense or not (same_head and args.init):  # there is nobody to learn these logits from
    full.loss.distill_logits = 0.0
  if not args.init:
    full.loss.update(dict(distill_tokens=0.0, recalibration=0.0))
  if any(site.get("rate") == "learned" for site in full.sites.values()):
    full.optim.multipliers = ((r".*/rate/.*", RATE_LR / full.optim.lr),)
  if args.tune == "reducers":
    head = "" if same_head else "|head"
    full.rates.freeze_step = full.rates.freeze_step if head else 0  # behind it nothing would be left to learn
    full.optim.freeze = (rf"(?!(.*/)?reduce/{head}).*",)
    params = jax.tree_util.tree_leaves_with_path(jax.eval_shape(lambda: init(build(full).module, 0)))
    if same_head and not any("reduce" in sharding.path_name(path).split("/") for path, _ in params):
      raise ValueError(
        f"config arguments tune='reducers' and method={args.method!r}: this method has nothing to train; valid: "
        "tune=full or lora, or a method with parameters of its own, such as diffrate"
      )
  return complete(full)
