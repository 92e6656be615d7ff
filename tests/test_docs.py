"""The pages under docs/ and the README: a complete map, links that lead somewhere, Python that runs. Plain English."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page):
    """Those that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.+)", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        if not re.match(r"\w+:", target) and (not file.exists() or heading and heading not in anchors(file)):
            yield target


def test_links_lead_to_files_and_headings_that_exist():
    assert {page.name: found for page in PAGES if (found := list(broken_links(page)))} == {}


@pytest.mark.parametrize("link", ["no_page.md", "index.md#no-heading", "#no-heading", "../docs/no/page.md#files"])
def test_a_broken_link_is_found(link, tmp_path):
    (tmp_path / "index.md").write_text("# Files\n[a](index.md#files) [b](#files) [c](https://x.org/#y)")
    (tmp_path / "page.md").write_text(f"# Page\n[a](index.md#files) [b]({link})\n```\n[c](in-code.md)\n```\n")
    assert list(broken_links(tmp_path / "page.md")) == [link] and not list(broken_links(tmp_path / "index.md"))


def test_the_map_names_every_page_script_and_program():
    named = set(re.findall(r"[\w./-]+", (ROOT / "docs/index.md").read_text()))
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"index.md"}
    scripts = {str(path.relative_to(ROOT)) for path in ROOT.glob("algorithms/**/*.py")}
    folder = ROOT / "benchmarks"
    programs = {str(x.relative_to(folder)) for kind in ("py", "sh") for x in folder.glob(f"**/*.{kind}")}
    configurations = {f"configs/{path.name}" for path in ROOT.glob("configs/*") if path.is_dir()}
    assert len(pages) > 5 and len(scripts) > 2 and len(programs) > 7
    assert pages | scripts | programs | configurations <= named


def test_lines_of_the_pages_have_at_most_120_characters():
    """Tables excepted, which cannot wrap."""
    for page in PAGES:
        for i, line in enumerate(page.read_text().splitlines(), 1):
            assert len(line) <= 120 or line.lstrip().startswith(("|", "<!-- report:")), f"{page.name}:{i}"


def test_python_of_the_page_on_extending_runs(program, tmp_path):
    """Beside a copy of the script, as the page says, with few steps."""
    text = (ROOT / "docs/extend.md").read_text()
    text = "".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    few = text.replace("max_timesteps=1000", "max_timesteps=5, n_episodes=1").replace("range(20)", "range(2)")
    assert text.count("max_timesteps=1000") == 2 and few.count("range(2)") == 1
    (tmp_path / "work").mkdir()
    (tmp_path / "work/cql.py").write_text((ROOT / "algorithms/offline/cql.py").read_text())
    process = program(f"{few}\nassert action.shape == (1,) and row['eval_return'] < 0\n")
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()
    assert (tmp_path / "work/runs/file/policy.pt").exists()


def test_python_of_the_page_on_choosing_runs(tmp_path):
    """In the root of the repository, with a run of the stored results."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/choosing.md").read_text(), re.MULTILINE | re.DOTALL)
    code = "".join(blocks)  # the verdict of a run, and estimates by propensities
    folder = tmp_path / "runs/shop"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks/results/diagnose/lunarlander-medium-tiny-seed2.csv", folder / "metrics.csv")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout == f"under-fitting 10000\n({2 / 3}, 0.0, 2.0) {49 / 29}\n", process.stderr


# What reads as if translated (a space stands for a line break, too) -> examples of it, and of what must pass
TRANSLATED = {
    r"\b(is|are|was|were) no (?!better|worse|longer|larger|smaller|lower|higher|faster|slower|more|less|different)"
    r"[a-zA-Z]": (
        ["a.yaml is no YAML", "losses that\n are no numbers"],
        [
            "there is no such file",
            "There\n  are no critics",
            "It is no longer there",
            "the score is no better than chance",
        ],
    ),
    r"\b(a|an|one) (row|line|file|run|value|key|column|thread|page|process|policy|seed|task|network|layer) (a|an|each) "
    r"[a-z]": (["a row an evaluation", "a file a method"], ["one row per evaluation", "in a row and a"]),
    r"\b(updates|steps|episodes|transitions|actions|rows|runs|values|quantiles|networks|minutes|seconds|hours) an? "
    r"(second|minute|hour|run|row|update|episode|evaluation|minibatch|step|state|layer|action|policy|core|task)\b": (
        ["updates a second", "episodes an\n evaluation"],
        ["updates per second", "episodes of an evaluation"],
    ),
    r"\bonce more\b": (["the command once more"], ["the command again"]),
    r"[\"#;] ?the same again\b": (["# the same again goes on"], ["# the same command again continues"]),
    r"\bby the dozen\b": (["sold by the dozen"], ["dozens"]),
    r"\bof which none\b": (["runs, of which none ends"], ["runs, none of which ends"]),
    r"\bfew customers\b": (["try it on few customers"], ["try it on a few customers"]),
    r"\bin the place of\b": (["in the place of the copy"], ["in place of the copy"]),
    r"\ba second with\b": (["Updates a second with 17 observations"], ["Updates per second, with 17 observations"]),
    r"\bpromis(e|es|ed|ing)\b(?![\":`])": (["what the critics promise"], ["what the critics predict", '"promised": 1']),
    r'"""(Of|What) ': (['"""What a run reads."""', '"""Of a row, its name."""'], ['"""Returns what a run reads."""']),
}
ALLOWED = re.compile(r"\bthere\s+(is|are|was|were)\s+no\b|\ba\s+few\b", re.IGNORECASE)
TEXTS = [
    path
    for pattern in (
        "*.md", "docs/*.md", "algorithms/**/*.py", "benchmarks/*.py", "benchmarks/studies/*", "benchmarks/*.sh",
        "benchmarks/slurm/*", "tests/*.py", "configs/**/*.yaml", ".ci/*", ".github/**/*.yml", "Dockerfile",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and path != ROOT / "tests/test_docs.py"
]  # fmt: skip


def translated(text):
    """Yields the line and the words of each hit."""
    text = ALLOWED.sub(lambda match: re.sub(r"\S", "_", match[0]), text)
    for pattern in TRANSLATED:
        for match in re.finditer(pattern.replace(" ", r"\s+"), text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split())


def test_english_is_plain():
    hits = [f"{x.relative_to(ROOT)}:{i}: {words}" for x in TEXTS for i, words in sorted(translated(x.read_text()))]
    assert len(TEXTS) > 50
    assert not hits, f"{len(hits)} places read as if translated:\n" + "\n".join(hits)


def test_translated_english_is_found():
    for bad, good in TRANSLATED.values():
        assert all(list(translated(x)) for x in bad) and not any(list(translated(x)) for x in good), bad
