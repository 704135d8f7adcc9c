"""The command for built-in experiments."""

import ast
import pathlib
import shutil
from typing import Annotated

from tyro.conf import Positional

from opdjax.cli.parsing import NONE, command
from opdjax.config.experiments import BUILT_IN, path_of
from opdjax.config.validation import ConfigError, nearest


@command("[NAME …]")
def experiments(names: Annotated[Positional[tuple[str, ...]], NONE] = ()):
    """List the built-in experiments, or copy those named into this directory, to edit.

    Commands take a built-in experiment as @NAME.

    Args:
        names: Experiments to copy; without any, all are listed.
    """
    for name in names:
        source = path_of(f"@{name.removeprefix('@')}")
        target = pathlib.Path(source.name)
        if not source.is_file():
            known = [_name_of(path) for path in BUILT_IN.rglob("*.py")]
            raise ConfigError(f"there is no built-in experiment {name!r}; {nearest(name, known)}")
        if target.exists():
            raise ConfigError(f"{target} exists; move it, or copy {name} in another directory")
        shutil.copyfile(source, target)
        print(f"wrote {target}")
    for path in () if names else sorted(BUILT_IN.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        summary = " ".join(text.partition("\n\n")[0].split()).partition(". ")[0]
        print(f"@{_name_of(path):26}{summary.removesuffix('.')}")


def _name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(BUILT_IN).with_suffix(""))
