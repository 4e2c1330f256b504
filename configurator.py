"""Python-file configs and --key=value over a script's defaults, nanoGPT style, but typed and loud.

In: a dict of defaults (one default in one place) and the command line. Out: a dict with the same
keys. A config file is Python and is executed, so run only your own. Every name that it sets must be
a known key, unless it starts with an underscore.

    python train.py configs/toy.py --max_steps=100 --fpn_stages 1,2,3,4
"""

import ast
import difflib
import os
import runpy
import sys

from formats import reading


def parse(text, want):
    """The value that a text on a command line stands for; value_of sees whether it is a `want`.

    Where a tuple is wanted "1,2,3", "(1,2,3)" and "car,bike" are lists, "3" alone is a list of one.
    """
    if want is str:
        return os.path.expanduser(text)  # a shell leaves the ~ of --out_dir=~/runs
    literal = text
    if want is bool:
        literal = text.title()
    if want is tuple:
        literal = f"[{text.strip('()[] ')}]"
    try:
        return ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        if want is tuple:
            return [word.strip() for word in text.split(",")]
        return text


def value_of(key, value, defaults):
    """`value`, if `key` is known and the value has the type of its default; ints widen to floats.

    Elements of a tuple have the type of the first in its default.
    ValueError names an unknown key, with the nearest known one, or a value of another type.
    """
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(defaults))}"
        raise ValueError(f"unknown key {key!r}; {hint}")
    default = defaults[key]
    want = type(default)
    if (type(value), want) in ((int, float), (list, tuple)):
        value = want(value)
    if type(value) is not want:
        raise ValueError(f"{key}={value!r} is no {want.__name__} like {default!r}")
    if want is tuple and default and isinstance(default[0], str):
        value = tuple(map(str, value))  # a name may be a number
    elif want is tuple and default:
        value = tuple(value_of(key, x, {key: default[0]}) for x in value)
    if want is float and not abs(value) < 1e99:
        raise ValueError(f"{key}={value!r} is no finite number")
    return value


def configure(defaults, argv):
    """Overridden copy of `defaults`: files, --key=value and --key value apply in order of argv.

    A file may compute with what came before it. ValueError: a file that is missing or fails, an
    unknown key, a wrong type, a missing value.
    """
    config = dict(defaults)
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(f"{sys.modules['__main__'].__doc__}\nkeys and defaults:\n{dump(defaults)}")
            sys.exit()
        if not word.startswith("--"):
            if not word.endswith(".py"):
                raise ValueError(f"{word}: no config NAME.py (options are --KEY=VALUE)")
            with reading(f"{word}: this config fails"):
                names = runpy.run_path(word, config)
            with reading(f"{word} (helpers have names like _this)"):
                for key, value in names.items():
                    if not key.startswith("_"):
                        config[key] = value_of(key, value, defaults)
            continue

        key, equals, text = word[2:].partition("=")
        want = type(defaults.get(key, ""))
        if not equals:
            if words and not words[0].startswith("--"):
                text = words.pop(0)  # the value is the next word
            elif want is bool:
                text = "True"
            elif key in defaults:
                raise ValueError(f"--{key} has no value; write --{key}=VALUE")
        config[key] = value_of(key, parse(text, want), defaults)
    return config


def dump(config):
    """The config as Python source that `configure` reads back."""
    return "".join(f"{key} = {value!r}\n" for key, value in config.items())


def command_line(main):
    """Run main(argv). A mistake (ValueError, OSError, full memory) ends in one line.

    Ctrl-C ends in status 130.
    """
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        # torch says "can't allocate memory" on a CPU, "Tried to allocate" on a GPU
        known = isinstance(error, (ValueError, OSError, MemoryError))
        if not known and "allocate" not in repr(error):
            raise
        sys.exit("error: " + " ".join(str(error).split()))
