"""README.md and docs/: links lead somewhere, and what is named in them exists."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
LINK = re.compile(r"\]\(\s*([^)\s]+)\s*\)")
CONFIGS = [ROOT / "configs" / f"{name}.py" for name in ("default", "nifti_folder", "acdc")]


def without_code(text):
    """Markdown without its code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`]*`", "", text)


def anchors(text):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"\s", "-", heading) for heading in plain}


def broken_links(page):
    """Links of a page within the repository that lead nowhere."""
    broken = []
    for link in LINK.findall(without_code(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            broken.append(link)
        # The site holds docs/ and nothing else.
        elif page.parent == DOCS and not target.is_relative_to(DOCS):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.md").write_text("# One two: three\n[x](b.md)\n[y](#one-two-three) [z](#four)\n")
    (tmp_path / "c.md").write_text(
        "```\n# no heading\n[no](link.md)\n```\n`[no](link.md)` [a](a.md)"
    )
    assert broken_links(tmp_path / "a.md") == ["b.md", "#four"]
    assert broken_links(tmp_path / "c.md") == []


def test_the_site_has_every_page_and_no_other():
    named = re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert sorted(named) == [p.name for p in sorted(DOCS.glob("*.md"))]


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    linked = {link.partition("#")[0] for link in LINK.findall(without_code(text))}
    assert {f"docs/{p.name}" for p in DOCS.glob("*.md")} - linked == {"docs/index.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_modules_and_functions_exist(page):
    text = page.read_text()
    for module in re.findall(r"python -m ((?:lclseg|benchmarks)\.\w+)", text):
        assert importlib.util.find_spec(module) is not None, module
    for path in re.findall(r"`(lclseg(?:\.\w+)+)`", text):
        parts = path.split(".")
        found = importlib.import_module(".".join(parts[:2]))
        for name in parts[2:]:
            found = getattr(found, name)
    for path in re.findall(r"`((?:lclseg|configs|tests|docs)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_config_keys_exist(page):
    text = page.read_text()
    groups = "data|model|loss|augment|crf|pseudo_labels|optimizer|rounds|log"
    # In code, or on a command line; file names have the same form.
    keys = set(re.findall(rf"(?:`|--config\.)((?:{groups})\.\w+)", text))
    keys = {key for key in keys if not re.search(r"\.(py|md|json|svg)$", key)}
    configs = [runpy.run_path(str(path))["get_config"]() for path in CONFIGS]
    known = {f"{g}.{k}" for config in configs for g in groups.split("|") for k in config.get(g, {})}
    assert keys - known == set()
    options = set().union(
        *(runpy.run_path(str(p))["OPTIONS"] for p in (ROOT / "configs" / "methods").glob("*.py"))
    )
    assert set(re.findall(r"--config\.method\.(\w+)", text)) <= options


def test_every_config_and_method_is_told_of():
    text = (DOCS / "running.md").read_text()
    for folder in (ROOT / "configs", ROOT / "configs" / "methods"):
        for path in folder.glob("*.py"):
            name = path.stem if folder.name == "methods" else path.name
            assert f"`{name}`" in text or path.name.startswith(("default", "_")), name
