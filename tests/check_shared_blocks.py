"""The same top-level name means the same text in every script.

    python tests/check_shared_blocks.py                    # lists the differences; exit status 1 where there are any
    python tests/check_shared_blocks.py --fix FILE NAME... # copies FILE's version of the names over all others

`TrainConfig` and `train` are each script's own, and so is what has the comment `# local: <reason>` right above it.
"""

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parents[1] / "algorithms"
OWN = {"TrainConfig", "train"}


class Block(NamedTuple):
    path: Path
    first: int  # lines [first, last), with the comments and decorators right above
    last: int
    text: str

    @property
    def local(self):
        return any(re.match(r"# local: \S", line) for line in self.text.splitlines())


def blocks(path):
    """The top-level functions, classes and constants of a file, by name."""
    source, found = path.read_text(), {}
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
        names = [getattr(target, "name", getattr(target, "id", None)) for target in targets]
        first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        block = Block(path, first, node.end_lineno, "".join(lines[first : node.end_lineno]))
        found |= {name: block for name in names if name and name not in OWN}
    return found


def versions(paths):
    """Name -> the files' blocks of that name that should be one."""
    found = {}
    for path in paths:
        for name, block in blocks(path).items():
            if not block.local:
                found.setdefault(name, []).append(block)
    return found


def differences(paths):
    lines = []
    for name, same in sorted(versions(paths).items()):
        for block in same[1:]:
            if block.text.rstrip() != same[0].text.rstrip():
                lines.append(f"{name}: {same[0].path}:{same[0].first + 1} and {block.path}:{block.first + 1} differ")
    return lines


def spread(source, names, paths):
    """Gives every file the version of `source`."""
    for name in names:
        block = blocks(source).get(name)
        if block is None or block.local:
            raise SystemExit(f"{source} has no {name} that is shared")
        for other in versions(paths).get(name, []):
            if other.path.resolve() != source.resolve():
                lines = other.path.read_text().splitlines(keepends=True)
                lines[other.first : other.last] = [block.text]
                other.path.write_text("".join(lines))


def main(arguments, paths=None):
    paths = sorted(FOLDER.glob("**/*.py")) if paths is None else paths
    if arguments[:1] == ["--fix"] and len(arguments) > 2:
        spread(Path(arguments[1]), arguments[2:], paths)
    elif arguments:
        raise SystemExit(__doc__)
    found = differences(paths)
    print(
        "\n".join([*found, "spread one version: python tests/check_shared_blocks.py --fix FILE NAME..."])
        if found
        else ""
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
