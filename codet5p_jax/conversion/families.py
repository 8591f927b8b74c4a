"""The families of models that can be converted."""

from typing import Any

from codet5p_jax.conversion.codegen import CODEGEN, COMPOSITE
from codet5p_jax.conversion.t5 import BIMODAL, EMBEDDING, T5
from codet5p_jax.conversion.tables import Family
from codet5p_jax.errors import UserError

FAMILIES = {
    family.model_type: family
    for family in (T5, BIMODAL, EMBEDDING, CODEGEN, COMPOSITE)
}


def family_of(model_type: Any, where: str) -> Family:
  """Returns the family of a `model_type` of config.json.

  Args:
    model_type: the word.
    where: it was found, for the message.

  Raises:
    UserError: there is no such family.
  """
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise UserError(
        f'expected in {where} a model_type among {", ".join(FAMILIES)}, found '
        f'{model_type!r}; only these can be converted'
    )
  return FAMILIES[model_type]


def family_of_config(config: Any) -> Family:
  """Returns the family of one of our configurations.

  Raises:
    UserError: it has none.
  """
  for family in FAMILIES.values():
    if type(config) is family.config_class:
      return family
  raise UserError(
      f'expected a model of a released family, found a '
      f'{type(config).__name__}; it has no layout of Hugging Face'
  )
