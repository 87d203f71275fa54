"""`python -m tokred.export DIRECTORY FILE.npz`: compares with the `images` and `logits` of the file, prints JSON."""

import json
import sys

import numpy as np

from tokred import export

if __name__ == "__main__":
  directory, file = sys.argv[1:]
  with np.load(file) as recorded:
    print(json.dumps(export.compare(directory, recorded["images"], recorded["logits"])))
