"""Vision-language models against transformers as installed, with sizes that the recorded ones do not have."""

import importlib.util

import numpy as np
import pytest
from vlms import TOLERANCE, forward, pixels

from tokred.nn import anyres, generate
from tokred.pretrained.vlm import load_vlm, open_vlm

pytestmark = [
  pytest.mark.thorough,
  pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]
IMAGE, VIDEO = 94, 95
TEXT = dict(
  vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip
QWEN = dict(
  text_config=TEXT | dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])),
  image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=92, vision_end_token_id=93,
)  # fmt: skip
TOWERS = {
  "qwen2_5_vl": dict(
    depth=3, hidden_size=32, intermediate_size=40, num_heads=2, out_hidden_size=64, window_size=56,
    fullatt_block_indexes=[1], patch_size=14,
  ),
  "qwen2_vl": dict(depth=2, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=2, patch_size=14),
}  # fmt: skip


def theirs(config, tmp_path):
  import torch
  from transformers import AutoConfig, AutoModelForImageTextToText

  kind = config.pop("model_type")
  torch.manual_seed(0)
  model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config)).eval().float()
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn_like(p) * (0.2 if p.ndim == 1 else 0.1))
  model.save_pretrained(tmp_path, max_shard_size="100KB")
  return model


@pytest.mark.parametrize("kind", TOWERS)
def test_qwen_with_images_of_many_sizes_and_a_video(kind, tmp_path):
  import torch

  model = theirs(QWEN | dict(model_type=kind, vision_config=TOWERS[kind]), tmp_path)
  grids = np.array([[1, 6, 10], [1, 4, 4], [1, 10, 6]])
  patches = np.random.default_rng(0).normal(size=(grids.prod(1).sum(), 1176)).astype(np.float32)
  rows = [[5, 92, *[IMAGE] * 15, 93, 6, 7, 92, *[IMAGE] * 4, 93, 8], [92, *[IMAGE] * 15, 93, 9, 10]]
  ids, mask = np.zeros((2, 27), np.int64), np.zeros((2, 27), np.int64)
  for line, there, row in zip(ids, mask, rows, strict=True):
    line[-len(row) :], there[-len(row) :] = row, 1
  arguments = dict(attention_mask=torch.tensor(mask), mm_token_type_ids=torch.tensor((ids == IMAGE).astype(int)))
  arguments |= dict(pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor(grids))
  with torch.no_grad():
    wanted = model(torch.tensor(ids), **arguments).logits.numpy()
    text = model.generate(torch.tensor(ids), **arguments, max_new_tokens=5, do_sample=False)[:, 27:].numpy()
  files = open_vlm(tmp_path)
  module, params = load_vlm(tmp_path)
  inputs = anyres.frames(ids, patches, grids, files.tower, files.image_token, mask=mask)
  assert inputs["images"].mask.shape[1] == 2 and not inputs["images"].mask.all()
  got, _ = forward(module, params, inputs)
  np.testing.assert_allclose(np.asarray(got)[mask > 0], wanted[mask > 0], atol=TOLERANCE)
  np.testing.assert_array_equal(generate.write(module, params, **inputs, max_new_tokens=5).tokens, text)
  video = np.array([[3, 4, 6]])
  patches = patches[: video.prod()]
  ids = np.array([[5, 92, *[VIDEO] * 18, 93, 6, 7]])
  with torch.no_grad():
    wanted = model(
      torch.tensor(ids), pixel_values_videos=torch.tensor(patches), video_grid_thw=torch.tensor(video),
      mm_token_type_ids=torch.tensor((ids == VIDEO) * 2), second_per_grid_ts=torch.tensor([0.5]),
    ).logits.numpy()  # fmt: skip
  pace = dict(video_token=VIDEO, tokens_per_second=files.tokens_per_second, seconds=[0.5])
  inputs = anyres.frames(ids, patches, video, files.tower, files.image_token, **pace)
  got, _ = forward(module, params, inputs)
  np.testing.assert_allclose(got[:, :20], wanted[:, :20], atol=TOLERANCE)  # behind a video their 5.x counts otherwise


@pytest.mark.parametrize("tower", ["clip_vision_model", "siglip_vision_model"])
def test_llava_next_of_unequal_images(tower, tmp_path):
  import torch

  clip = tower.startswith("clip")
  vision = dict(
    model_type=tower, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16,
    patch_size=4,
  )  # fmt: skip
  pinpoints = [[16, 32], [32, 16], [32, 32], [48, 16]]
  config = dict(
    text_config=TEXT | dict(model_type="llama", num_key_value_heads=4), vision_config=vision, image_token_index=IMAGE,
    image_grid_pinpoints=pinpoints, vision_feature_layer=-2 if clip else -1, model_type="llava_next",
    vision_feature_select_strategy="default" if clip else "full",
  )  # fmt: skip
  model = theirs(config, tmp_path)
  files = open_vlm(tmp_path)
  module, params = load_vlm(tmp_path)
  sizes = [[(50, 21)], [(17, 30), (33, 40)]]
  counts = [[anyres.crops(size, files.pinpoints, 16, 4) for size in row] for row in sizes]
  rows = [[5, *[IMAGE] * counts[0][0][1], 6, 7]]
  rows += [[8, *[IMAGE] * counts[1][0][1], 9, *[IMAGE] * counts[1][1][1], 4, 3]]
  longest = max(map(len, rows))
  ids, mask = np.zeros((2, longest), np.int64), np.zeros((2, longest), np.int64)
  for line, there, row in zip(ids, mask, rows, strict=True):
    line[-len(row) :], there[-len(row) :] = row, 1
  every = [
    (size, table) for row, found in zip(sizes, counts, strict=True) for size, (table, _) in zip(row, found, strict=True)
  ]
  most = max(len(table) for _, table in every)
  rng = np.random.default_rng(0)
  values = np.zeros((3, most, 3, 16, 16), np.float32)
  for image, (_, table) in zip(values, every, strict=True):
    image[: len(table)] = rng.normal(size=(len(table), 3, 16, 16))
  position = np.maximum(mask.cumsum(1) - 1, 0)
  with torch.no_grad():
    wanted = model(
      torch.tensor(ids), attention_mask=torch.tensor(mask), pixel_values=torch.tensor(values),
      image_sizes=torch.tensor([size for size, _ in every]), position_ids=torch.tensor(position),
    ).logits.numpy()  # fmt: skip
  slot = anyres.crop_slots(ids, sizes, IMAGE, files.pinpoints, 16, 4)
  images = np.zeros((2, slot.shape[1], 3, 16, 16), np.float32)
  lengths = [len(table) for _, table in every]
  images[0, : lengths[0]] = values[0, : lengths[0]]
  images[1, : lengths[1]] = values[1, : lengths[1]]
  images[1, lengths[1] : lengths[1] + lengths[2]] = values[2, : lengths[2]]
  inputs = dict(ids=ids.astype(np.int32), images=pixels(images), slot=slot, mask=mask)
  got, _ = forward(module, params, inputs)
  np.testing.assert_allclose(np.asarray(got)[mask > 0], wanted[mask > 0], atol=TOLERANCE)


def test_grids_of_many_sizes_are_theirs():
  from transformers.image_processing_utils import select_best_resolution
  from transformers.models.llava_next.modeling_llava_next import unpad_image
  from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

  pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
  import torch

  for h, w in np.random.default_rng(0).integers(8, 2000, (300, 2)).tolist():
    best = anyres.resolution((h, w), pinpoints)
    assert best == tuple(select_best_resolution((h, w), pinpoints))
    grid = (best[0] // 14, best[1] // 14)
    flat = torch.arange(grid[0] * grid[1]).reshape(1, *grid)
    np.testing.assert_array_equal(flat.numpy()[0][anyres.content((h, w), grid)], unpad_image(flat, (h, w))[0])
    assert anyres.fitted((h, w)) == tuple(smart_resize(h, w, 28, 3136, 1003520))
