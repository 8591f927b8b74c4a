"""Times prepare_corpus against datasets.map, and measures its memory.

Speed: tokens a second of CPU time, on one core. Both sides read the same JSON
lines of the interpreter's own library, tokenise with the same SentencePiece
vocabulary and write. Ours does its whole work: filters, de-duplication, splits,
word starts, shards of the files and the token stores. The other side is
`datasets.map` in batches, which writes its Arrow file, timed without and with
`load_dataset`, which first turns the JSON lines into Arrow. They take turns,
each turn in a process of its own that may use one core; no length filter on
either side.

Memory: the largest resident set of the process, and of it and its workers
together, for 100 MB and for 1 GB of JSON lines, with --memory.

  python benchmarks/prepare_corpus.py --turns 3
  python benchmarks/prepare_corpus.py --memory
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import pathlib
import re
import resource
import statistics
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator

from codet5p_jax.corpus.build import CorpusSettings, build_corpus
from codet5p_jax.corpus.executors import Processes
from codet5p_jax.corpus.provision import with_vocabulary
from codet5p_jax.data.vocabularies import SentencePiece, load_vocabulary

VOCAB_SIZE = 8192
ANY_LENGTH = {'min_tokens': 1, 'max_tokens': 10**9}


def library_texts() -> Iterator[tuple[str, str]]:
  """The interpreter's library over and over, with other words each time."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  paths = [p for p in sorted(root.rglob('*.py')) if p.stat().st_size < 2**19]
  files = []
  for path in paths:
    try:
      files.append((path.relative_to(root).parts[0], path.read_text()))
    except UnicodeDecodeError:
      continue  # Tests of Python's parser.
  letters = 'abcdefghijklmnopqrstuvwxyz'
  word = re.compile(r'\b[a-df-hj-np-z][a-z_]{4,}\b')
  for time_ in range(10**6):
    suffix = letters[time_ % 26] + letters[time_ // 26]
    for name, text in files:
      if time_:
        text = word.sub(rf'\g<0>_{suffix}', text)
      yield f'{name}-{suffix}', text


def write_rows(path: pathlib.Path, size: int) -> None:
  """Writes about `size` bytes of JSON lines."""
  with open(path, 'w', encoding='utf-8') as file:
    for origin, text in library_texts():
      file.write(json.dumps({'text': text, 'origin': origin}) + '\n')
      if file.tell() >= size:
        return


def our_side(rows: str, vocabulary_dir: str, folder: str) -> dict[str, float]:
  vocabulary = load_vocabulary(vocabulary_dir)
  settings = with_vocabulary(CorpusSettings((rows,), **ANY_LENGTH), vocabulary)
  begin = time.process_time()
  metadata = build_corpus(
      settings, pathlib.Path(folder, 'corpus'), vocabulary, Processes(1)
  )
  return {
      'seconds': time.process_time() - begin,
      'tokens': sum(metadata['tokens'].values()),
  }


def datasets_side(
    rows: str, vocabulary_dir: str, folder: str
) -> dict[str, float]:
  import datasets
  import sentencepiece

  datasets.disable_progress_bars()
  processor = sentencepiece.SentencePieceProcessor(
      model_file=f'{vocabulary_dir}/sentencepiece.model'
  )
  begin = time.process_time()
  loaded = datasets.load_dataset(
      'json', data_files=rows, split='train', cache_dir=folder
  )
  loading = time.process_time() - begin
  begin = time.process_time()
  mapped = loaded.map(
      lambda batch: {'ids': processor.encode(batch['text'], num_threads=1)},
      batched=True,
      num_proc=None,  # In this process; 1 would start another.
      remove_columns=loaded.column_names,
  )
  seconds = time.process_time() - begin
  lengths = mapped.with_format('numpy')['ids']
  return {
      'seconds': seconds,
      'loading': loading,
      'tokens': sum(len(ids) for ids in lengths),
  }


def turn(side, queue, core: int, arguments) -> None:
  """Runs in a process of its own, on one core."""
  os.sched_setaffinity(0, {core})
  os.environ['HF_DATASETS_OFFLINE'] = '1'
  with tempfile.TemporaryDirectory() as folder:
    queue.put(side(*arguments, folder))


def measure_speed(size: int, turns: int) -> None:
  context = multiprocessing.get_context('spawn')
  core = max(os.sched_getaffinity(0))
  ratios, ratios_with_loading = [], []
  with tempfile.TemporaryDirectory() as folder:
    rows = pathlib.Path(folder, 'rows.jsonl')
    write_rows(rows, size)
    texts = (json.loads(line)['text'] for line in open(rows))
    first = (text for text, _ in zip(texts, range(400), strict=False))
    vocabulary_dir = os.path.join(folder, 'vocabulary')
    SentencePiece.train(first, VOCAB_SIZE).save(vocabulary_dir)
    for number in range(turns):
      found = {}
      for side in (our_side, datasets_side):
        queue = context.Queue()
        process = context.Process(
            target=turn, args=(side, queue, core, (str(rows), vocabulary_dir))
        )
        process.start()
        found[side] = queue.get(timeout=1800)
        process.join()
      ours, theirs = found[our_side], found[datasets_side]
      speed = ours['tokens'] / ours['seconds']
      other = theirs['tokens'] / theirs['seconds']
      with_loading = theirs['tokens'] / (theirs['seconds'] + theirs['loading'])
      ratios.append(speed / other)
      ratios_with_loading.append(speed / with_loading)
      print(
          f'turn {number}: prepare_corpus {speed:,.0f} tokens/s, datasets.map '
          f'{other:,.0f} (with load_dataset {with_loading:,.0f})',
          flush=True,
      )
  print(
      f'ratio {statistics.median(ratios):.2f}, with load_dataset '
      f'{statistics.median(ratios_with_loading):.2f}'
  )


def build_and_watch(size: int, queue) -> None:
  """Builds a corpus of `size` bytes; tells the largest resident sets."""
  largest = [0]
  is_done = threading.Event()

  def watch():
    while not is_done.wait(0.2):
      largest[0] = max(largest[0], family_bytes(os.getpid()))

  with tempfile.TemporaryDirectory() as folder:
    rows = pathlib.Path(folder, 'rows.jsonl')
    write_rows(rows, size)
    threading.Thread(target=watch, daemon=True).start()
    begin = time.perf_counter()
    metadata = build_corpus(
        CorpusSettings((str(rows),)), pathlib.Path(folder, 'corpus')
    )
    seconds = time.perf_counter() - begin
    is_done.set()
  usage = [
      resource.getrusage(who)
      for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  ]
  queue.put({
      'seconds': seconds,
      'cpu': sum(u.ru_utime + u.ru_stime for u in usage),
      'process': usage[0].ru_maxrss * 1024,
      'together': largest[0],
      'tokens': sum(metadata['tokens'].values()),
  })


def family_bytes(process: int) -> int:
  """The resident set of a process and its descendants."""
  total = 0
  try:
    status = pathlib.Path(f'/proc/{process}/status').read_text()
    total += 1024 * int(re.search(r'VmRSS:\s+(\d+)', status)[1])
    children = pathlib.Path(f'/proc/{process}/task/{process}/children')
    for child in children.read_text().split():
      total += family_bytes(int(child))
  except (OSError, TypeError):
    pass  # It ended.
  return total


def measure_memory() -> None:
  context = multiprocessing.get_context('spawn')
  found = []
  for size in (10**8, 10**9):
    queue = context.Queue()
    process = context.Process(target=build_and_watch, args=(size, queue))
    process.start()
    found.append(queue.get(timeout=3600))
    process.join()
    numbers = found[-1]
    print(
        f'{size / 1e6:.0f} MB: {numbers["seconds"]:.0f} s, '
        f'{numbers["cpu"]:.0f} CPU s, at most {numbers["process"] / 1e6:.0f} '
        f'MB in the process, '
        f'{numbers["together"] / 1e6:.0f} MB together',
        flush=True,
    )
  print(f'ratio {found[1]["together"] / found[0]["together"]:.2f}')


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--turns', type=int, default=3)
  parser.add_argument('--megabytes', type=float, default=20)
  parser.add_argument('--memory', action='store_true')
  arguments = parser.parse_args()
  if arguments.memory:
    measure_memory()
  elif importlib.util.find_spec('datasets') is None:
    print('Skipped: the library datasets is not installed.')
  else:
    measure_speed(int(arguments.megabytes * 1e6), arguments.turns)


if __name__ == '__main__':
  main()
