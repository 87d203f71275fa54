"""From ids and pictures to arguments of a model, against transformers' own processors and by hand."""

import importlib
import importlib.util
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_vlm_files import SEVEN
from vlms import found, needs_golden, parameters

from tokred.nn import generate, placeholders, qwen_vision
from tokred.pretrained.preprocessing import CLIP
from tokred.pretrained.vlm import read_vlm
from tokred.processing import Processor, expanded, open_processor, stacked

SMALL = dict(SEVEN["llava"], image_token_index=9) | dict(
  vision_config=dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=28, patch_size=14
  ),
)  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28]]
NEXT = SMALL | dict(model_type="llava_next", image_grid_pinpoints=PINPOINTS)
QWEN = dict(SEVEN["qwen2_5_vl"], image_token_id=9)


def processor(config, **fields):
  return Processor(read_vlm(config), *CLIP, **fields)


def picture(height, width, seed=0):
  rng = np.random.default_rng(seed)
  coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(np.uint8)
  return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def test_placeholders_by_hand():
  assert expanded([1, 9, 2, 9], [3, 1], 9) == [1, 9, 9, 9, 2, 9]
  out = processor(SMALL)([[1, 9, 2], [9, 3, 9, 4]], [[picture(50, 40)], [picture(30, 60), picture(28, 28)]])
  np.testing.assert_array_equal(out["mask"].sum(1), [6, 10])
  np.testing.assert_array_equal(out["ids"][0], [0] * 4 + [1, 9, 9, 9, 9, 2])
  np.testing.assert_array_equal(out["slot"], [[[5, 6, 7, 8], [-1] * 4], [[0, 1, 2, 3], [5, 6, 7, 8]]])
  white = np.full((28, 28, 3), 255, np.uint8)
  (made,) = processor(SMALL)([[9]], [[white]])["images"][0]
  np.testing.assert_allclose(made[3, 3], (1 - np.array(CLIP[0])) / CLIP[1], rtol=1e-6)


def test_silent_limits_of_qwen_are_those_of_its_class(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(QWEN))
  save_file({"lm_head.weight": np.zeros((1, 1), np.float32)}, tmp_path / "model.safetensors")
  file = tmp_path / "preprocessor_config.json"
  for fields, wanted in (({}, (3136, 1003520)), (dict(max_pixels=9000), (3136, 9000))):
    file.write_text(json.dumps(dict(image_processor_type="Qwen2VLImageProcessor", **fields)))
    assert open_processor(tmp_path).pixels == wanted and open_processor(tmp_path).resize == "bicubic"


def test_a_cut_is_rounded_down():
  """31 rows for 28: one and a half go above, and transformers drops one."""
  image = np.broadcast_to(np.arange(31, dtype=np.uint8)[:, None, None], (31, 28, 3))
  (made,) = processor(SMALL)([[9]], [[image]])["images"][0]
  np.testing.assert_allclose(made[:, 0, 0], (np.arange(1, 29) / 255 - CLIP[0][0]) / CLIP[1][0], rtol=1e-5)


def test_crops_and_frames_have_as_many_tokens_as_placeholders():
  images = [[picture(40, 80)], [picture(90, 30), picture(56, 56)]]
  ids = [[1, 9, 2], [9, 3, 9]]
  made = processor(NEXT)(ids, images)
  assert made["images"].shape == (2, 4 + 5, 28, 28, 3)  # 84 x 28 and its whole, 56 x 56 and its whole
  module = read_vlm(NEXT).make()
  module.known(made["ids"], made["slot"], made["mask"])
  made = processor(QWEN)(ids, images)
  assert made["position"].shape == (*made["ids"].shape, 3)
  read_vlm(QWEN).make().known(made["ids"], made["slot"], made["mask"])


@pytest.mark.parametrize(
  "ids, images, message",
  [
    ([[9]], [[]], r"images of 1 prompts, 0 in all, for 1 prompts of ids"),
    ([[9], [1]], [[picture(28, 28)]], r"images of 1 prompts, 1 in all, for 2 prompts of ids"),
    ([[9, 9]], [[picture(28, 28)]], r"row 0 has 2 placeholders \(id 9\) and 1 images; valid: as many"),
    (
      [[9]],
      [[picture(28, 28) / 255.0]],
      r"row 0 has an image float64 of shape \(28, 28, 3\); valid: uint8",
    ),
  ],
)
def test_prompts_that_cannot_be(ids, images, message):
  with pytest.raises(ValueError, match=message):
    processor(SMALL)(ids, images)


def test_images_that_a_tower_does_not_take():
  small, large = np.zeros((28, 28, 3), np.float32), np.zeros((28, 56, 3), np.float32)
  assert stacked([[small], []], (28, 28)).shape == (2, 1, 28, 28, 3)
  with pytest.raises(ValueError, match=r"image 1 of row 0 has shape \(28, 56, 3\), but this tower takes \(28, 28, 3\)"):
    stacked([[small, large]], (28, 28))
  with pytest.raises(ValueError, match=r"no prompt has an image: .*; valid: one or more"):
    stacked([[], []], (28, 28))


@needs_golden
def test_what_cannot_be_written_about():
  """Each before anything is compiled."""
  site = dict(stack="llm", reducer="topk", score="key_norm", layers=(1,), keep=15)
  module, params = found("llava_clip_llama").make({"a": site}), parameters("llava_clip_llama")
  ids = np.array([[1, *[95] * 36, *range(2, 16)]], np.int32)
  images, slot = np.zeros((1, 1, 24, 24, 3), np.float32), placeholders.slots(ids, 95, 1, 36)
  write = lambda **k: generate.write(module, params, **dict(ids=ids, images=images, slot=slot, max_new_tokens=4) | k)
  for changes, message in (
    ({}, r"sites.a.keep=15 at layer 1, but a prompt has 15 tokens of text; valid: 16 or more"),
    (dict(cache_length=54), r"a prompt of 51 tokens, images counted, and max_new_tokens=4 are longer than the cache: "),
    (dict(ids=ids[:, 1:]), r"row 0 has 36 placeholders \(id 95\) and its images 36 tokens at other places"),
    (
      dict(ids=np.where(ids == 15, 95, ids)),
      r"row 0 has 37 placeholders \(id 95\) and its images 36 tokens; valid: as",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      write(**changes)
  module = found("llava_clip_llama").make()
  for shape in ((1, 1, 24, 48, 3), (1, 0, 24, 24, 3)):
    with pytest.raises(ValueError, match=r"images of shape .*; valid: \(batch, images, 24, 24, 3\), resized"):
      write(images=np.zeros(shape, np.float32))


EDGES = dict(size=dict(shortest_edge=28), crop_size=dict(height=28, width=28))
LIVE = {
  "llava": (SMALL, "clip", "CLIPImageProcessorPil", EDGES),
  "llava_next": (
    NEXT, "llava_next", "LlavaNextImageProcessorPil",
    EDGES | dict(image_grid_pinpoints=PINPOINTS),
  ),
  "qwen": (QWEN, "qwen2_vl", "Qwen2VLImageProcessorPil", dict(min_pixels=3136, max_pixels=9000)),
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("name", LIVE)
def test_live_against_their_processors(name, tmp_path):
  if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed")
  config, package, kind, fields = LIVE[name]
  module = importlib.import_module(f"transformers.models.{package}.image_processing_pil_{package}")
  theirs = getattr(module, kind)(**fields)
  theirs.save_pretrained(tmp_path)
  (tmp_path / "config.json").write_text(json.dumps(config))
  save_file({"lm_head.weight": np.zeros((1, 1), np.float32)}, tmp_path / "model.safetensors")
  ours = open_processor(tmp_path)
  for number, size in enumerate([(60, 95), (120, 33), (71, 70), (30, 200), (122, 33)]):
    image = picture(*size, number)
    wanted = theirs(images=[image], return_tensors="np", input_data_format="channels_last")
    got = ours([[9]], [[image]])
    if name == "qwen":
      frames = ours.files.tower
      own = np.asarray(wanted["pixel_values"])
      assert int(np.prod(wanted["image_grid_thw"][0])) == got["images"].mask.sum()
      laid = qwen_vision.arrange(own, wanted["image_grid_thw"], frames)
      np.testing.assert_allclose(got["images"].patches[0], laid.patches, atol=0.02)
      continue
    own = np.asarray(wanted["pixel_values"]).reshape(1, -1, 3, 28, 28).transpose(0, 1, 3, 4, 2)
    np.testing.assert_allclose(got["images"], own, atol=0.02)
