"""From a name to a path: what lies here wins, else Hugging Face is asked."""

import os
import re
from pathlib import Path

FILES = (  # nothing that holds code, and no second copy of the weights
  "config.json", "preprocessor_config.json", "processor_config.json", "tokred_config.json", "model.safetensors",
  "model-*.safetensors", "model.safetensors.index.json", "tokred_reducers.safetensors", "tokenizer.json",
  "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
  "merges.txt",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(path: str | os.PathLike[str]) -> Path:
  """The path itself where something is there, else the directory of the repository of that name on Hugging Face.

  huggingface_hub downloads, resumes and caches; it honours HF_HUB_OFFLINE, HF_TOKEN and HF_HOME.

  Raises:
    FileNotFoundError: nothing is here, and there is no such repository, or it cannot be reached.
  """
  local = Path(path)
  if local.exists() or not NAME.fullmatch(os.fspath(path)):
    return local
  try:
    import huggingface_hub
  except ImportError:
    raise FileNotFoundError(
      f"{os.fspath(path)!r} does not exist here; to fetch it from Hugging Face: pip install huggingface_hub"
    ) from None
  try:
    return Path(huggingface_hub.snapshot_download(os.fspath(path), allow_patterns=list(FILES)))
  except Exception as error:  # of many types: no network, no such name, a gate, a full disk
    reason = " ".join(str(error).split())[:200]
    raise FileNotFoundError(
      f"{os.fspath(path)!r} does not exist here, and Hugging Face does not give it ({type(error).__name__}: {reason}); "
      "check the name, the network, HF_HUB_OFFLINE and HF_TOKEN"
    ) from None
