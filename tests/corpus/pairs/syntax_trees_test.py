"""What is extracted by grammars: all languages but Python."""

import pytest

from codet5p_jax.corpus.pairs.extraction import Pair
from tests.corpus.pairs.extracting import extract

JAVASCRIPT = '''\
#!/usr/bin/env node
/** Not a function but a variable. */
const é = "é€";

/**
 * Adds two numbers.
 *
 * @param {number} a one
 */
export async function add(a, b) {
  // What stays.
  return a + b;
}

/** Is far above it. */

function far() {
  return 1;
}

/**
 * Doubles what
 * it is given.
 * @returns {number}
 */
const double = (x) => {
  return 2 * x;
};

/** Declares two of them. */
let one = function () {
  return 1;
}, two = function () {
  return 2;
};

class A {
\t/** Makes one of them. */
\tconstructor() {
\t\tthis.x = 1;
\t}

\t/** Gives the é it has. */
\t@decorated
\tstatic get value() {
\t\t/** Is nested in it. */
\t\tfunction inner() {
\t\t\treturn 1;
\t\t}
\t\treturn inner();
\t}

\t/** Holds on to this. */
\thandle = async () => {
\t\treturn 1;
\t};
}

// Is no documentation at all.
A.prototype.plain = function () {
  return 1;
};

/** Yields what there is. */
exports.all = A.prototype.all = function* () {
  yield 1;
};

module.exports = {
  /** Says the é aloud. */
  'say': function () {
    return "é";
  },
  /** Is a short method. */
  tiny() { return 1; },
  /** Tests that it works. */
  testIt() {
    return 1;
  },
};
'''


def test_functions_of_javascript_are_paired_with_jsdoc():
  assert extract('javascript', JAVASCRIPT) == [
      Pair(
          'Adds two numbers.',
          'export async function add(a, b) {\n  // What stays.\n'
          '  return a + b;\n}',
          'add',
      ),
      'undocumented',  # far
      Pair(
          'Doubles what it is given.',
          'const double = (x) => {\n  return 2 * x;\n};',
          'double',
      ),
      'undocumented',  # one
      'undocumented',  # two
      'special_method',
      Pair(
          'Gives the é it has.',
          '@decorated\nstatic get value() {\n\t/** Is nested in it. */\n'
          '\tfunction inner() {\n\t\treturn 1;\n\t}\n\treturn inner();\n}',
          'value',
      ),
      Pair(
          'Holds on to this.',
          'handle = async () => {\n\treturn 1;\n}',
          'handle',
      ),
      'undocumented',  # plain
      Pair(
          'Yields what there is.',
          'exports.all = A.prototype.all = function* () {\n  yield 1;\n};',
          'all',
      ),
      Pair(
          'Says the é aloud.',
          '\'say\': function () {\n  return "é";\n}',
          'say',
      ),
      'short_code',
      'test',
  ]


GO = '''\
// Package é does things.
package é

var x = 1 // Not about the function.
func next(a int) int {
\treturn a + 1
}

// Add adds é to a number.
// It is quick.
//
// But not that quick.
//go:noinline
func Add(a, b int) (int, error) {
\tf := func() int {
\t\treturn a
\t}
\treturn f() + b, nil // What stays.
}

/* Sub is not said by lines. */
func Sub(a int) int {
\treturn a - 1
}

// Scale scales the vector.
func (v *Vector) Scale(by float64) {
\tv.x *= by
}

// String says what it is.
func (v *Vector) String() string {
\treturn v.name
}

// external is written elsewhere in assembly.
func external(a int) int

// TestAdd tests the above.
func TestAdd(t *testing.T) {
\tt.Log("é")
}
'''


def test_functions_of_go_are_paired_with_the_lines_above():
  assert extract('go', GO) == [
      'undocumented',
      Pair(
          'Add adds é to a number. It is quick.',
          'func Add(a, b int) (int, error) {\n\tf := func() int {\n'
          '\t\treturn a\n\t}\n\treturn f() + b, nil // What stays.\n}',
          'Add',
      ),
      'undocumented',
      Pair(
          'Scale scales the vector.',
          'func (v *Vector) Scale(by float64) {\n\tv.x *= by\n}',
          'Scale',
      ),
      'special_method',
      'short_code',
      'test',
  ]


JAVA = '''\
package é;

/** A class is no function. */
public class Box<T> {
    String s = "é";

    /** A field is no method. */
    Runnable r = () -> {
        return;
    };

    /** Makes one of them. */
    public Box() {
        super();
    }

    /**
     * Gives the first
     * of all {@code items}.
     *
     * <p>More of it.
     *
     * @param items all
     */
    @Override
    @Deprecated(since = "é")
    public <U> T first(List<U> items) {
        // What stays.
        return items.get(0);
    }

    /** Gives the first of two. */
    public T first(T one, T two) {
        return one;
    }

    /** Must be written below. */
    protected abstract void write(
        String name,
        int size
    );

    /* Is not of Javadoc's kind. */
    void plain() {
        return;
    }

    /** Says what it is. */
    public String toString() {
        return s;
    }

    /** Runs what it is given. */
    static void run() {
        new Thread() {
            /** Is nested in it. */
            public void run() {
                go();
            }
        };
    }

    interface Inner {
        /** Is there by default. */
        default int size() {
            return 1;
        }
    }

    record Point(int x) {
        /** Looks at it first. */
        Point {
            check(x);
        }
    }
}
'''


def test_methods_of_java_are_paired_with_javadoc():
  assert extract('java', JAVA) == [
      'special_method',
      Pair(
          'Gives the first of all {@code items}.',
          '@Override\n@Deprecated(since = "é")\n'
          'public <U> T first(List<U> items) {\n    // What stays.\n'
          '    return items.get(0);\n}',
          'first',
      ),
      Pair(
          'Gives the first of two.',
          'public T first(T one, T two) {\n    return one;\n}',
          'first',
      ),
      'short_code',
      'undocumented',
      'special_method',
      Pair(
          'Runs what it is given.',
          'static void run() {\n    new Thread() {\n'
          '        /** Is nested in it. */\n        public void run() {\n'
          '            go();\n        }\n    };\n}',
          'run',
      ),
      Pair(
          'Is there by default.',
          'default int size() {\n    return 1;\n}',
          'size',
      ),
      'special_method',
  ]


PHP = '''\
<p>é</p>
<?php
namespace A;

/**
 * Finds the é
 * in a text.
 *
 * @param string $text where
 */
#[Pure]
function find(string $text): ?int {
    # What stays.
    $f = function () { return 1; };
    return $f();
}

/** A variable is no function. */
$f = function () {
    return 1;
};

// Is no block of documentation.
function line() {
    return 1;
}

abstract class B extends C {
    /** Makes one of them. */
    public function __construct() {
        $this->x = 1;
    }

    /** Calls what is not there. */
    public function __call($name, $arguments) {
        return null;
    }

    /** {@inheritdoc} */
    public function inherited() {
        return null;
    }

    /** Is written further below. */
    abstract protected function below(
        int $x,
        int $y
    );

    /** Counts all of them. */
    final public static function count(): int {
        return 1;
    }
}
'''


def test_functions_of_php_are_paired_with_phpdoc():
  assert extract('php', PHP) == [
      Pair(
          'Finds the é in a text.',
          '#[Pure]\nfunction find(string $text): ?int {\n'
          '    # What stays.\n    $f = function () { return 1; };\n'
          '    return $f();\n}',
          'find',
      ),
      'undocumented',
      'special_method',
      'special_method',
      'short_documentation',
      'short_code',
      Pair(
          'Counts all of them.',
          'final public static function count(): int {\n    return 1;\n}',
          'count',
      ),
  ]


RUBY = '''\
# frozen_string_literal: true

module É
  class Box
    # Opens the é box.
    # It is quick.
    #
    # @param by [String] whom
    def open(by)
      # What stays.
      "#{by} é"
    end

    x = 1 # Not about the method.
    def next
      @next
    end

    # Makes one of them.
    def initialize(x)
      @x = x
    end

    # Compares it with another.
    def ==(other)
      @x == other.x
    end

    # Is for itself alone.
    private def own?
      def nested
        1
      end
      true
    end

    class << self
      ## Builds it from parts.
      def build!(*parts)
        new(parts)
      end
    end

    # Is of the class.
    def self.all = where(
      1
    )

    # Has nothing in it.
    def nothing
      # Not even here.
    end
  end
end
'''


def test_methods_of_ruby_are_paired_with_the_lines_above():
  assert extract('ruby', RUBY) == [
      Pair(
          'Opens the é box. It is quick.',
          'def open(by)\n  # What stays.\n  "#{by} é"\nend',
          'open',
      ),
      'undocumented',
      'special_method',
      'special_method',
      Pair(
          'Is for itself alone.',
          'private def own?\n  def nested\n    1\n  end\n  true\nend',
          'own?',
      ),
      Pair(
          'Builds it from parts.',
          'def build!(*parts)\n  new(parts)\nend',
          'build!',
      ),
      Pair('Is of the class.', 'def self.all = where(\n  1\n)', 'all'),
      'short_code',
  ]


@pytest.mark.parametrize(
    ('language', 'text'),
    [
        ('javascript', JAVASCRIPT), ('go', GO), ('java', JAVA), ('php', PHP),
        ('ruby', RUBY),
    ],
)  # fmt: skip
def test_windows_files_of_any_language_give_the_same(language, text):
  windows = text.replace('\n', '\r\n')
  assert extract(language, windows) == extract(language, text)


@pytest.mark.parametrize(
    ('language', 'text'),
    [
        ('javascript', '%% <- no code ->'),
        ('go', 'func f( {'),
        ('java', 'class { ='),
        ('php', '<?php function ('),
        ('ruby', 'def def ('),
        ('javascript', '(' * 20_000),
    ],
)
def test_what_no_grammar_knows_is_unparsable(language, text):
  assert extract(language, text) == ['unparsable']


def test_an_error_spoils_its_own_function_alone():
  text = '''\
class A {
  /** Is as it should. */
  int whole() {
    return 1;
  }

  /** Is not as it should. */
  int broken() {
    return 1 1 1;
  }
}
'''
  pair, broken = extract('java', text)
  assert pair.name == 'whole' and broken == 'unparsable'


@pytest.mark.parametrize('language', ['c', 'cpp', 'csharp', 'unknown'])
def test_other_languages_have_no_pairs(language):
  text = '/** Adds two numbers. */\nint f(int a) {\n  return a;\n}\n'
  assert not extract(language, text)
  assert not extract(language, text, documentation='Adds two numbers.')
