"""A ViT on any data set that TFDS knows, or on a folder of images; with learned keep-rates on request.

The dense model, then half its FLOPs from it (`dataset=cifar10` changes nothing else; images of N classes that lie at
DIR/train/CLASS/ and DIR/test/CLASS/ are `dataset=image_folder,classes=N,data_dir=DIR`):

  python train.py --config=configs/vit.py:dataset=fashion_mnist --workdir=runs/fashion_dense
  python train.py --config=configs/vit.py:dataset=fashion_mnist,learned --workdir=runs/fashion \
    --config.init=runs/fashion_dense

Structural arguments: dataset, variant (size/patch, such as S/16; a size for laptops where it is not given), image_size
(pixels, square), classes, data_dir, learned, runlocal.
"""

from ml_collections import ConfigDict

from tokred.config import arguments, default

# image size, channels, classes, patch, mean, std, flip
DATASETS = {
  "fashion_mnist": (28, 1, 10, 4, (0.286,), (0.353,), False),
  "cifar10": (32, 3, 10, 4, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), True),
  "image_folder": (64, 3, 2, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
}


def get_config(arg: str | None = None) -> ConfigDict:
  args = arguments(
    arg, dataset="fashion_mnist", variant="", image_size=0, classes=0, data_dir="", learned=False, runlocal=False
  )
  size, channels, classes, patch, mean, std, flip = DATASETS.get(args.dataset, DATASETS["image_folder"])
  size, classes = args.image_size or size, args.classes or classes
  config = default()
  config.model.update(dict(variant=args.variant or f"mu/{patch}", image_size=(size, size), channels=channels))
  config.model.update(dict(num_classes=classes, position="sincos2d", drop_path=0.1 if args.variant else 0.0))
  if not args.variant:
    config.model.update(dict(width=64, depth=6, num_heads=2))
  config.data.update(dict(name=args.dataset, data_dir=args.data_dir, mean=mean, std=std, flip=flip))
  config.data.update(dict(pad_crop=size // 14))
  config.train.update(dict(batch_size=128, epochs=10.0, checkpoint_every=500, log_every=50))
  config.optim.update(dict(lr=1.5e-3, warmup_steps=200))
  config.loss.label_smoothing = 0.1
  if args.learned:
    layers = tuple(range(1, config.model.depth or 12))
    config.sites.rates = dict(reducer=("topk", "diffrate_merge"), layers=layers, rate="learned")
    config.train.epochs = 4.0
    config.rates.freeze_step = 300
    config.optim.update(dict(lr=3e-4, warmup_steps=20, multipliers=((r".*/rate/.*", 100.0),)))
    config.loss.update(dict(budget=20.0, target=0.5, distill_logits=0.5))
  if args.runlocal:
    config.data.in_memory = False
    config.data.train_split, config.data.eval_split = (
      f"{config.data.train_split}[:64]",
      f"{config.data.eval_split}[:16]",
    )
    config.model.update(dict(width=32, depth=3, mlp_dim=64, num_heads=2))
    if args.learned:
      config.sites.rates.layers = (1, 2)
      config.loss.target = 0.8  # two layers of three cannot save half
    config.train.update(dict(steps=2, batch_size=8, log_every=1, checkpoint_every=2))
    config.optim.warmup_steps = 1
    config.loss.distill_logits = 0.0  # there is no teacher
    config.rates.freeze_step = min(config.rates.freeze_step, 1)
    config.eval.batch_size = 16
  return config
