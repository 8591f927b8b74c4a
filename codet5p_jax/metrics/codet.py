"""CodeT's dual execution agreement: solutions ranked by tests of the model.

Chen et al. 2022, *CodeT: Code Generation with Generated Tests*. Solutions that
pass the same tests form a group; a group counts for as much as it has tests and
solutions that agree.
"""

import ast
import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class Group:
  """Solutions that pass the same tests.

  Attributes:
    solutions: their numbers, ascending.
    tests: the numbers of the tests that they pass.
  """

  solutions: tuple[int, ...]
  tests: frozenset[int]

  @property
  def score(self) -> float:
    """(number of tests) * sqrt(number of solutions), as in section 2 there."""
    return len(self.tests) * math.sqrt(len(self.solutions))


def assertions(text: str, tested: Sequence[str], most: int) -> list[str]:
  """The assertions in what a model wrote after `assert `.

  Args:
    text: more assertions may follow the first, and anything else.
    tested: the names under test; an assertion mentions one of them.
    most: how many are taken.

  Returns:
    Each a statement in Python's own spelling, in order.
  """
  found: list[str] = []
  for piece in re.split(r'^\s*assert\b', text, flags=re.MULTILINE):
    statement = _assertion(piece)
    if statement is not None and _mentions(statement, tested):
      found.append(ast.unparse(statement))
    if len(found) == most:
      break
  return found


def _assertion(text: str) -> ast.Assert | None:
  """The assertion that a text begins with; it may go over lines."""
  lines = text.strip().split('\n')
  for count in range(1, len(lines) + 1):
    source = 'assert ' + '\n'.join(lines[:count])
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # About its escapes.
        (statement,) = ast.parse(source).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
      continue
    return statement if isinstance(statement, ast.Assert) else None
  return None


def _mentions(statement: ast.Assert, names: Sequence[str]) -> bool:
  return any(
      isinstance(node, ast.Name) and node.id in names
      for node in ast.walk(statement)
  )


def grouped(passed: Sequence[Iterable[int]]) -> list[Group]:
  """Groups solutions, best first.

  Args:
    passed: the numbers of the tests that each solution passes.

  Returns:
    By falling score; of equal ones the group of the earlier solution first.
  """
  members: dict[frozenset[int], list[int]] = {}
  for solution, tests in enumerate(passed):
    members.setdefault(frozenset(tests), []).append(solution)
  groups = [Group(tuple(s), tests) for tests, s in members.items()]
  return sorted(groups, key=lambda group: -group.score)


def ranked_pass_at_k(
    groups: Sequence[Group], is_right: Sequence[bool], k: int
) -> float:
  """The chance that one of k solutions is right, one of each of the k best.

  Groups of the same score count as one. Which solution of it is taken is left
  to chance, and chance is not drawn: this is the expectation over all draws.

  Args:
    groups: as `grouped` returns them.
    is_right: whether each solution passes the real tests.
    k: how many; where there are fewer scores, all are taken.

  Returns:
    From 0 to 1.
  """
  of_score: dict[float, list[int]] = {}
  for group in groups:
    of_score.setdefault(group.score, []).extend(group.solutions)
  all_wrong = 1.0
  for solutions in list(of_score.values())[:k]:
    all_wrong *= 1 - sum(is_right[s] for s in solutions) / len(solutions)
  return 1 - all_wrong
