import pytest

from codet5p_jax.corpus.licences import (
    ALLOWED,
    is_allowed,
    join_licences,
    normalise_licence,
)


@pytest.mark.parametrize(
    ('text', 'licence'),
    [
        ('MIT', 'mit'),
        ('mit license', 'mit'),
        ('The MIT License (MIT)', 'mit'),
        ('Expat license', 'mit'),
        ('Apache 2.0', 'apache-2.0'),
        ('Apache-2.0', 'apache-2.0'),
        ('Apache License 2.0', 'apache-2.0'),
        ('Apache License, Version 2.0', 'apache-2.0'),
        ('Apache Software License', 'apache-2.0'),
        ('License :: OSI Approved :: Apache Software License', 'apache-2.0'),
        ('License :: OSI Approved :: BSD License', 'bsd-3-clause'),
        ('New BSD License', 'bsd-3-clause'),
        ('3-Clause BSD License', 'bsd-3-clause'),
        ('BSD-3-Clause', 'bsd-3-clause'),
        ('BSD 2-Clause License', 'bsd-2-clause'),
        ('License :: OSI Approved :: ISC License (ISCL)', 'isc'),
        ('License :: OSI Approved :: The Unlicense (Unlicense)', 'unlicense'),
        ('License :: CC0 1.0 Universal (CC0 1.0) Public Domain Dedication',
         'cc0-1.0'),
        ('License :: OSI Approved :: Python Software Foundation License',
         'psf-2.0'),
        ('PSF-2.0', 'psf-2.0'),
        ('', 'unknown'),
        ('UNKNOWN', 'unknown'),
        ('License :: OSI Approved', 'unknown'),
        # Of npm: proprietary, not the Unlicense.
        ('UNLICENSED', 'unlicensed'),
        ('LGPL-2.1-or-later', 'lgpl-2.1-or-later'),
        ('MIT/Apache-2.0', 'mit or apache-2.0'),
        ('MIT OR (Apache-2.0 AND BSD-2-Clause)',
         'mit or (apache-2.0 and bsd-2-clause)'),
        ('Apache-2.0 WITH LLVM-exception', 'apache-2.0 with llvm-exception'),
        ('Copyright (c) A\n\nPermission is hereby granted, free of charge, to '
         'any person obtaining a copy of this software and', 'mit'),
        ('Redistribution and use in source and binary forms, with or without '
         'modification, are permitted: Neither the name of', 'bsd-3-clause'),
    ],
)  # fmt: skip
def test_each_licence_has_one_spelling(text, licence):
  assert normalise_licence(text) == licence
  # It is its own.
  assert normalise_licence(licence) == licence


def test_a_long_text_that_nobody_knows_is_no_allowed_licence():
  assert not is_allowed(normalise_licence('All rights reserved. ' * 9), ALLOWED)


@pytest.mark.parametrize(
    ('licence', 'expected'),
    [
        ('unknown', True),
        ('mit', True),
        ('gpl-3.0', False),
        ('gpl-3.0 or mit', True),
        ('gpl-3.0 and mit', False),
        ('mit and isc', True),
        # AND binds closer.
        ('mit or isc and gpl-3.0', True),
        ('(mit or isc) and gpl-3.0', False),
        ('gpl-3.0 and (mit or isc)', False),
        ('isc and (mit or gpl-3.0)', True),
        ('apache-2.0 with llvm-exception', True),
        ('apache-2.0 with llvm-exception and gpl-2.0', False),
        ('gpl-2.0 with classpath-exception', False),
        # What is no expression.
        ('mit style', False),
        ('mit or', False),
        ('(mit', False),
    ],
)
def test_one_of_alternatives_suffices_and_all_of_a_sum_are_needed(
    licence, expected
):
  assert is_allowed(licence, ALLOWED) == expected


def test_licences_that_all_hold_are_one_expression():
  assert join_licences(['MIT', 'unknown', 'mit', 'ISC']) == 'isc and mit'
  assert join_licences(['MIT OR GPL-2.0', 'ISC']) == 'isc and (mit or gpl-2.0)'
  assert join_licences([]) == 'unknown'
