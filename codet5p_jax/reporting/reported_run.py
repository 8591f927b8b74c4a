"""What is known of a run that is reported."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from codet5p_jax.corpus.folder import METADATA
from codet5p_jax.errors import UserError
from codet5p_jax.planning.parameters import parameter_shapes
from codet5p_jax.training.files import read_json
from codet5p_jax.training.run_folder import (
    RunFolder,
    read_config,
    read_metrics,
    rebuild,
)
from codet5p_jax.training.timeline import Session, read_timeline


@dataclasses.dataclass(frozen=True)
class ReportedRun:
  """What is known of a run.

  Attributes:
    folder: of the run.
    config: config.json, rebuilt.
    rows: of metrics.jsonl.
    evaluations: {where it was measured: {"<objective>/<metric>": value}}.
    outputs: rows of generation/outputs*.jsonl.
    sessions: of timeline.jsonl; none of a run that has no such file.
    corpus: metadata of the corpus; None where the data is none.
  """

  folder: RunFolder
  config: Mapping[str, Any]
  rows: Sequence[Mapping[str, Any]]
  evaluations: Mapping[str, Mapping[str, Any]]
  outputs: Sequence[Mapping[str, Any]]
  sessions: Sequence[Session]
  corpus: Mapping[str, Any] | None

  @property
  def objectives(self) -> list[str]:
    return [objective.name for objective in self.config['objectives']]

  @property
  def last_step(self) -> int:
    return self.rows[-1]['step']

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters, by path."""
    return parameter_shapes(self.config['model'].make_model())

  def losses_of(self, objective: str) -> Sequence[str]:
    """Names of the losses of which an objective's is the sum; often none."""
    [found] = [o for o in self.config['objectives'] if o.name == objective]
    return getattr(found, 'losses', ())


def read_run(run_dir: str) -> ReportedRun:
  """Reads a run folder.

  Raises:
    UserError: it is none of a run, or nothing was trained yet.
  """
  config = rebuild(read_config(run_dir))
  folder = RunFolder(pathlib.Path(run_dir).expanduser())
  rows = read_metrics(folder.metrics)
  if not any(row.get('kind') == 'train' for row in rows):
    raise UserError(
        f'expected rows of training in {folder.metrics}, found none; start the '
        f'run, or wait for its first row'
    )
  evaluations = {}
  in_training = [row for row in rows if row.get('kind') == 'evaluation']
  if in_training:
    name = f'validation, in training at step {in_training[-1]["step"]}'
    evaluations[name] = in_training[-1]
  for path in sorted(folder.path.glob('evaluation/*/metrics.json')):
    values = read_json(path)
    evaluations[f'{path.parent.name}, at step {values.get("step")}'] = values
  outputs = [
      row
      for path in sorted(folder.path.glob('generation/outputs*.jsonl'))
      for row in read_metrics(path)
      if 'settings' in row  # Former versions did not write them.
  ]
  corpus = _corpus_metadata(pathlib.Path(config['data_dir']))
  sessions = read_timeline(folder.timeline)
  return ReportedRun(
      folder, config, rows, evaluations, outputs, sessions, corpus
  )


def _corpus_metadata(data_dir: pathlib.Path) -> dict[str, Any] | None:
  try:
    metadata = json.loads((data_dir / METADATA).read_text(encoding='utf-8'))
  except (OSError, ValueError):
    return None  # Pairs have none; and a corpus may have been moved away.
  return metadata if isinstance(metadata, dict) else None
