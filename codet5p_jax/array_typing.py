"""Shape aliases: the words in which every signature speaks.

Axis words, the same here, in docstrings and in the sharding rules:

  batch     rows of a batch
  length    positions of a sequence (q_length, kv_length where two meet)
  embed     the model width
  heads     attention heads
  kv        width of one head
  mlp       hidden width of the feed-forward layer
  vocab     rows of the embedding table, padding included
  buckets   buckets of the relative position bias

The aliases are annotations only; the test run switches the checks on
(`--jaxtyping-packages`), so a training step pays nothing for them.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Key

# Nested dictionaries of arrays, of shardings, or of jax.ShapeDtypeStruct.
Tree = Any

Tokens = Int[Array, 'batch length']
Positions = Int[Array, 'batch length']
SegmentIds = Int[Array, 'batch length']
Weights = Float[Array, 'batch length']
Activations = Float[Array, 'batch length embed']

Queries = Float[Array, 'batch q_length heads kv']
Keys = Float[Array, 'batch kv_length heads kv']
Values = Float[Array, 'batch kv_length heads kv']
# Their last axes are those of the queries and keys that meet, which differ
# between self-attention and cross-attention: the attention itself checks them.
AttentionMask = Bool[Array, '#batch #heads _ _']
# Its rows are those of the keys, which may serve several rows of queries.
CrossMask = Bool[Array, '_ #heads _ _']
AttentionBias = Float[Array, '#batch #heads _ _']

Scalar = Float[Array, '']
PRNGKey = Key[Array, '']
