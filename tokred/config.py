"""The default config: every field that a recipe may set, with the value it has when the recipe is silent.

A recipe in `configs/` starts from `default()`, changes what it is about and returns it locked, so that a misspelt
override fails. `complete` does the same for a plain dict that names only some of the fields.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict


def default() -> ConfigDict:
  """All fields and their defaults; lengths of time are in optimiser steps unless the name says epochs."""
  config = ConfigDict()
  config.seed = 0
  config.init = ""  # where the weights come from: a path or a name that `tokred.load` takes; "" draws them anew

  config.model = ConfigDict(
    dict(
      name="vit",  # vit, vlm (this group is the tower then, and config.projector and config.llm follow it)
      variant="Ti/16",  # size/patch: mu, Ti, S, B, L, So400m, H, g
      width=0,  # 0: as the variant says; likewise the next three
      depth=0,
      num_heads=0,
      mlp_dim=0,
      image_size=(224, 224),  # (height, width) in pixels, multiples of the patch
      channels=3,
      num_classes=1000,  # 0: no head, the logits are the features
      pool="cls",  # cls, avg (mean of the patches), cls_avg (both, side by side), map (attention pooling)
      class_token=False,  # a CLS token also where `pool` does not read it
      distilled=False,  # a distillation token with a head of its own; logits are the mean of both heads
      num_registers=0,  # register tokens after CLS, read by nobody
      position="learned",  # learned, sincos2d, rope2d (queries and keys of patches are turned, as in DINOv3)
      rope_theta=100.0,  # rope2d: base of the wavelengths
      patch_bias=True,
      pre_norm=False,  # a norm before the first block, as in CLIP
      final_norm="tokens",  # the last norm: of all tokens, pooled (of what the head reads), none
      norm_eps=1e-6,
      mlp="plain",  # plain (two layers), gated (three: SwiGLU where the activation is silu)
      activation="gelu",  # gelu (exact), gelu_tanh, quick_gelu, silu, relu
      layer_scale=0.0,  # initial value; 0: no LayerScale
      drop_path=0.0,  # stochastic depth at the last block; grows linearly from 0 at the first
      qkv_bias=True,
      qk_norm=False,
      remat=False,  # recompute each block in the backward pass
      dtype="float32",  # of activations: float32, bfloat16; parameters, softmax and ranking stay float32
      attention="auto",  # auto, matmul, fused
      gate_cap=1e6,  # bounds what queries learn of tokens that are switched off: 30.0 calms a selector's gradients
      gate_eps=0.0,  # added to the weights of a gated softmax; 1e-6: as in DynamicViT's and DiffRate's code
    )
  )

  config.projector = ConfigDict(
    dict(
      name="mlp",  # what joins tower and language model where config.model.name is "vlm"; see tokred/nn/projectors.py
      num_tokens=0,  # of an image, where the projector chooses them; 0: as many as arrive
      budgets=(),  # tokenflex, queries: counts of which each training step draws one; (): num_tokens alone
      anchors=0,  # queries: pooled tokens among num_tokens (PARCEL); 0: queries alone (Matryoshka)
      levels=(),  # tokenpacker, quecc: layers of the tower whose features are keys and values; (): what arrives
    )
  )

  config.llm = ConfigDict(
    dict(  # the language model where config.model.name is "vlm"; its dtype and attention are those of config.model
      vocab=32000,
      width=256,
      depth=4,
      num_heads=4,
      num_kv_heads=0,  # 0: as many as num_heads
      head_dim=0,  # 0: width / num_heads
      mlp_dim=0,  # 0: 4 width
      norm_eps=1e-6,
      rope_theta=10_000.0,
      rope_type="default",  # default, linear, llama3
      rope_scale=(),  # linear: (factor,); llama3: (factor, low, high, original length)
      activation="silu",
      qkv_bias=False,
      proj_bias=False,
      mlp_bias=False,
      qk_norm=False,
      tied=True,  # the head is the table of embeddings
      max_length=2048,  # positions that it is trained for
      image_token=3,  # the id that stands for a patch in a prompt
      prompt=32,  # tokens of text that multiply-adds are counted with
    )
  )

  config.sites = ConfigDict()  # name -> {reducer, layers, place, keep, rate, ...}; see tokred/sites.py

  config.rates = ConfigDict(
    dict(
      freeze_step=0,  # behind so many steps, or all of them, learned rates are integers and training gathers; 0: never
      multiple_of=1,  # frozen counts are rounded to the nearest multiple
    )
  )

  config.data = ConfigDict(
    dict(
      name="digits",  # digits, image_folder, or the name of a TFDS data set
      data_dir="",  # TFDS directory, or the folder of images
      train_split="train",  # split syntax of TFDS
      eval_split="test",
      mean=(0.5, 0.5, 0.5),
      std=(0.5, 0.5, 0.5),
      resize="bilinear",  # nearest, bilinear, bicubic, lanczos
      crop_fraction=1.0,  # evaluation: share of the shorter side that the central crop keeps; 0: squeezed, not cropped
      labels=(),  # names of the classes, in the order of the logits; (): not known
      flip=False,
      pad_crop=0,  # pixels of padding before a random crop of the original size
      random_resized_crop=0.0,  # smallest share of the area; 0: off
      randaugment_layers=0,  # operations per image; 0: off
      randaugment_magnitude=9,  # 0 to 10
      random_erasing=0.0,  # probability
      mixup=0.0,  # alpha of the Beta distribution; 0: off
      cutmix=0.0,
      num_workers=0,  # worker processes; 0: in this process
      prefetch=2,  # batches kept ready on the device
      in_memory=True,  # decode the data set once and keep it
      bad_images="error",  # error, skip (counted in the log)
    )
  )

  config.text = ConfigDict(
    dict(  # how conversations become ids where config.model.name is "vlm"
      tokenizer="",  # file of words, or a checkpoint's directory; "": the words of the training split
      system="",  # said before the first question
      prompt="{question}",  # what stands before an answer, such as "USER: {question} ASSISTANT:"
      max_length=256,  # ids of a row, placeholders among them
      images=1,  # room for images of a conversation
      pack=False,  # training: several conversations share a row, each with its own positions
      share=False,  # training: those about the same image share it in a row, and do not see one another
      too_long="error",  # error, skip: a conversation of more ids
    )
  )

  config.train = ConfigDict(
    dict(
      steps=0,  # 0: as `epochs` says
      epochs=10.0,
      batch_size=128,  # examples per optimiser step, over all devices
      accumulate=1,  # micro-batches per optimiser step
      mode="mask",  # mask (learn at full length), gather (counts are integers)
      log_every=20,
      eval_every=0,  # 0: at the end only
      checkpoint_every=200,
      keep_checkpoints=2,
    )
  )

  config.optim = ConfigDict(
    dict(
      name="adamw",  # an optimiser of optax: adamw, sgd, lamb, lion, adafactor, ...
      lr=1e-3,
      schedule="cosine",  # constant, cosine, linear
      warmup_steps=0,
      end_lr=0.0,
      b1=0.9,
      b2=0.999,
      momentum=0.9,  # of optimisers that have one (sgd, rmsprop, lars, ...); 0: none
      weight_decay=0.05,
      no_decay=(  # regexes of paths
        r".*(bias|scale|layer_scale\d|pos_embed|cls_token|dist_token|registers)$",
        r".*/rate/.*",
      ),
      multipliers=(),  # ((regex, factor), ...): the first match scales the learning rate
      layer_decay=0.0,  # learning rate times this for each layer further from the head; 0 or 1: off
      freeze=(),  # regexes: parameters that never change
      freeze_until=(),  # ((regex, step), ...): parameters that do not change before the step
      clip_norm=1.0,  # 0: off
      clip_groups=(),  # ((regex, norm), ...): of the first match; a group has a norm of its own and none in clip_norm
      ema=0.0,  # decay of the average that is evaluated; 0: off
    )
  )

  config.lora = ConfigDict(
    dict(
      rank=0,  # of the adapters beside frozen kernels; 0: none, everything trains as `optim` says
      alpha=16.0,  # an adapter's product is scaled by alpha / rank
      targets=(r"block_\d+/attn/(qkv|proj)/kernel",),  # regexes of paths: kernels that get one
      train=(r"head(_dist)?/.*", r"(.*/)?reduce/.*"),  # regexes: what trains beside the adapters; the rest is frozen
    )
  )

  config.loss = ConfigDict(
    dict(
      label_smoothing=0.0,
      cross_entropy=1.0,  # from here on: weights; a term of weight 0 is not computed
      distill_logits=0.0,  # KL to the teacher's logits
      distill_tokens=0.0,  # squared distance to the teacher's tokens, over survivors
      distill_tokens_kl=0.0,  # KL to the teacher's tokens, softmax over channels
      keep_ratio=0.0,  # squared distance of each selector's kept share from its keep rate
      budget=0.0,  # squared distance of the cost from `target`, both as shares of the dense cost
      global_ratio=0.0,  # squared distance of the kept share of all selectors together from their mean keep rate
      min_ratio=0.0,  # what the kept share of each selector lacks of `min_share`, with which `global_ratio` is content
      ponder=0.0,  # layers that a token runs through, where tokens halt
      halting_prior=0.0,  # KL of when they halt from a Gaussian around `halting_depth`
      recalibration=0.0,  # squared distance of SiT's recovered tokens from the teacher's
      consistency=0.0,  # squared distance of the pooled feature from that of a less reduced pass
      full_cross_entropy=0.0,  # cross-entropy of the less reduced pass itself
      full_distill=0.0,  # KL to its logits, which learn nothing from it
      router=0.0,  # cross-entropy of each router's logits against its choice
      temperature=1.0,  # of distill_logits
      target=0.5,  # budget: what the reduced model shall cost, in `target_unit`
      target_unit="fraction",  # of the dense multiply-adds; gflops, gmacs; tokens: mean of those that leave the blocks
      dynamic=False,  # keep_ratio: images may differ, and the batch's mean share is held
      min_share=0.1,
      halting_depth=2 / 3,  # share of the blocks: the authors' 8 of 12
      confidence=0.0,  # consistency: only for images whose label the model gives more than this probability
      less=-1,  # the less reduced pass: -1 without sites; r: each of their spots removes up to r tokens, drawn anew
    )
  )
  config.teacher = ""  # run directory, export or weights of the teacher; "": the weights of `init`, without sites

  config.mesh = ConfigDict(
    dict(
      data=-1,  # devices along each axis; -1: all that are left
      fsdp=1,
      tensor=1,
      rules=(),  # ((regex, spec), ...) before the default rules; a spec is a tuple of axis names and None
    )
  )
  config.eval = ConfigDict(dict(batch_size=250))
  return config


def nearest(name: str, valid: Iterable[str]) -> str:
  """The end of an error message: the nearest valid name, where one is near, and all of them."""
  valid = sorted(valid)
  close = difflib.get_close_matches(name, valid, n=1)
  return (f"did you mean {close[0]!r}? " if close else "") + f"valid: {', '.join(valid)}"


def complete(config: Mapping[str, Any]) -> ConfigDict:
  """`default()` with the fields that `config` names.

  Args:
    config: ConfigDict or plain nested dict; every field optional.

  Returns:
    A locked ConfigDict with every field.

  Raises:
    ValueError: no dict, an unknown field or a value of another type than the default's; the message names the field.
  """
  if not hasattr(config, "keys"):  # what stands for a file that could not be read raises here
    raise ValueError(f"config={config!r} must be a dict of fields; {nearest('', default())}")
  given = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
  full = default()
  for group, value in given.items():
    if group not in full:
      raise ValueError(f"config.{group} is not a field; {nearest(group, full)}")
    if not isinstance(full[group], ConfigDict):
      _set(full, group, value, f"config.{group}")
    elif not isinstance(value, (Mapping, ConfigDict)):
      valid = "valid: a dict of fields for each site" if group == "sites" else nearest(group, full[group])
      raise ValueError(f"config.{group}={value!r} must be a dict of fields; {valid}")
    elif group == "sites":
      for name, site in value.items():
        if not isinstance(name, str) or "." in name:
          raise ValueError(f"config.sites has {name!r}; valid: a name of letters, digits and underscores")
        if not isinstance(site, (Mapping, ConfigDict)):
          raise ValueError(f"config.sites.{name}={site!r} must be a dict with the fields of a site (tokred/sites.py)")
      full.sites = ConfigDict({name: {k: _tuples(v) for k, v in site.items()} for name, site in value.items()})
    else:
      for field, leaf in value.items():
        if field not in full[group]:
          raise ValueError(f"config.{group}.{field} is not a field; {nearest(field, full[group])}")
        _set(full[group], field, leaf, f"config.{group}.{field}")
  return full.lock()


def _set(parent: ConfigDict, field: str, value: Any, name: str) -> None:
  if isinstance(parent[field], tuple):  # JSON has no tuples
    value = _tuples(value)
  try:
    if value is None:  # which a ConfigDict takes for any type
      raise TypeError
    parent[field] = value
  except TypeError:
    wanted = type(parent[field]).__name__
    raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; valid: {wanted}") from None


def _tuples(value: Any) -> Any:
  return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple, range)) else value


_BOOLS = {"": True, "1": True, "true": True, "0": False, "false": False}


def arguments(text: str | None, **defaults: Any) -> ConfigDict:
  """Structural arguments of a recipe: "variant=Ti/4,runlocal" over their defaults, in the types of these.

  Raises:
    ValueError: an argument that is not among the defaults, or a value of another type.
  """
  out = ConfigDict(defaults)
  for part in filter(None, (text or "").split(",")):
    name, _, value = part.partition("=")
    if name not in defaults:
      raise ValueError(f"config argument {name!r} is unknown; {nearest(name, defaults)}")
    kind = type(defaults[name])
    try:
      out[name] = _BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
      valid = f"; valid: {', '.join(filter(None, _BOOLS))}, or the name alone" if kind is bool else ""
      raise ValueError(f"config argument {name}={value!r} must be of type {kind.__name__}{valid}") from None
  return out


def refuse(flags: Any, names: Iterable[str], kind: str) -> None:
  """Raises ValueError for a command's flags that were given, and mean nothing for models of this kind.

  Args:
    flags: absl's FLAGS.
    names: of the flags.
    kind: of the model, in words.
  """
  for name in names:
    if flags[name].present:
      raise ValueError(f"--{name} means nothing for {kind}; leave it out")
