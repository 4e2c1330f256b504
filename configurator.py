"""Python-file configs and --key=value over a script's defaults, nanoGPT style, but typed and loud.

In: a dict of defaults (one default in one place) and the command line. Out: a dict with the same keys.
A config file is Python and is executed, so run only your own. Every name that it sets must be a known key,
unless it starts with an underscore.

    python train.py configs/toy.py --max_steps=100 --fpn_stages 1,2,3,4
"""

import ast
import difflib
import os
import runpy
import sys
from contextlib import suppress

from formats import reading, require


def value_of(key, value, defaults, where, text=False):
    """Value for `key`, of the type of its default: ints widen to floats; from `text`, words with commas make a tuple.

    ValueError names an unknown key, with the nearest known one, or a value of another type.
    """
    near = difflib.get_close_matches(key, defaults, n=1) or ["one of the known keys", *sorted(defaults)]
    require(key in defaults, f"{where}: unknown key {key!r}; did you mean {', '.join(near)}?")
    want, given = type(defaults[key]), value
    if text and want is not str:
        with suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.title() if value.lower() in ("true", "false") else value or "()")
        if want is tuple and not isinstance(value, (tuple, list)):
            value = tuple(word.strip() for word in value.split(",")) if isinstance(value, str) else (value,)
    value = want(value) if (type(value), want) in ((int, float), (list, tuple)) else value
    fine = type(value) is want and (want is not float or abs(value) < 1e99)
    require(fine, f"{where}: {key}={given!r} is no {want.__name__} like {defaults[key]!r}")
    return value


def configure(defaults, argv):
    """Overridden copy of `defaults`: config files and --key=value / --key value apply in the order of `argv`.

    ValueError: a file that is missing or fails, an unknown key, a wrong type, a value that is missing.
    """
    config, argv = dict(defaults), list(argv)
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            sys.exit(f"{sys.modules['__main__'].__doc__}\nkeys and defaults:\n{dump(defaults)}")
        if word.startswith("--"):
            key, given, text = word[2:].partition("=")
            if key in defaults and not given:
                alone = not argv or argv[0].startswith("--")
                require(isinstance(defaults[key], bool) or not alone, f"--{key} has no value; write --{key}=VALUE")
                text = "True" if alone else argv.pop(0)
            config[key] = value_of(key, text, defaults, "command line", text=True)
            continue
        with reading(f"{word}: this config fails (options are --KEY=VALUE)"):
            names = runpy.run_path(word, config)  # a file may compute with what is set so far
        changed = {key: value for key, value in names.items() if key[0] != "_" and value is not config.get(key, names)}
        config |= {key: value_of(key, value, defaults, word) for key, value in changed.items()}
    return config


def dump(config):
    """The config as Python source that `configure` reads back."""
    return "".join(f"{key} = {value!r}\n" for key, value in config.items())


def command_line(main):
    """Run main(argv); a user's mistake (ValueError, OSError, full memory) ends in one line, Ctrl-C in status 130.

    NANORVT_TRACEBACK=1 shows where the mistake was found.
    """
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if os.getenv("NANORVT_TRACEBACK") or not (isinstance(e, (ValueError, OSError)) or "allocate" in repr(e)):
            raise
        sys.exit("error: " + " ".join(str(e).split()))
