"""What a folder in Hugging Face's layout names and carries as its code.

`huggingface/` beside this module holds PyTorch classes for the models that
transformers does not know. They are data of this package: exported folders get
a copy, and nothing here imports them.
"""

import dataclasses
import pathlib

_FOLDER = pathlib.Path(__file__).resolve().parent / 'huggingface'


@dataclasses.dataclass(frozen=True)
class RemoteCode:
  """How transformers finds the class of a folder's model.

  Attributes:
    architecture: the class, for `architectures` of config.json.
    auto_map: `auto_map` of config.json, from names of transformers' automatic
      classes to `module.class`; empty where transformers has the class.
    files: the modules that the folder carries, each under its own name.
  """

  architecture: str
  auto_map: dict[str, str] = dataclasses.field(default_factory=dict)
  files: tuple[pathlib.Path, ...] = ()


def find_remote_code(model_type: str) -> RemoteCode:
  """The code of the models with this `model_type` in config.json.

  Raises:
    KeyError: the type is none of t5, codegen, codet5p, codet5p_embedding and
      codet5p_bimodal.
  """
  return _BY_MODEL_TYPE[model_type]


def _carried(suffix: str, model: str, *automatic: str) -> RemoteCode:
  """Code of one class, from two of our modules, named as the released ones.

  Args:
    suffix: what the modules' names end in.
    model: the model's class.
    *automatic: transformers' automatic classes that load it.
  """
  configuration, modeling = f'configuration_{suffix}', f'modeling_{suffix}'
  config = model.removesuffix('EncoderDecoderModel').removesuffix('Model')
  return RemoteCode(
      model,
      {'AutoConfig': f'{configuration}.{config}Config'}
      | {name: f'{modeling}.{model}' for name in automatic},
      tuple(_FOLDER / f'{name}.py' for name in (configuration, modeling)),
  )


_BY_MODEL_TYPE = {
    't5': RemoteCode('T5ForConditionalGeneration'),
    'codegen': RemoteCode('CodeGenForCausalLM'),
    'codet5p': _carried(
        'codet5p',
        'CodeT5pEncoderDecoderModel',
        'AutoModel',
        'AutoModelForSeq2SeqLM',
    ),
    'codet5p_embedding': _carried(
        'codet5p_embedding', 'CodeT5pEmbeddingModel', 'AutoModel'
    ),
    'codet5p_bimodal': _carried(
        'codet5p_bimodal',
        'CodeT5pBimodalModel',
        'AutoModel',
        'AutoModelForSeq2SeqLM',
    ),
}
