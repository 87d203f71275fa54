"""The notebooks run from top to bottom, with small numbers."""

import json
import re
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "quickstart.ipynb"
SMALL = {  # what a reader waits for, made small: (in the notebook, in the test)
  "STEPS = 300": "STEPS = 2",
  'variant="mu/4", width=64, depth=6': 'variant="mu/8", width=16, depth=1',
  "batch_size=64, log_every=50": "batch_size=16, log_every=1",
  "pad_crop=3": 'train_split="train[:64]", eval_split="test[:40]"',
  "warmup_steps=STEPS // 10": "warmup_steps=1",
  "layers=(1, 2, 3, 4, 5)": "layers=(0,)",
  "layers=(0, 1, 2, 3), r=8": "layers=(0,), r=4",
  "target=0.5": "target=0.9",
  "batch_sizes=(1, 64))": "batch_sizes=(2,), rounds=1)",
}


def cells(kind):
  notebook = json.loads(NOTEBOOK.read_text())
  assert notebook["nbformat"] == 4
  return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_outputs_are_cleared():
  assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_it_runs_from_top_to_bottom(one_device, capsys):
  sources = ["".join(cell["source"]) for cell in cells("code")]
  for large, small in SMALL.items():
    assert sum(source.count(large) for source in sources) >= 1, f"the notebook has no {large!r} any more"
    sources = [source.replace(large, small) for source in sources]
  scope = {}
  for number, source in enumerate(sources):
    exec(compile(source, f"cell {number}", "exec"), scope)
  printed = capsys.readouterr().out
  assert "tokens after each block: (" in printed and "reduction" in printed
  assert float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-4
  assert scope["picture"].is_file() and scope["frozen"].flops < scope["dense"].flops
