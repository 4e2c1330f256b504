"""Python-file configs and --key=value over a script's defaults, nanoGPT style, but typed and loud.

In: a dict of defaults (one default in one place) and the command line. Out: a dict with the same keys.
A config file is Python and is executed, so run only your own. Every name that it sets must be a known key,
unless it starts with an underscore.

    python train.py configs/toy.py --max_steps=100 --fpn_stages 1,2,3,4
"""

import ast
import difflib
import importlib
import os
import sys


def literal(text, default):
    """Value of a command-line text, read as the type of `default`: a tuple also as comma-separated words."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.title() if text.lower() in ("true", "false") else text or "()")
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, tuple) and not isinstance(value, (tuple, list)):
        value = tuple(word.strip() for word in text.split(",")) if isinstance(value, str) else (value,)
    return value


def checked(key, value, defaults, where):
    """Value for `key`, ints widened to floats and lists to tuples; ValueError names an unknown key or a wrong type."""
    if key not in defaults:
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(defaults))}"
        raise ValueError(f"{where}: unknown key {key!r}; {hint}")
    want = type(defaults[key])
    if want is float and type(value) is int:
        value = float(value)
    if want is tuple and type(value) is list:
        value = tuple(value)
    if type(value) is not want:
        raise ValueError(f"{where}: {key}={value!r} is a {type(value).__name__}, expected a {want.__name__} "
                         f"like {defaults[key]!r}")
    return value


def configure(defaults, argv):
    """Overridden copy of `defaults`: config files and --key=value / --key value apply in the order of `argv`.

    ValueError: a file that is missing or fails, an unknown key (the nearest known one is named), a wrong type.
    """
    config, argv = dict(defaults), list(argv)
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            sys.exit(f"{sys.modules['__main__'].__doc__}\nkeys and defaults:\n{dump(defaults)}")
        if not word.startswith("--"):
            if not os.path.isfile(word):
                raise ValueError(f"{word}: no such config file; options are written --key=value")
            names = dict(config)  # a file may compute with what is set so far
            try:
                with open(word, encoding="utf-8") as file:
                    exec(compile(file.read(), word, "exec"), names)
            except Exception as error:
                raise ValueError(f"{word}: this config file fails with {type(error).__name__}: {error}") from error
            for key, value in names.items():
                if not key.startswith("_") and (key not in config or value is not config[key]):
                    config[key] = checked(key, value, defaults, word)
            continue
        key, given, text = word[2:].partition("=")
        if key in defaults and not given and (not argv or argv[0].startswith("--")):
            if not isinstance(defaults[key], bool):
                raise ValueError(f"command line: --{key} has no value; write --{key}=VALUE")
            text = "True"
        elif key in defaults and not given:
            text = argv.pop(0)
        config[key] = checked(key, literal(text, defaults.get(key, "")), defaults, "command line")
    return config


def dump(config):
    """The config as Python source that `configure` reads back."""
    return "".join(f"{key} = {value!r}\n" for key, value in config.items())


def optional(package, what):
    """The module of an optional package; ValueError says what needs it and how to install it."""
    try:
        return importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ValueError(f"{what} needs a package: pip install {package} ({error})") from error


def command_line(main):
    """Run main(argv); a user's mistake (ValueError, OSError) ends in one line. NANORVT_TRACEBACK=1 shows where."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        if os.environ.get("NANORVT_TRACEBACK"):
            raise
        sys.exit("error: " + " ".join(str(error).split()))
