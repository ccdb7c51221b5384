"""What the command lines of this folder share: the --config flag, help, and errors as one sentence."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from pixelstory_jax.training.errors import ConfigError, UserError
from pixelstory_jax.training.host_memory import keep_freed_memory

Result = TypeVar("Result")
ROOT = Path(__file__).resolve().parent.parent
FREE_SECTIONS = ("train.learning_rate_multipliers",)  # the names in them are the user's own
TRACEBACK = "PIXELSTORY_TRACEBACK"  # environment variable: 1 shows where an error comes from


def define_config_flag() -> flags.FlagHolder:
    """--config=FILE.py:variant with overrides --config.section.field=value."""
    return config_flags.DEFINE_config_file("config", None, "Config file and variant, as configs/pixellm.py:tiny.")


def run(main: Callable[[], None], usage: str, keep_memory: bool = True) -> None:
    """Parses the flags and runs `main`. Errors of the user end the program with one sentence and exit code 2.

    Args:
      main: the command, without arguments; it reads its flags.
      usage: what --help prints first.
      keep_memory: whether freed memory stays with the process, which is faster where the same sizes come again.
    """

    if keep_memory:
        keep_freed_memory()

    def call(_: list[str]) -> None:
        try:
            main()
        except user_errors() as error:
            _fail(error)

    try:
        app.run(call, flags_parser=lambda argv: _parse_flags(argv, usage))
    except BaseException as error:  # SystemExit for one: there is no other way out of app.run
        processes = sys.modules.get("pixelstory_jax.training.processes")  # whoever has joined others has imported it
        if processes:
            processes.leave(error)
        raise


def user_errors() -> tuple[type[Exception], ...]:
    """Errors that are the user's to mend. That of the data is not imported for this: it waits for jax."""
    data = sys.modules.get("pixelstory_jax.data.pipeline")  # whoever raised its error has imported it
    return (UserError, *([data.DataError] if data else []))


def explain(build: Callable[[], Result]) -> Result:
    """Calls `build`, which reads what the user named; its ValueError or OSError is the user's to mend.

    So is the TypeError of a section of the config that has a field too many or too few. A list of indented lines below
    the sentence stays one.
    """
    try:
        return build()
    except (ValueError, OSError) as error:
        text = str(error)
        is_list = all(line.startswith("  ") for line in text.splitlines()[1:])
        raise UserError(text if is_list else " ".join(text.split())) from error
    except TypeError as error:
        reason = re.search(r"(\w+)\.__init__\(\) ((got an unexpected|missing) .*)", str(error))
        if reason is None:
            raise
        raise ConfigError(f"A section of the config does not fit {reason[1]}: {reason[2]}") from error


def _fail(error: BaseException | str) -> None:
    if os.environ.get(TRACEBACK) == "1" and isinstance(error, BaseException):
        traceback.print_exception(error)
    text = str(error)
    ended = text.endswith((".", "?")) or len(text.splitlines()) > 1  # a list below the sentence
    print(f"Error: {text if ended else text + '.'}", file=sys.stderr, flush=True)
    sys.exit(2)


def _parse_flags(argv: list[str], usage: str) -> list[str]:
    if any(argument in ("-h", "--help", "-help", "--helpfull", "--helpshort") for argument in argv[1:]):
        print(_help(argv[0], usage))
        sys.exit(0)
    try:
        if "config" in flags.FLAGS:
            check_config(argv)
            sys.argv = argv  # config_flags looks for the overrides there
        rest = flags.FLAGS(argv)
        verbosity = flags.FLAGS["verbosity"]
        if verbosity.using_default_value:
            # absl would make it INFO, where Orbax lists every file that it opens.
            verbosity.value, verbosity.using_default_value = logging.WARNING, False
        if len(rest) > 1:
            raise ConfigError(f"Unexpected argument {rest[1]!r}; fields are set as --config.train.steps=50")
        return rest
    except (UserError, flags.Error) as error:
        _fail(" ".join(str(error).split()))
        raise


def check_config(argv: list[str]) -> None:
    """Finds the config file, and checks that it has every overridden field and that the values have its type.

    `argv` is rewritten to what the flags understand: the path of the file by one that exists (as given, or relative to
    the repository), a dict for a section by the fields that it names, names that hold a slash by subscripts.

    Raises:
      ConfigError: one sentence with the nearest right name, or the type that was expected.
    """
    config: ConfigDict | None = None
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name not in ("--config", "-config"):
            continue
        if not equals:
            value = argv[position + 1] if position + 1 < len(argv) else ""
        path, config = load_config(value)
        resolved = f"{path}:{value.split(':', 1)[1]}" if ":" in value else str(path)
        argv[position if equals else position + 1] = f"{name}={resolved}" if equals else resolved
    overrides = [argument for argument in argv if re.match(r"--?(no)?config\.", argument)]
    if config is None:
        if overrides:
            raise ConfigError(f"{overrides[0]} needs --config=FILE before it; {_available()}")
        return
    argv[:] = [new for old in argv for new in (_check_override(config, old) if old in overrides else [old])]


def load_config(argument: str) -> tuple[Path, ConfigDict]:
    """(path, config) of "FILE.py" or "FILE.py:variant,option=value".

    Raises:
      ConfigError: no such file, no get_config in it, or a variant or option that it does not have.
    """
    given, colon, variant = argument.partition(":")
    if not given:
        raise ConfigError(f"--config needs a file; {_available()}")
    candidates = [Path(given), ROOT / given]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(f"There is no config file {given}; {_available(given)}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{given} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{given} has no function get_config, so it is not a config file")
    try:
        return path, module.get_config(variant) if colon else module.get_config()
    except ValueError as error:
        raise ConfigError(f"{given}: {error}") from error


def _check_override(config: ConfigDict, argument: str) -> list[str]:
    """The arguments that set the fields of --config.FIELD=TEXT one by one; ConfigError where one does not fit."""
    name, equals, text = argument.partition("=")
    prefix, field = name.split(".", 1)
    known = _fields(config)
    if not equals:
        _check_value(field, None, known)
        return [f"{prefix}.{_subscripted(field)}"]
    return [f"{prefix}.{_subscripted(one)}={value}" for one, value in _single_fields(field, text, known)]


def _single_fields(field: str, text: str, known: dict[str, object]) -> Iterator[tuple[str, str]]:
    _check_value(field, text, known)
    if isinstance(known[field], ConfigDict) and field not in FREE_SECTIONS:
        for key, value in ast.literal_eval(text).items():
            yield from _single_fields(f"{field}.{key}", value if isinstance(value, str) else repr(value), known)
    else:
        yield field, text


def _subscripted(field: str) -> str:
    """train.learning_rate_multipliers.llama/layers -> train.learning_rate_multipliers['llama/layers']"""
    first, *rest = field.split(".")
    return first + "".join(f".{name}" if name.isidentifier() else f"[{name!r}]" for name in rest)


def _check_value(field: str, text: str | None, known: dict[str, object]) -> None:
    section = next((name for name in FREE_SECTIONS if field.startswith(f"{name}.") and name in known), None)
    if field not in known and section:
        key = field.removeprefix(f"{section}.")
        raise ConfigError(
            f"The config has no field {field}; to add it, name all of them: "
            f'"--config.{section}={{{key!r}: {text or 1.0}, ...}}"'
        )
    if field not in known:
        raise ConfigError(f"The config has no field {field}{_nearest(field, known)}")
    value = known[field]
    if text is None or value is None or isinstance(value, str):
        return
    expected, fits = type(value).__name__, True
    if isinstance(value, bool):
        expected, fits = "true or false", text.lower() in ("true", "false", "1", "0", "t", "f", "yes", "no")
    elif isinstance(value, int | float):
        expected = "a whole number" if isinstance(value, int) else "a number"
        try:
            int(text, 0) if isinstance(value, int) else float(text)
        except ValueError:
            fits = False
    elif isinstance(value, ConfigDict | tuple):
        expected = "a dict" if isinstance(value, ConfigDict) else "a tuple, as '(1, 2)'"
        try:
            literal = ast.literal_eval(text)
            fits = isinstance(literal, dict) if isinstance(value, ConfigDict) else not isinstance(literal, dict)
        except (SyntaxError, ValueError):
            fits = False
    if not fits:
        raise ConfigError(f"--config.{field} must be {expected}, got {text!r}")


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    fields: dict[str, object] = {}
    for key in config:
        value = config[key]
        fields[f"{prefix}{key}"] = value
        if isinstance(value, ConfigDict):
            fields.update(_fields(value, f"{prefix}{key}."))
    return fields


def _nearest(field: str, known: dict[str, object]) -> str:
    top = [name for name in known if "." not in name]
    known = {name: value for name, value in known.items() if not field.startswith(f"{name}.")}  # not its own section
    near = difflib.get_close_matches(field, known, n=1, cutoff=0.75)
    if not near:  # the section may be missing or wrong: compare the last names
        by_last = {name.rsplit(".", 1)[-1]: name for name in known}
        last = difflib.get_close_matches(field.rsplit(".", 1)[-1], by_last, n=1)
        near = [by_last[last[0]]] if last else []
    return f"; did you mean --config.{near[0]}?" if near else "; it has " + ", ".join(top)


def _config_files() -> list[Path]:
    return sorted(path for path in (ROOT / "configs").glob("*.py") if path.name != "__init__.py")


def _available(given: str = "") -> str:
    names = [str(Path("configs") / path.name) for path in _config_files()]
    near = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"


def _help(program: str, usage: str) -> str:
    lines = [usage.strip()]
    if "config" in flags.FLAGS:
        lines += ["", "Configs (--config=FILE:variant):"]
    for path in _config_files() if "config" in flags.FLAGS else ():
        try:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except SyntaxError:
            text = "(does not parse)"
        lines.append(f"  configs/{path.name}: {text.splitlines()[0] if text else ''}")
    lines += ["", "Flags:"]
    named = flags.FLAGS.get_key_flags_for_module(program) or flags.FLAGS.get_key_flags_for_module("__main__")
    if "config" in flags.FLAGS and flags.FLAGS["config"] not in named:
        named = [flags.FLAGS["config"], *named]
    for flag in named:
        default = "" if flag.default in (None, "", False, []) else f" (default: {flag.default})"
        text = str(flag.help).partition(";\n")[0]  # without what absl says of flags that can be repeated
        lines.append(f"  --{flag.name}: {text}{default}")
    return "\n".join(lines)
