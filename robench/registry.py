"""Names to plugins: built-in files, entry points of other packages, classes in modules and files, bridges.

Listing names imports nothing, so that `robench list` is quick; a plugin is imported when it is asked for.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from robench.errors import PluginError, RobenchError, UsageError
from robench.origin import note_origin

if TYPE_CHECKING:
    from robench.attack import Attack
    from robench.defense import Defense

Kind = Literal["defense", "attack"]
SWITCHES: Final = {"true": True, "false": False}
"""Bare words of an option that are no text."""


def builtin_names(kind: Kind) -> list[str]:
    """The stems of the files and packages in the folder `defenses/` or `attacks/`."""
    folder = importlib.util.find_spec(f"robench.{kind}s")
    places = [Path(place) for place in (folder.submodule_search_locations or [])] if folder else []
    found = set()
    for path in (entry for place in places for entry in place.iterdir()):
        if path.name.startswith("_"):
            continue
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            found.add(path.stem)
    return sorted(found)


def is_shipped(spec: str) -> bool:
    """Whether the defense that the command line finds by `spec`, options and all, comes with robench; "" is none."""
    return bool(spec) and parse_spec(spec)[0] in builtin_names("defense")


def plugin_entry_points(kind: Kind) -> dict[str, EntryPoint]:
    """Entry points of other packages in the group `robench.defenses` or `robench.attacks`, by name."""
    return {point.name: point for point in entry_points(group=f"robench.{kind}s")}


def names(kind: Kind) -> list[str]:
    """All names that resolve without a path: built in and entry points."""
    return sorted({*builtin_names(kind), *plugin_entry_points(kind)})


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """Splits `pgd(steps=100, loss="dlr")` into its name and options; values are Python literals or bare words.

    `true` and `false` are what they say, not words: the text "false" would be true where an option is a switch.

    Raises:
        UsageError: it is not of that form.
    """
    text = text.strip()
    name, parenthesis, rest = text.partition("(")
    name = name.strip()
    if not name:
        raise UsageError(f'expected a name such as pgd or pgd(steps=100); got "{text}"')
    if not parenthesis:
        return name, {}
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
    except (SyntaxError, ValueError):
        call = None
    words = [word.arg for word in call.keywords] if isinstance(call, ast.Call) else []
    if not isinstance(call, ast.Call) or call.args or None in words or len(set(words)) < len(words):
        raise UsageError(f'expected NAME(option=value, ...) such as pgd(steps=100, restarts=5); got "{text}"')
    return name, {cast("str", word.arg): _literal(word.value, text) for word in call.keywords}


def _literal(node: ast.expr, text: str) -> object:
    if isinstance(node, ast.Name):
        return SWITCHES.get(node.id, node.id)  # loss=dlr, as one types it in a shell
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        raise UsageError(f'option values must be numbers, words, True, False or None; got "{text}"') from None


def check_switch(what: str, name: str, default: object, value: object) -> None:
    """Checks that an option which is true or false by default got no text, all of which would be true.

    Raises:
        UsageError: it did.
    """
    if isinstance(default, bool) and isinstance(value, str):
        raise UsageError(f'{what}: {name} must be true or false; got "{value}"')


def split_specs(text: str) -> list[str]:
    """Splits a list at the commas outside parentheses and quotes: `fgsm,pgd(steps=5,loss='dlr')` has two entries."""
    parts, depth, quote, escaped = [""], 0, "", False
    for character in text:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        else:
            depth += (character == "(") - (character == ")")
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def resolve(kind: Kind, name: str) -> type:
    """Finds the class of a defense or an attack.

    Args:
        kind: `defense` or `attack`.
        name: a built-in name, an entry point, `module.path:Class`, `path/to/file.py:Class`, an attack of another
            package such as `foolbox:LinfPGD` or `torchattacks:PGD`, or a model of `robustbench:`.

    Raises:
        UsageError: there is none of that name; says what there is and what was probably meant.
        PluginError: the plugin cannot be imported or is not of the right kind.
    """
    found = _find(kind, name)
    if not _is_plugin(kind, found):
        raise PluginError(f'{kind} "{name}" must be a class that extends robench.{_base(kind).__name__}; got {found!r}')
    return cast("type", found)


def _is_plugin(kind: Kind, found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, _base(kind))


def _find(kind: Kind, name: str) -> object:
    """What bears a name; rather a class of the kind, but that is not looked at."""
    if ":" in name:
        found = _from_path(kind, name)
    elif name.endswith(".py"):
        found = _from_file(kind, name)
    elif name in builtin_names(kind):
        found = _builtin(kind, name)
    elif name in (points := plugin_entry_points(kind)):
        found = _import(f'{kind} "{name}"', points[name].load)
        if getattr(found, "name", name) != name:
            raise PluginError(f'{kind} "{name}": its class has the name "{found.name}"; a run could not be replayed')
    else:
        raise UsageError(_unknown(kind, name))
    return found


def _unknown(kind: Kind, name: str) -> str:
    from robench.protocol import PROTOCOLS

    known, protocols = names(kind), list(PROTOCOLS) if kind == "attack" else []
    near = find_near(name, [*known, *protocols])
    beside = f"; protocols: {', '.join(protocols)}" if protocols else ""
    have = f"{near}There" if near else "there"
    return f"there is no {kind} \"{name}\"; {have} are: {', '.join(known)}{beside}. See 'robench list {kind}s'"


def find_near(name: str, known: Iterable[str]) -> str:
    """`did you mean "pgd"? ` where one of the known names is near, also without its version; else empty."""
    names = [word for key in known for word in dict.fromkeys((key.rpartition("-")[0] or key, key))]
    near = difflib.get_close_matches(name, names, n=1)
    return f'did you mean "{near[0]}"? ' if near else ""


def _base(kind: Kind) -> type:
    module, name = ("robench.defense", "Defense") if kind == "defense" else ("robench.attack", "Attack")
    return cast("type", getattr(importlib.import_module(module), name))


@contextlib.contextmanager
def plugin_errors(what: str) -> Iterator[None]:
    """Turns what a plugin's code raises in the block into one line that says who and where: `WHAT raised ...`.

    Lets robench's own errors pass, an interrupt, and a lack of memory, which smaller batches may heal.

    Raises:
        PluginError: the plugin's code raised or called exit().
    """
    from robench.batches import is_out_of_memory

    try:
        yield
    except RobenchError:
        raise
    except SystemExit as stop:
        raise PluginError(f"{what} called exit({stop.code})") from stop
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise PluginError(f"{what} raised {describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """One line: the kind of an error, where it was raised (rather in a plugin's file than in torch's), its text."""
    raised = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in raised if not _imports(frame.filename)]
    frame = [frame for frame in frames if is_of_a_plugin(frame.filename)][-1:] or frames[-1:]
    place = f" at {Path(frame[0].filename).name}:{frame[0].lineno}" if frame else ""
    return f"{type(error).__name__}{place}: {' '.join(str(error).split())}"


def _imports(filename: str) -> bool:
    """True for the machinery of an import: Python's, and this file."""
    return filename.startswith("<frozen") or filename in (importlib.__file__, __file__)


def is_of_a_plugin(filename: str) -> bool:
    """Whether a file may be a plugin's: not one of torch, of Python, or of robench but for its own plugins."""
    path, here = Path(filename), Path(__file__).parent
    if path.is_relative_to(here):
        return path.relative_to(here).parts[0] in ("defenses", "attacks")
    is_python_s = path.is_relative_to(sysconfig.get_path("stdlib")) and "site-packages" not in path.parts
    return not (is_python_s or filename.startswith("<") or "torch" in path.parts)


def _import(what: str, load: Any) -> Any:
    try:
        return load()
    except RobenchError:
        raise
    except SystemExit as stop:
        raise PluginError(f"{what} cannot be imported: it called exit({stop.code})") from stop
    except Exception as error:
        raise PluginError(f"{what} cannot be imported: {describe_error(error)}") from error


def _builtin(kind: Kind, name: str) -> type:
    module = _import(f'{kind} "{name}"', lambda: importlib.import_module(f"robench.{kind}s.{name}"))
    base = _base(kind)
    owned = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c is not base]
    matching = [c for c in owned if getattr(c, "name", "") == name]
    if len(matching) != 1:
        raise PluginError(
            f'{kind}s/{name} must hold exactly one {base.__name__} with name = "{name}"; it has {len(matching)}'
        )
    return cast("type", matching[0])


def _from_path(kind: Kind, name: str) -> object:
    place, _, class_name = name.rpartition(":")
    if place in ("foolbox", "torchattacks", "robustbench"):
        return _from_bridge(kind, place, class_name)
    if place.endswith(".py"):
        module = _open_file(kind, name, Path(place))
    else:
        module = _import(f'{kind} "{name}"', lambda: importlib.import_module(place))
    if not hasattr(module, class_name):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        near = difflib.get_close_matches(class_name, classes, n=1)
        meant = f'; did you mean "{near[0]}"?' if near else ""
        raise UsageError(f'{kind} "{name}": {place} has no class "{class_name}"{meant}')
    return getattr(module, class_name)


def _from_file(kind: Kind, name: str) -> object:
    """The one defense in a file; of attacks the class has to be named, since a run replays them by it."""
    module = _open_file(kind, name, Path(name))
    if kind == "defense":
        from robench.factory import find_only_defense

        return find_only_defense(name, module)
    base = _base(kind)
    held = [f"{name}:{key}" for key, one in vars(module).items() if _is_plugin(kind, one) and one is not base]
    raise UsageError(f'{kind} "{name}": name its class: {", ".join(held) or f"{name}:Class; there is none yet"}')


def _open_file(kind: Kind, name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f'{kind} "{name}": the file {path} does not exist')
    return cast("ModuleType", _import(f'{kind} "{name}"', lambda: _import_file(path)))


def _from_bridge(kind: Kind, package: str, name: str) -> object:
    if package == "robustbench":
        if kind != "defense":
            raise UsageError(
                'the bridge "robustbench:" is to defenses; its attack is AutoAttack: see --protocol standard'
            )
        from robench.bridges.robustbench import find_defense

        return find_defense(name)
    if kind != "attack":
        raise UsageError(f'the bridge "{package}:" is to attacks; for a defense name a class: module.path:Class')
    from robench.bridges import find_attack

    return find_attack(package, name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    key = f"robench_file_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    vars(module)["robench_source"] = hashlib.sha256(path.read_bytes()).hexdigest()  # see robench.source
    sys.modules[key] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def load_defense(name: str, dataset: str | None = None, **options: Any) -> Defense:
    """Builds a defense with its weights: in eval mode, weights frozen, on the CPU.

    Args:
        name: see `resolve`; may carry options: `shortrun(n_chains=20)`. Beside a class an instance of Defense, a
            function that returns one (it gets the options), or a file that holds one defense alone.
        dataset: whose weights to read; None takes the defense's default.
        options: the constructor's options, and `weights`: a file to read instead of those shipped.

    Raises:
        UsageError: unknown name or option, or no weights.
        DataError: a damaged weights file.
        PluginError: the plugin breaks the contract.
    """
    plugin, written = parse_spec(name)
    found, given = _find("defense", plugin), {**written, **options}
    if _is_plugin("defense", found):
        defense = cast("type[Defense]", found).load(dataset, **given)
    else:
        from robench.factory import make_defense

        defense = make_defense(plugin, found, dataset, given)
    defense.check_traits()
    note_origin(defense.freeze(), name, dataset, options)
    return defense


def load_attack(name: str, **options: Any) -> Attack:
    """Builds an attack: `pgd`, `pgd(steps=100, restarts=5)`, a path; `options` override the written ones.

    Raises:
        UsageError: unknown name or option, or an option out of range.
        PluginError: the plugin breaks the contract.
    """
    plugin, written = parse_spec(name)
    cls = cast("type[Attack]", resolve("attack", plugin))
    made = vars(cls).get("__dataclass_params__")  # its own: the base is a dataclass too
    if made is None or not made.frozen:
        raise PluginError(
            f'attack "{plugin}" must be a frozen dataclass of its hyperparameters (@dataclass(frozen=True))'
        )
    fields = {field.name for field in dataclasses.fields(cls)}
    wrong = [key for key in {**written, **options} if key not in fields]
    if wrong:
        near = difflib.get_close_matches(wrong[0], sorted(fields), n=1)
        meant = f'did you mean "{near[0]}"? ' if near else ""
        raise UsageError(f'attack "{plugin}" has no option "{wrong[0]}"; {meant}Options: {", ".join(sorted(fields))}')
    given = {**written, **options}
    for field in dataclasses.fields(cls):
        check_switch(f'attack "{plugin}"', field.name, field.default, given.get(field.name))
    try:
        with plugin_errors(f'attack "{plugin}": its constructor'):
            attack = cls(**given)
    except PluginError as error:
        if not isinstance(error.__cause__, TypeError | ValueError):
            raise
        reason = error.__cause__
        raise UsageError(f'attack "{plugin}": an option is missing or of the wrong kind: {reason}') from reason
    attack.check_traits()
    return attack


def spec_of(name: str, options: Mapping[str, Any]) -> str:
    """Writes a name and options the way `parse_spec` reads them."""
    inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name}({inside})" if inside else name
