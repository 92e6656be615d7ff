"""Names that several scripts share have one text; and the program that checks and mends it works."""

import check_shared_blocks
import pytest
from conftest import ROOT

FIRST = '''"""First."""
import os

SIZE = 3  # of all
LIMIT: int = 4


# Why it is so.
@property
def shared(x):
    return x


class Same:
    pass


class TrainConfig:
    a = 1


def train():
    pass


# local: the first one counts from 0
def count():
    return 0
'''
SECOND = FIRST.replace("First", "Second").replace("a = 1", "b = 2").replace("    pass\n\n\n#", "    return 1\n\n\n#")


def test_shared_names_of_the_scripts_have_one_text():
    paths = sorted((ROOT / "algorithms").glob("**/*.py"))
    names = check_shared_blocks.blocks(paths[0])
    assert len(names) > 30 and names.keys() >= {"RANGES", "Batch", "load_dataset"} and "TrainConfig" not in names
    assert check_shared_blocks.differences(paths) == []


@pytest.fixture
def check(tmp_path, capsys):
    """Runs the program on files with these texts; returns its exit status, what it printed, and the texts after it."""

    def check(*texts, arguments=()):
        paths = [tmp_path / f"{i}.py" for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text)
        status = check_shared_blocks.main([str(tmp_path / x) if x.endswith(".py") else x for x in arguments], paths)
        return status, capsys.readouterr().out, [path.read_text() for path in paths]

    return check


def test_equal_texts_pass(check):
    assert check(FIRST, SECOND) == (0, "\n", [FIRST, SECOND])
    assert check(FIRST, SECOND.replace("return 0", "return 1"))[0] == 0  # both local
    assert check(FIRST, SECOND.replace("# local: the first one counts from 0\n", ""))[0] == 0  # one is
    assert check(FIRST, "def other():\n    pass\n")[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("return x", "return  x", "shared"),
        ("# Why it is so.", "# Why it is not.", "shared"),
        ("@property", "@staticmethod", "shared"),
        ("SIZE = 3", "SIZE = 4", "SIZE"),
        ("# of all", "# of some", "SIZE"),
        ("LIMIT: int = 4", "LIMIT: int = 5", "LIMIT"),
        ("class Same:\n    pass", "class Same:\n    a = 1", "Same"),
    ],
)
def test_a_difference_is_found_and_mended(old, new, name, check):
    assert old in SECOND
    other = SECOND.replace(old, new)
    status, out, _ = check(FIRST, other)
    assert status == 1 and len(out.splitlines()) == 2 and out.startswith(f"{name}: ") and "--fix" in out
    assert check(FIRST, other, FIRST, arguments=["--fix", "0.py", name])[2] == [FIRST, SECOND, FIRST]
    status, _, texts = check(FIRST, other, FIRST, arguments=["--fix", "1.py", name])
    assert (status, texts) == (0, [FIRST.replace(old, new), other, FIRST.replace(old, new)])


def test_local_needs_a_reason_and_differences_beside_it_count(check):
    other = SECOND.replace("return 0", "return 1").replace("# local: the first one counts from 0", "# local:")
    assert check(FIRST.replace("# local: the first one counts from 0", "# local:"), other)[0] == 1
    third = FIRST.replace("return 0", "return 2").replace("# local: the first one counts from 0\n", "")
    assert check(FIRST, third, third.replace("return 2", "return 3"))[0] == 1


@pytest.mark.parametrize("arguments", [["--fix"], ["--fix", "0.py"], ["SIZE"], ["--fix", "0.py", "no_such_name"]])
def test_wrong_use_changes_nothing(arguments, check, tmp_path):
    with pytest.raises(SystemExit) as stop:
        check(FIRST, SECOND, arguments=arguments)
    assert stop.value.code and (tmp_path / "1.py").read_text() == SECOND
