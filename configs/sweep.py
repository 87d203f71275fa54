"""Methods x budgets x seeds from one dense checkpoint: a table and two plots.

  python -m tokred.sweep --config=configs/sweep.py:dataset=digits --workdir=runs/sweep
  python -m tokred.sweep --config=configs/sweep.py:dataset=cifar10,data_dir=DIR --workdir=runs/sweep_cifar10 \
    --config.methods="('dense','random','cls_topk','tome','evit','dynamicvit','mctf','diffrate','mod')"

The same command goes on where it was stopped, and with other methods, budgets or seeds it adds to the table.  Left in
the run directory: dense/ (unless --config.init names a checkpoint), runs/, results.csv, table.md,
accuracy_gflops.png and accuracy_speed.png.

Structural arguments: dataset (digits, or as in configs/vit.py, with variant, image_size, classes, data_dir), steps of a
fine-tuning (0: 400 on digits, 1000 elsewhere), runlocal.  Everything of the dense recipe is under --config.dense,
everything that the fine-tunings share under --config.finetune, the methods (configs/methods.py) under --config.table.
"""

from ml_collections import ConfigDict

from configs import digits, methods, vit
from tokred.config import arguments

ARGUMENTS = dict(dataset="digits", variant="", image_size=0, classes=0, data_dir="", steps=0, runlocal=False)


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(arg, **ARGUMENTS)
  if args.dataset == "digits":
    dense, steps = digits.get_config("runlocal" if args.runlocal else ""), 400
  else:
    names = ("dataset", "variant", "image_size", "classes", "data_dir", "runlocal")
    dense, steps = vit.get_config(",".join(f"{name}={args[name]}" for name in names)), 1000
  steps = args.steps or (2 if args.runlocal else steps)
  config = ConfigDict()
  config.methods = ()  # names of the table; (): all whose reducers exist; "tome+tuned": also fine-tuned
  config.budgets = (0.7, 0.6, 0.5)  # shares of the dense multiply-adds
  config.seeds = (0, 1, 2)  # of the fine-tunings; methods that are only evaluated run once
  config.init = ""  # the dense checkpoint; "": trained first
  config.dense = dense
  config.finetune = ConfigDict(  # what all fine-tunings share
    dict(
      train=dict(steps=steps, mode="gather"),  # mask where rates are learned
      optim=dict(lr=3e-4, warmup_steps=min(10, steps - 1)),
      loss=dict(distill_logits=0.5),  # the teacher is the dense checkpoint
    )
  )
  config.table = ConfigDict(methods.METHODS)
  config.calibrate = ConfigDict(dict(split="train[:256]", batch_size=64))  # images that searches look at
  config.bench = ConfigDict(dict(batch_size=64, rounds=10))  # of images/s; 0 rounds: not measured
  return config
