"""LLaVA's two stages on conversations of one's own, with any way to reduce image tokens in either.

  python train.py --config=configs/vlm_llava.py:init=llava-dir,stage=1 --workdir=runs/stage1 \
    --config.data.data_dir=talks
  python train.py --config=configs/vlm_llava.py:init=runs/stage1,stage=2,method=gumbel,keep=0.25 --workdir=runs/stage2 \
    --config.data.data_dir=talks

Structural arguments: init (a LLaVA directory in the layout of transformers, or a run), stage (1: the projector alone
learns; 2: projector and language model, the tower stays), tune (stage 2: full, or lora), method (dense, a name of
configs/vlm_easy.py's LEARNED or of configs/vlm_methods.py), keep (share of an image's tokens), steps, max_length.
The loss is on answers only; with a method, the unreduced model of `init` is the teacher.  `talks` holds train.jsonl and
test.jsonl in LLaVA's format, and the images.  Without a method conversations are packed into rows.  No accuracy is
expected: nothing of this size was trained here.
"""

from ml_collections import ConfigDict

from configs import vlm_easy
from tokred.config import arguments, complete, default, nearest

LEARNS = {"1": r"projector/.*", "2": r"(projector|llm)/.*"}


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(
    arg, init="", stage=1, tune="full", method="dense", keep=0.25, steps=2000, max_length=2048, runlocal=False
  )
  for name, value, valid in (("stage", str(args.stage), LEARNS), ("tune", args.tune, ("full", "lora"))):
    if value not in valid:
      raise ValueError(f"config argument {name}={value!r} is unknown; {nearest(value, valid)}")
  config = default()
  if args.init:
    from tokred.loading import read_config  # JAX comes with it: only now

    given = read_config(args.init, {})
    for group in ("model", "projector", "llm"):
      config[group].update(given[group])
    config.text.tokenizer = given.text.tokenizer
    config.data.update({name: given.data[name] for name in ("mean", "std", "resize", "crop_fraction")})
  elif args.runlocal:  # the least that has all parts
    config.model.update(dict(name="vlm", variant="mu/4", image_size=(16, 16), num_classes=0, depth=2))
    config.llm.update(dict(vocab=512, width=32, depth=2, num_heads=2, mlp_dim=64))
    args.max_length = 96
  else:
    raise ValueError("config argument init is missing; valid: a LLaVA directory, or a run of this recipe")
  config.init = args.init
  config.text.update(dict(max_length=args.max_length, prompt="USER: {question} ASSISTANT:"))
  config.data.update(dict(name="conversations", in_memory=False))
  config.train.update(dict(steps=args.steps, batch_size=16, checkpoint_every=500, log_every=10))
  lr = 1e-3 if args.stage == 1 else 2e-5 if args.tune == "full" else 2e-4
  config.optim.update(dict(lr=lr, warmup_steps=max(1, args.steps // 30), weight_decay=0.0))
  learns = rf"{LEARNS[str(args.stage)]}|(.*/)?reduce/.*"
  if args.stage == 2 and args.tune == "lora":
    config.lora.update(dict(rank=4 if args.runlocal else 64, alpha=128.0, train=(r"projector/.*", r"(.*/)?reduce/.*")))
    config.lora.targets = (r"llm/block_\d+/(attn/(qkv|proj)|mlp/(gate|fc1|fc2))/kernel",)
  else:
    config.optim.freeze = (rf"(?!{learns}).*",)
  own = vlm_easy.reduced(config, args.method, args.keep)
  config.text.pack = not config.sites
  if own and args.init:
    config.loss.distill_logits = 1.0
  elif args.runlocal:
    config.loss.distill_logits = 0.0  # there is no teacher
  if args.runlocal:
    config.data.update(dict(train_split="train[:8]", eval_split="test[:4]"))
    config.train.update(dict(steps=2, batch_size=8, log_every=1, checkpoint_every=2))
    config.optim.warmup_steps = 1
    config.eval.batch_size = 8
  return complete(config)
