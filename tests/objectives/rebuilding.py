"""A plain reading of span-denoising examples, back to the rows."""


def _order(ids):
  """{sentinel: its place among the sentinels}."""
  return {token: place for place, token in enumerate(ids.sentinels)}


def spans(source, target, ids):
  """The hidden tokens of each sentinel: [[token, ...], ...], in order."""
  source, target = source.tolist(), target.tolist()
  if ids.bos is not None:
    assert source.pop(0) == target.pop(0) == ids.bos
  assert source[-1] == target.pop() == ids.eos
  found, order = [], _order(ids)
  for token in target:
    if token in order:
      # In order, and each stands once in the source.
      assert order[token] == len(found)
      assert source.count(token) == 1
      found.append([])
    else:
      found[-1].append(token)
  assert all(found)
  return found


def row(source, found, ids):
  """The row: the source with each sentinel replaced by what it hides."""
  kept = source.tolist()[0 if ids.bos is None else 1 : -1]
  result, order = [], _order(ids)
  for token in kept:
    result += found[order[token]] if token in order else [token]
  return result


def places(source, found, ids):
  """(first token in the row, hidden tokens) of each span."""
  kept = source.tolist()[0 if ids.bos is None else 1 : -1]
  position, result, order = 0, [], _order(ids)
  for token in kept:
    if token in order:
      span = found[order[token]]
      result.append((position, span))
      position += len(span)
    else:
      position += 1
  return result
