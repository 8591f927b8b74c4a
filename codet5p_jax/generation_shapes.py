"""What generating takes of a machine, before there is a trained model."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from codet5p_jax.array_typing import Tree
from codet5p_jax.decoding.prefill import Prompts, decoding_params
from codet5p_jax.decoding.sampler import Sampler
from codet5p_jax.decoding.sampling import Sampling
from codet5p_jax.errors import UserError, require_positive
from codet5p_jax.models.computation import Computation
from codet5p_jax.sharding import DECODING_RULES, batch_axes_size
from codet5p_jax.training.optimizers import SGD
from codet5p_jax.training.partition import merge_params
from codet5p_jax.training.train_step import StepConfig, make_train_step


@dataclasses.dataclass(frozen=True)
class GenerationShapes:
  """A model, and the sizes of a batch that it completes.

  Attributes:
    model: configuration of the network.
    trainable: patterns of the parameters that a run trained.
    frozen_dtype: in which the others are held: "float32", "bfloat16" or "int8".
    dtype: of the computation.
    batch_size: completions that grow at once, each of a prompt of its own.
    prompt_length: tokens of a prompt, which the encoder gets, and the decoder
      too where the model wants that.
    max_new_tokens: tokens of a completion.
    mesh_shape: (replica, data, model), one of them may be -1.
  """

  model: Any
  trainable: Sequence[str] = ('.*',)
  frozen_dtype: str = 'bfloat16'
  dtype: str = 'bfloat16'
  batch_size: int = 32
  prompt_length: int = 512
  max_new_tokens: int = 512
  mesh_shape: Sequence[int] = (1, 1, -1)

  def __post_init__(self):
    require_positive(
        batch_size=self.batch_size,
        prompt_length=self.prompt_length,
        max_new_tokens=self.max_new_tokens,
    )

  def compile_programs(
      self,
      mesh: Mesh,
      compile_program: Callable[[str, jax.stages.Lowered], jax.stages.Compiled],
  ) -> None:
    """Compiles the programs that generate.

    Args:
      mesh: on which the model lies.
      compile_program: is called with "prefill", what reads the prompts,
        "rows", what makes a row of each and draws its first token, and "token",
        what draws the others, one after another.

    Raises:
      UserError: the mesh does not divide the batch.
    """
    if self.batch_size % batch_axes_size(mesh):
      raise UserError(
          f'expected a batch that the {batch_axes_size(mesh)} parts of the '
          f'mesh that take rows divide, found {self.batch_size}; set '
          f'BATCH_SIZE, or MESH_SHAPE=(1, 1, -1) to cut the model alone'
      )
    step = make_train_step(
        StepConfig(
            model=self.model,
            computation=Computation(self.dtype, scan_layers=False),
            objectives=(),
            optimizer=SGD(0.0),
            batch_size=self.batch_size,
            trainable=self.trainable,
            frozen_dtype=self.frozen_dtype,
            mesh_shape=self.mesh_shape,
            rules=DECODING_RULES,
        ),
        mesh,
        is_trained=False,
    )
    params = self._params(step.abstract_state)
    whole = NamedSharding(mesh, PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: Any = jnp.int32) -> Any:
      return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    rows, stacks = self.batch_size, self.model.head_counts()
    source_length = self.prompt_length if 'encoder' in stacks else 1
    to_decoder = self.model.prompt_to_decoder or 'encoder' not in stacks
    slots = self.prompt_length if to_decoder else 1
    prompts = Prompts(
        abstract((rows, source_length)),
        abstract((rows, slots)),
        abstract((rows,)),
    )
    sampler = Sampler(step.model, Sampling(), self.model.eos_id, mesh)
    key_dtype = jax.eval_shape(lambda: jax.random.key(0)).dtype

    def results(name: str, lowered: jax.stages.Lowered) -> Any:
      """What a program gives, where it lies: what the next one takes."""
      return jax.tree.map(
          lambda value, sharding: jax.ShapeDtypeStruct(
              value.shape, value.dtype, sharding=sharding
          ),
          lowered.out_info,
          compile_program(name, lowered).output_shardings,
      )

    reading = results('prefill', sampler.read.lower(params, prompts))
    samples = results(
        'rows',
        sampler.begin.lower(
            *reading,
            abstract((rows,), key_dtype),
            abstract((rows,)),
            max_new_tokens=self.max_new_tokens,
        ),
    )
    compile_program('token', sampler.go_on.lower(params, samples, abstract(())))

  def _params(self, state: Any) -> Tree:
    everything = merge_params(state.params, state.frozen_params)
    cast = jax.eval_shape(
        lambda params: decoding_params(params, self.dtype), everything
    )
    return jax.tree.map(
        lambda leaf, given: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=given.sharding
        ),
        cast,
        everything,
    )
