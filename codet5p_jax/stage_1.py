"""The objectives of stage 1 with the paper's lengths (section 4.2).

For what looks at data without a run; a run takes its own from
`objectives/stage_1.gin`, with the same lengths. Looking needs no sentinels that
a model knows, so any vocabulary will do.
"""

from codet5p_jax.objectives.causal_lm import CausalLM
from codet5p_jax.objectives.seq2seq_causal_lm import Seq2SeqCausalLM
from codet5p_jax.objectives.span_denoising import SpanDenoising

OBJECTIVES = (
    SpanDenoising(untrained_sentinels=True),
    Seq2SeqCausalLM(),
    CausalLM(),
)
