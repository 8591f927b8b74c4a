"""pass@k: the chance that one of k samples passes.

Chen et al. 2021, *Evaluating Large Language Models Trained on Code*, section
2.1.
"""

import math


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
  """The unbiased estimate of pass@k for one problem.

  It is the share, among all sets of k of the samples, of those in which at
  least one passes: 1 - C(n - c, k) / C(n, k). As a product of ratios no
  factorial overflows, and in logarithms a small share keeps its digits.

  Args:
    num_samples: n, at least k.
    num_passed: c, how many of them passed.
    k: at least 1.

  Returns:
    From 0 to 1.

  >>> pass_at_k(4, 1, 2)
  0.5
  """
  if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
    raise ValueError(
        f'no pass@{k} of {num_passed} passed among {num_samples} samples')
  if num_samples - num_passed < k:
    return 1.0
  log_share = math.fsum(
      math.log1p(-k / i)
      for i in range(num_samples - num_passed + 1, num_samples + 1)
  )
  return -math.expm1(log_share)
