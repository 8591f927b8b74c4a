"""A plain reading of span-denoising examples, back to the rows."""


def spans(source, target, ids):
  """The hidden tokens of each sentinel: [[token, ...], ...], in order."""
  source, target = source.tolist(), target.tolist()
  if ids.bos is not None:
    assert source.pop(0) == target.pop(0) == ids.bos
  assert source[-1] == target.pop() == ids.eos
  found = []
  for token in target:
    if token in ids.sentinels:
      # In order, and each stands once in the source.
      assert token == ids.sentinels[len(found)]
      assert source.count(token) == 1
      found.append([])
    else:
      found[-1].append(token)
  assert all(found)
  return found


def row(source, found, ids):
  """The row: the source with each sentinel replaced by what it hides."""
  kept = source.tolist()[0 if ids.bos is None else 1 : -1]
  result = []
  for token in kept:
    is_sentinel = token in ids.sentinels
    result += found[ids.sentinels.index(token)] if is_sentinel else [token]
  return result


def places(source, found, ids):
  """(first token in the row, hidden tokens) of each span."""
  kept = source.tolist()[0 if ids.bos is None else 1 : -1]
  position, result = 0, []
  for token in kept:
    if token in ids.sentinels:
      span = found[ids.sentinels.index(token)]
      result.append((position, span))
      position += len(span)
    else:
      position += 1
  return result
