"""Sites of a vision-language model: those of its tower and those of its language model."""

from collections.abc import Mapping
from typing import Any

from tokred.config import nearest
from tokred.drafts import POSITIONS

STACKS = ("encoder", "llm")
TOWER_POSITIONS = (*POSITIONS, "virtual")  # virtual: a merged token at all of its places (DyMU)


def split(sites: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, dict], dict[str, dict], str]:
  """Sites of tower and language model, and the policy for positions behind the tower.

  Raises:
    ValueError: a stack that is neither, or a policy that does not exist or does not go with the other sites.
  """
  parts: dict[str, dict] = {name: {} for name in STACKS}
  policies = {}
  for name, site in sites.items():
    stack, site = site.get("stack", "encoder"), dict(site)
    if stack not in STACKS:
      raise ValueError(f"sites.{name}.stack={stack!r} does not exist in this model; {nearest(str(stack), STACKS)}")
    if stack == "encoder":
      policy = site.pop("position", "original")
      if policy not in TOWER_POSITIONS:
        raise ValueError(f"sites.{name}.position={policy!r} is not a policy; {nearest(str(policy), TOWER_POSITIONS)}")
      if policy != "original":
        policies[policy] = name
    parts[stack][name] = site
  if "virtual" in policies and (parts["llm"] or len(policies) > 1):
    raise ValueError(
      f"sites.{policies['virtual']}.position='virtual' goes with no site of stack='llm' and with no 'reindex'; "
      f"valid: {nearest('original', TOWER_POSITIONS)}"
    )
  return parts["encoder"], parts["llm"], next(iter(policies), "original")
