import gzip
import io
import json
import tarfile
import zipfile

import pytest

from codet5p_jax.corpus.archives import read_archive
from codet5p_jax.corpus.filters import MAX_FILE_BYTES, Dropped
from codet5p_jax.corpus.source_files import SourceFile
from codet5p_jax.corpus.units import Unit
from codet5p_jax.errors import UserError

FILES = {
    'pkg-1.0/README.md': b'# Hello',
    'pkg-1.0/a.py': b'a = 1\r\n',
    'pkg-1.0/src/b.cc': 's = "\u00e9";\n'.encode(),
    'pkg-1.0/vendor/c.py': b'c = 3\n',
    'pkg-1.0/big.js': b'x' * (MAX_FILE_BYTES + 1),
    'pkg-1.0/bin.c': b'a\0b',
    'pkg-1.0/z.py': b'z = 1\n',
}
NAMES = ['p.zip', 'p.whl', 'p.tar', 'p.tar.gz', 'p.tgz', 'p.tar.bz2',
         'p.tar.xz']  # fmt: skip


def pack(path, files):
  """Packs {path: content} into an archive of the kind that its name says."""
  if path.suffix in ('.zip', '.whl'):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
      archive.mkdir('pkg-1.0')
      for name, content in files.items():
        archive.writestr(name, content)
    return path
  kind = {'.gz': 'gz', '.tgz': 'gz', '.bz2': 'bz2', '.xz': 'xz'}
  with tarfile.open(path, f'w:{kind.get(path.suffix, "")}') as archive:
    folder = tarfile.TarInfo('pkg-1.0')
    folder.type = tarfile.DIRTYPE
    archive.addfile(folder)
    link = tarfile.TarInfo('pkg-1.0/link.py')
    link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
    archive.addfile(link)
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return path


def read(path):
  unit = Unit('archive', str(path), path.stat().st_size, origin='pkg')
  return list(read_archive(unit))


@pytest.mark.parametrize('name', NAMES)
def test_every_kind_of_archive_is_read_in_its_order(tmp_path, name):
  assert read(pack(tmp_path / name, FILES)) == [
      SourceFile('a = 1\r\n', 'python', 'unknown', 'pkg', 'pkg-1.0/a.py'),
      SourceFile(
          's = "\u00e9";\n', 'cpp', 'unknown', 'pkg', 'pkg-1.0/src/b.cc'
      ),
      Dropped('vendored', 'python'),
      Dropped('oversized', 'javascript'),
      Dropped('binary', 'c'),
      SourceFile('z = 1\n', 'python', 'unknown', 'pkg', 'pkg-1.0/z.py'),
  ]


def test_a_name_that_is_not_utf_8_is_shown_as_far_as_it_can_be(tmp_path):
  path = pack(tmp_path / 'p.tar', {'p/\udcff.py': b'a = 1\n'})
  assert read(path)[0].path == 'p/?.py'


@pytest.mark.parametrize('name', ['p.whl', 'p.tgz'])
@pytest.mark.parametrize(
    ('path', 'content', 'licence'),
    [
        ('p-1.dist-info/METADATA', 'Name: p\nLicense-Expression: ISC\n', 'isc'),
        ('pkg-1.0/PKG-INFO',
         'Name: p\nClassifier: License :: OSI Approved :: MIT License\n',
         'mit'),
        ('package/package.json', '{"license": "(MIT OR GPL-3.0)"}',
         '(mit or gpl-3.0)'),
        ('package/package.json', '{"license": {"type": "MIT"}}', 'mit'),
        ('package/package.json',
         '{"licenses": [{"type": "MIT"}, {"type": "ISC"}]}', 'isc and mit'),
        ('package/package.json', '{"license": ', 'unknown'),
        ('package/package.json', '[]', 'unknown'),
        ('package/node_modules/x/package.json', '{"license": "MIT"}',
         'unknown'),
    ],
)  # fmt: skip
def test_the_licence_stands_in_the_archive(
    tmp_path, name, path, content, licence
):
  # It may come after the source.
  files = {
      'pkg-1.0/a.py': b'a = 1\n',
      'pkg-1.0/deep/down/package.json': b'{"licence": "none"}',
      path: content.encode(),
  }
  [file] = read(pack(tmp_path / name, files))
  assert file.licence == licence


def expect_damage(path, match='expected a whole archive in '):
  with pytest.raises(UserError, match=match) as error:
    read(path)
  assert str(path) in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('share', [0, 0.3, 0.7, 0.9])
def test_an_archive_that_is_cut_short_is_one_clear_line(tmp_path, name, share):
  files = {f'p/{i}.py': json.dumps([i * j * 7919 % 10007 for j in range(300)])
           .encode() for i in range(40)}  # fmt: skip
  path = pack(tmp_path / name, files)
  content = path.read_bytes()
  path.write_bytes(content[: int(share * len(content))])
  expect_damage(path)


@pytest.mark.parametrize('at', ['header', 'member', 'border'])
def test_a_tar_that_ends_too_early_is_no_whole_tar(tmp_path, at):
  """At each of these tarfile itself would silently stop."""
  path = pack(tmp_path / 'p.tar', {'p/a.py': b'a = 1\n', 'p/b.py': b'b = 2\n'})
  # A folder, a link, then a header and a block for each file.
  end = {'header': 2 + 2 + 0.5, 'member': 2 + 3 - 0.1, 'border': 2 + 2}[at]
  path.write_bytes(path.read_bytes()[: int(512 * end)])
  expect_damage(path)


def test_a_tar_with_a_damaged_header_is_one_clear_line(tmp_path):
  path = pack(tmp_path / 'p.tar', {'p/a.py': b'a = 1\n', 'p/b.py': b'b = 2\n'})
  content = bytearray(path.read_bytes())
  content[512 * 4 + 3] ^= 1
  path.write_bytes(content)
  expect_damage(path)


def test_a_zip_with_a_damaged_file_is_one_clear_line(tmp_path):
  path = pack(tmp_path / 'p.zip', {'p/a.py': b'a = 1\n' * 9})
  content = bytearray(path.read_bytes())
  content[content.index(b'p/a.py') + 9] ^= 0xFF
  path.write_bytes(content)
  expect_damage(path)


@pytest.mark.parametrize('name', ['p.tar.gz', 'p.tar.xz', 'p.zip'])
def test_a_bomb_is_one_clear_line(tmp_path, name):
  path = pack(tmp_path / name, {'p/a.txt': bytes(80 * 2**20)})
  expect_damage(path, 'at most 250 times its size, found more in ')


def test_a_bomb_behind_the_end_of_the_tar_is_one_clear_line(tmp_path):
  path = pack(tmp_path / 'p.tgz', {'p/a.py': b'a = 1\n'})
  content = gzip.decompress(path.read_bytes())
  path.write_bytes(gzip.compress(content + bytes(80 * 2**20)))
  expect_damage(path, 'at most 250 times its size, found more in ')


def test_what_is_well_packed_but_small_is_no_bomb(tmp_path):
  path = pack(tmp_path / 'p.tgz', {'p/a.txt': bytes(30 * 2**20), **FILES})
  assert len(read(path)) == 6
