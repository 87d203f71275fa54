"""One method at one budget, fine-tuned from a dense checkpoint.

  python train.py --config=configs/methods.py:method=evit,dataset=digits,budget=0.6 --workdir=runs/evit \
    --config.init=runs/digits_dense

Structural arguments: method (a name below), budget (share of the dense FLOPs), seed, and those of configs/sweep.py
(dataset, steps, ...).  A name with "+tuned" fine-tunes a method that needs no training.  `greedy` and `sigmoid` search
on a model: here they are what they start from, and `python -m tokred.sweep` runs them; so it does for the counts by
layer that `dyt` ships (of a run of train.py: `python -m tokred.calibrate --method=by_threshold`).

`diffrate_released` is not in the sweep: it has counts of its own, and no budget:

  python train.py --config=configs/methods.py:method=diffrate_released,schedule=deit_s_2.9g,dataset=imagenet2012,\
variant=S/16,image_size=224,classes=1000 --workdir=runs/released --config.init=deit_small.safetensors \
    --config.model.position=learned

`ltmp` and the `tome_threshold`s have thresholds, with which each image keeps another number of tokens: what such a run
costs is the mean that eval.py tells as "mean_gflops", while "counts" and "gflops" are those of an image that keeps them
all.  The sweep makes ltmp's mean counts fixed ones, scaled to the budget.  Of the others it moves the thresholds until
the mean image meets the budget, makes rows for as many tokens (of a run of train.py this is `python -m tokred.calibrate
--method=in_rows --images=1024`, after which "gflops" is what a batch with such rows computes for an image), and reports
what the images cost in the mean.

Accuracy expected on digits at 0.6 of the FLOPs, in percent, from configs/sweep.py:dataset=digits,steps=200 (mean over
three seeds where something is trained; one of 360 images is 0.28):

| method | what it is | training | digits, 0.6 |
|---|---|---|---|
| dense, dense+tuned | nothing is removed; trained for as long as the others | none, yes | 99.4, 99.4 |
| random | keeps a random set | none | 99.7 |
| cls_topk, column_mean, value_norm, repr_shift | keep the tokens of the highest score | none | 96.4, 99.7, 99.4, 98.3 |
| pagerank, zerotprune | weighted PageRank over the attention map; with its similarity stage | none | 99.4, 99.7 |
| maxmin, mmr | farthest first; relevance against redundancy | none | 99.4, 99.4 |
| kmeans, dpcknn | clusters | none | 99.4, 99.4 |
| tome, pitome, tofu, transforming | merge what is alike | none | 99.4, 99.4, 99.4, 95.3 |
| tome_kth, tome_random | ToMe's other splits: all but tokens at even steps merge; random ones do | none | 99.4, 100.0 |
| ats | samples by the scores' distribution | none | 93.3 |
| greedy, sigmoid | ToMe with searched counts | none | 99.4, 99.4 |
| topk_merge | prune and merge as DiffRate, counts set by hand | yes | 99.7 |
| diffrate, diffrate_alone | prune and merge, counts learned; the counts alone, as its authors do | yes | 99.1, 95.8 |
| diffrate_released | its authors' counts for DeiT-S at 224 (schedule=deit_s_2.3g, deit_s_2.9g) | yes | not run |
| tome_learned, tome_learned_half | ToMe, counts learned, from those by hand; from half of all | yes | 99.2, 99.2 |
| tome_threshold | ToMe by one threshold for all layers, images have counts of their own | none | 99.7 |
| tome_threshold_learned | the same, a learned threshold for each layer | yes | 99.6 |
| ltmp | merges what is alike and drops what is ignored, by a learned threshold each | yes | 99.6 |
| evit, evit_scheduled | cls attention, the rest fused; counts that fall over half of the training | yes | 98.8, 99.4 |
| evit_drop | cls attention, the rest dropped | yes | 98.8 |
| dynamicvit | Gumbel selectors with distillation | yes | 99.4 |
| mctf | merges by three criteria, consistency | yes | 99.4 |
| sit, stvit, stvit_recover | soft slots; semantic tokens; and the grid back at the end | yes | 99.1, 99.4, 97.3 |
| sit_stages | soft slots of soft slots behind each of the first three blocks, as its authors do | yes | 97.1 |
| avit | halting | yes | 99.5 |
| autoencoder, autoencoder_alone | keeps what the others cannot reconstruct; on frozen features | yes | 99.3, 99.1 |
| mod | Mixture-of-Depths around every second block | yes | 98.2 |
| dyt, skipvit, spa | dispatchers, a long skip, packed rows | yes | 99.4, 98.8, 98.0 |
| hot, clca | prune and recover; cross-layer cache | yes | 98.9, 99.2 |

(The thresholds ran from another checkpoint, of 99.7, with two seeds.)

On Fashion-MNIST at 0.6, as README tells: dense 88.7, random 84.6, cls_topk 77.8, tome 88.1, tome+tuned 88.3, evit 86.7,
dynamicvit 87.4, mctf 88.0, diffrate 87.2, mod 83.1, tome_learned 88.3 (88.7 after 2000 steps), and from another of 87.9
topk_merge 87.3, tome_learned_half 87.8.  On CIFAR-10 at 0.6: dense 73.1, random 69.9, cls_topk 67.5, tome 72.4,
tome+tuned 72.5, tome_threshold 72.9, tome_threshold_learned 72.7, evit 70.7, dynamicvit 69.3, mctf 71.6, diffrate 71.6,
tome_learned 72.5, mod 62.6.
"""

from typing import Any

from ml_collections import ConfigDict

from tokred.config import arguments, nearest

# Weights of an own loss, or settings of training, stand beside the sites: groups of the training config.  `tune`:
# whether the method is fine-tuned; `freeze`: share of the steps after which learned rates are integers; `search`: how
# counts are found.  `layers` are words of tokred.schedules.LAYERS, and counts follow from the budget.
# What decides starts from nothing beside weights that know their task: DynamicViT's authors give it 100 times the
# learning rate of the backbone.
FRESH = dict(optim=dict(multipliers=((r".*/reduce/.*", 20.0),)))
CALM = dict(model=dict(gate_cap=30.0))  # tokens that are switched off teach less
RATE = CALM | dict(optim=dict(multipliers=((r".*/rate/.*", 100.0),)), loss=dict(budget=20.0), freeze=0.4, tune=True)

# Images have counts of their own, and only in the mean the cost of the budget.  Many are needed to know the mean.
EACH = dict(search="by_shift", settle="in_rows", calibrate=dict(split="train[:1024]"))
LTMP = dict(score="column_mean", raster=True, rate="learned_threshold", threshold=(-0.9, 0.0), softness=0.02)


def _one(reducer: Any, layers: str = "stages", tune: bool = False, **options: Any) -> dict[str, Any]:
  """A method of one site, trained as everything else is."""
  return dict(sites=dict(tokens=dict(reducer=reducer, layers=layers, **options)), tune=tune)


AUTOENCODER = _one("autoencoder", "once", tune=True, place="before", num_layers=1) | dict(train=dict(mode="mask"))
METHODS: dict[str, dict[str, Any]] = {
  "dense": dict(sites={}),
  # Criteria
  "random": _one("topk", score="random"),
  "cls_topk": _one("topk"),
  "column_mean": _one("topk", score="column_mean"),
  "value_norm": _one("topk", score="value_norm"),
  "repr_shift": _one("topk", score="repr_shift"),
  "pagerank": _one("topk", score="pagerank"),
  "zerotprune": _one("zerotprune"),
  "maxmin": _one("maxmin"),
  "mmr": _one("mmr"),
  "kmeans": _one("kmeans"),
  "dpcknn": _one("dpcknn"),
  "ats": _one("ats", levels=196),  # the authors', for 224 pixels
  # Fusion
  "tome": _one("tome", "every"),
  "tome_kth": _one("tome_kth", "every"),
  "tome_random": _one("tome_random", "every"),
  "pitome": _one("pitome", "every"),
  "tofu": _one("tofu", "every"),
  "transforming": _one("transforming"),
  "evit": _one("topk", fuse=True, tune=True),
  "evit_scheduled": _one("topk", fuse=True, tune=True, rate="scheduled", schedule=(0.0, 0.5))  # shares of the steps
  | dict(train=dict(mode="mask")),
  "evit_drop": _one("topk", tune=True),
  "mctf": _one("mctf", "every", tune=True)
  | dict(loss=dict(full_cross_entropy=1.0, consistency=3.0, confidence=0.4, less=3)),  # less: 7 where 197 tokens come
  "sit": dict(
    sites=dict(slim=dict(reducer="sit", layers="once"), back=dict(reducer="sit_reverse", layers="behind")),
    loss=dict(distill_logits=2.0, recalibration=2.0),
    tune=True,
  ),
  "sit_stages": dict(  # slots of slots behind the first three blocks, undone behind these and every later one
    sites=dict(slim=dict(reducer="sit", layers="first", reverse=True), back=dict(reducer="sit_reverse", layers="rest")),
    loss=dict(distill_logits=2.0, recalibration=2.0),
    tune=True,
  ),
  "stvit": _one("stvit", "once", tune=True),
  # Rates
  "topk_merge": _one(("topk", "diffrate_merge"), "every", tune=True),
  "diffrate": dict(sites=dict(tokens=dict(reducer=("topk", "diffrate_merge"), layers="every", rate="learned"))) | RATE,
  "diffrate_alone": dict(sites=dict(tokens=dict(reducer=("topk", "diffrate_merge"), layers="every", rate="learned")))
  | RATE
  | dict(optim=dict(lr=0.01, end_lr=0.001, freeze=(r"^(?!.*/rate/).*",)), freeze=1.0),  # as its authors train it
  "tome_learned": dict(sites=dict(tokens=dict(reducer="tome", layers="every", rate="learned", initial="budget")))
  | RATE,
  "tome_learned_half": dict(sites=dict(tokens=dict(reducer="tome", layers="every", rate="learned"))) | RATE,
  "tome_threshold": _one("dymu_merge", "every", rate="threshold", threshold=-0.9, keep=1.0) | EACH,
  "tome_threshold_learned": _one(
    "dymu_merge", "every", tune=True, rate="learned_threshold", threshold=-0.9, softness=0.02
  )
  | CALM
  | dict(optim=dict(multipliers=((r".*/rate/.*", 3.0),)), loss=dict(budget=20.0))
  | EACH,
  # A threshold for each block, merging before pruning (Bonnaerens & Dambre, 2023, arXiv:2307.10780).  Pairs that are
  # more alike than theta merge, and tokens to which less than theta' of the attention goes are dropped; they start at
  # 0.9 and 0.  The authors' softness is 0.1, many times the attention that a token gets.  One moves by tenths, the
  # other by hundredths.
  "ltmp": _one(("dymu_merge", "topk"), "all", tune=True, **LTMP)
  | CALM
  | dict(optim=dict(multipliers=((r".*dymu_merge/rate/.*", 10.0), (r".*topk/rate/.*", 0.3))), loss=dict(budget=20.0))
  | dict(settle="by_mean"),
  "greedy": _one("tome", "every") | dict(search="greedy"),
  "sigmoid": _one("tome", "every") | dict(search="sigmoid"),
  # Selectors
  "dynamicvit": _one("gumbel", tune=True)
  | FRESH
  | CALM
  | dict(loss=dict(keep_ratio=2.0, distill_logits=0.5, distill_tokens=0.5), train=dict(mode="mask")),
  "avit": _one("avit", "all", tune=True) | dict(loss=dict(ponder=5e-4, halting_prior=1e-3), train=dict(mode="mask")),
  "autoencoder": AUTOENCODER,
  "autoencoder_alone": AUTOENCODER | dict(optim=dict(lr=1e-3, freeze=(r"^(?!.*/reduce/).*",))),  # on frozen features
  # Routers
  "mod": _one("router", "alternate", tune=True, place="around") | FRESH,
  "dyt": _one("dyt", "all", tune=True, hidden=8)
  | dict(loss=dict(global_ratio=2.0, full_cross_entropy=1.0, full_distill=1.0, less=0), train=dict(mode="mask"))
  | dict(settle="by_threshold"),  # behind training the sweep asks the layers how many tokens each needs
  "skipvit": _one("topk", "once", tune=True, place="around", until=-2),
  "spa": _one("spa", "alternate", tune=True, group=2)
  | FRESH
  | dict(loss=dict(keep_ratio=2.0), train=dict(mode="mask")),
  # Recovery
  "stvit_recover": dict(
    sites=dict(
      semantic=dict(reducer="stvit", layers="once", place="around", until=-2),
      back=dict(reducer="stvit_recover", layers="exit"),
    ),
    tune=True,
  ),
  "hot": dict(
    sites=dict(
      prune=dict(reducer="dpcknn", layers="once"), back=dict(reducer="recover", layers="last", place="before")
    ),
    tune=True,
  ),
  "clca": dict(
    sites=dict(
      prune=dict(reducer="topk", fuse=True, layers="stages"),
      cache=dict(reducer="clca", layers="all", place="before", carriers=1),
    ),
    tune=True,
  ),
}


def get_config(arg: str | None = None) -> ConfigDict:
  from configs import sweep  # which names this table too

  own = dict(method="evit", budget=0.6, seed=0, schedule="")
  args = arguments(arg, **own, **sweep.ARGUMENTS)
  rest = ",".join(f"{name}={args[name]}" for name in sweep.ARGUMENTS)
  from tokred.sweep import recipe  # JAX comes with it: only now

  made = sweep.get_config(rest)
  known = (*METHODS, "diffrate_released")
  if args.method.removesuffix("+tuned") not in known:
    raise ValueError(f"config argument method={args.method!r} is unknown; {nearest(args.method, known)}")
  if args.schedule and args.method != "diffrate_released":
    raise ValueError(f"config argument schedule={args.schedule!r} is for method=diffrate_released, not {args.method!r}")
  if args.method == "diffrate_released":
    made.table[args.method] = ConfigDict(_released(args.schedule, made.dense.model))
  config = recipe(made, args.method, args.budget, args.seed)
  if args.runlocal:
    for name in ("distill_logits", "distill_tokens", "recalibration"):  # there is no teacher
      config.loss[name] = 0.0
  return config


def _released(schedule: str, model: ConfigDict) -> dict[str, Any]:
  """DiffRate with counts that its authors have learned for another model of the same blocks and tokens."""
  from tokred.nn import vit
  from tokred.reducers import diffrate

  if schedule not in diffrate.SCHEDULES:
    raise ValueError(f"config argument schedule={schedule!r} is unknown; {nearest(schedule, diffrate.SCHEDULES)}")
  counts, shape = diffrate.SCHEDULES[schedule], vit.shape(model)
  wanted = len(counts[0]), counts[0][0]
  if (shape.depth, shape.num_tokens) != wanted:
    raise ValueError(
      f"config argument schedule={schedule!r} is for {wanted[0]} blocks and {wanted[1]} tokens, and not for the "
      f"{shape.depth} blocks and {shape.num_tokens} tokens of {model.variant} at {model.image_size}; valid: another "
      "dataset, variant and image_size, such as variant=S/16,image_size=224"
    )
  return dict(sites=dict(tokens=diffrate.site(*counts)), tune=True)
