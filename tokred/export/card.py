"""The model card that people read: README.md of an export, from what `tokred.json` says."""

from collections.abc import Sequence
from typing import Any

FILES = {
  "orbax": ("params/", "parameters (orbax); `tokred.load`"),
  "safetensors": ("model.safetensors", "parameters by name; `tokred.load`"),
  "stablehlo": ("model.stablehlo", "the whole model (`jax.export`); `tokred.export.load_stablehlo`"),
  "onnx": ("model.onnx", "the whole model; ONNX Runtime, TensorRT, ..."),
}
SHOWN = 20  # label names that the card lists


def markdown(card: dict[str, Any]) -> str:
  """The card as Markdown."""
  config, m = card["config"], card["config"]["model"]
  sites = ", ".join(f"{name} ({_reducers(site)})" for name, site in config["sites"].items()) or "none"
  accuracy = "not measured" if card["accuracy"] is None else f"{card['accuracy']:.2%} ({_split(config['data'])})"
  size = " x ".join(map(str, m["image_size"]))
  numbers = f"{m['num_classes']} classes, {card['parameters']:,} parameters"
  rows = {
    "architecture": f"{m['name']} {m['variant']}, {size}, {numbers}",
    "reduction": sites,
    "tokens after each block": " ".join(map(str, card["counts"])),
    "cost of an image": f"{card['gflops']:.4g} GFLOPs ({card['gmacs']:.4g} G multiply-adds)",
    "accuracy": accuracy,
    "activations, stored weights": card["dtype"],
    "batch size of functions": card["batch_size"] or "any",
  }
  parts = [
    f"# {m['name']} {m['variant']}, exported by tokred {card['tokred']}",
    _table(("", ""), rows.items()),
    _formats(card),
    _input(card),
  ]
  if card.get("latency"):
    parts.append(_latency(card["latency"]))
  parts.append("## Use\n\n```bash\npython -m tokred.predict --model=THIS_FOLDER image.jpg\n```")
  return "\n\n".join(parts) + "\n"


def _reducers(site: dict[str, Any]) -> str:
  reducer = site["reducer"]
  return reducer if isinstance(reducer, str) else " then ".join(reducer)


def _split(data: dict[str, Any]) -> str:
  return f"{data['name']}, {data['eval_split']}"


def _table(header: Sequence[str], rows: Any) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _formats(card: dict[str, Any]) -> str:
  verified, rows = card.get("verified"), []
  for name in card["formats"]:
    file, what = FILES[name]
    what += f"; operator set {card['opset']}" if name == "onnx" else ""
    what += f"; for {', '.join(card['platforms'])}" if name == "stablehlo" else ""
    found = (verified or {}).get("formats", {}).get(name)
    rows.append((file, what, *((f"{found['difference']:.1e}", f"{found['agreement']:.2%}") if found else ("-", "-"))))
  text = "## Files\n\n" + _table(("file", "what", "largest difference", "same first class"), rows)
  if verified and verified["formats"]:
    text += (
      f"\n\nCompared in a fresh process with the trained model, on {verified['images']} images: logits, or "
      "probabilities where the function gives these."
    )
  return text + "\n\n`tokred.json` says all this for programs, `manifest.json` has the SHA-256 of every file."


def _input(card: dict[str, Any]) -> str:
  data, m = card["config"]["data"], card["config"]["model"]
  size = ", ".join(map(str, (*m["image_size"], m["channels"])))
  if card["preprocess"]:
    shape = f"uint8 images (batch, {size}); they are normalised inside and the result is probabilities"
  else:
    shape = f"float32 images (batch, {size}), (x / 255 - mean) / std; the result is logits"
  fraction, labels = data["crop_fraction"], list(data["labels"])
  crop = f"then the central {fraction:g} of the shorter side" if fraction else "the whole image squeezed"
  shown = ", ".join(labels[:SHOWN]) + (f", ... ({len(labels)} in tokred.json)" if len(labels) > SHOWN else "")
  return (
    f"## Images in\n\nFunctions take {shape}. Parameters loaded by `tokred.load` take the normalised ones.\n\n"
    f"- resize: {data['resize']}, {crop}\n"
    f"- mean {tuple(data['mean'])}, std {tuple(data['std'])}\n- labels: {shown or 'not known; indices'}"
  )


def _latency(rows: Sequence[dict[str, Any]]) -> str:
  first = rows[0]
  cells = [
    (
      row["batch_size"],
      f"{row['latency_ms']:.2f}",
      f"{row['images_per_second']:.1f}",
      f"{row['baseline_latency_ms']:.2f}",
      f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})",
    )
    for row in rows
  ]
  header = ("batch", "ms", "images/s", "ms without sites", "speed-up (quartiles)")
  title = (
    f"{first['device']}, {first['dtype']}, jax {first['jax_version']}, medians of {first['rounds']} rounds in turns"
  )
  return f"## Latency\n\n{title}\n\n{_table(header, cells)}"
