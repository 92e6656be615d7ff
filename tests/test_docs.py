"""The pages under docs/ and the README: the map names all there is, links lead somewhere, Python runs as it stands."""

import re

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
