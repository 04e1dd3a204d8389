"""The documentation: its code runs, its commands exist, its links lead somewhere, and the site builds without warnings."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from rpq_convert.cli import group, main
from transformers import LlamaConfig, LlamaForCausalLM

import rpq_convert

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(page.read_text("utf8")) if kind == language]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with my-model/, a small Llama, and my-model-rpq/, the same converted."""
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "my-model")
    rpq_convert.convert_checkpoint(folder / "my-model", folder / "my-model-rpq", bits=4)
    return folder


# stack.md runs in a process of its own: tests/test_stack.py
RUNNING = [p for p in [ROOT / "README.md", *PAGES] if p.name != "stack.md" and blocks(p, "python")]


@pytest.mark.parametrize("page", RUNNING, ids=lambda p: p.name)
def test_the_python_of_a_page_runs_in_order(page, models, tmp_path, monkeypatch):
    work = shutil.copytree(models, tmp_path / "work")
    monkeypatch.chdir(work)
    (work / "page.py").write_text("\n".join(blocks(page, "python")), "utf8")
    runpy.run_path(str(work / "page.py"))


def test_pages_with_python_are_found():
    assert {"README.md", "first-hour.md", "calibrate.md", "tune.md", "budgets.md", "training.md"} <= {
        p.name for p in RUNNING
    }


def commands() -> list[tuple[str, str]]:
    """Return (page, line) of every command of ours in blocks without a language and in tables."""
    found = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        text = page.read_text("utf8")
        lines = [line for code in blocks(page, "") for line in code.splitlines()]
        lines += re.findall(r"`((?:rpq|rpq-convert) [a-zA-Z][^`]*)`", text)
        found += [(page.name, line) for line in lines if re.match(r"(rpq|rpq-convert) \S", line)]
    return found


@pytest.mark.parametrize("page, line", commands(), ids=lambda text: text[:60])
def test_a_command_of_the_docs_has_the_options_that_it_shows(page, line):
    """Parsed, not run: names of commands and options, and how many arguments they take."""
    import typer

    program, *words = shlex.split(line, comments=True)
    app = typer.main.get_command(main if program == "rpq-convert" else group)
    if program == "rpq" and not words[0].startswith("-"):
        name, *words = words
        assert name in app.commands, f"{page}: rpq has no command {name}"
        app = app.commands[name]
    shown = {o for p in app.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    free = app.context_settings.get("ignore_unknown_options", False)  # rpq serve hands them on
    for word in words:
        if word.startswith("-"):
            assert word in shown or free, f"{page}: {line!r}: there is no {word}"


def test_commands_are_found():
    assert len(commands()) > 25


def test_links_of_readme_and_pages_lead_to_files():
    """The site's build checks links between pages and their anchors; this holds for GitHub too."""
    wrong = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]:
        for link in LINK.findall(page.read_text("utf8")):
            path = urlsplit(link).path
            if urlsplit(link).scheme or not path or path == "cli.md":  # cli.md is made by the build
                continue
            if not (page.parent / path).exists():
                wrong.append(f"{page.name}: {link}")
    assert not wrong


def test_the_python_reference_names_all_public_names():
    text = (DOCS / "api.md").read_text("utf8")
    places = re.findall(r"^::: rpq_convert\.(\S+)", text, re.MULTILINE)
    missing = {n for n in rpq_convert.__all__ if n != "__version__"} - {p.rpartition(".")[2] for p in places}
    assert not missing
    for place in places:
        name = place.rpartition(".")[2]
        if name in rpq_convert.__all__:
            found = getattr(rpq_convert, name)
            assert f"{found.__module__}.{found.__name__}" == f"rpq_convert.{place}"


def test_every_page_has_a_place_in_the_navigation():
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf8"), re.MULTILINE))
    assert named == {p.name for p in PAGES} | {"cli.md"}


class _References(HTMLParser):
    """What a page loads or links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "icon") and given.get("href"):
            self.loaded.append(given["href"])


@pytest.mark.slow
def test_the_site_builds_without_warnings_and_asks_the_internet_for_nothing(tmp_path):
    """About 10 seconds on one core."""
    pytest.importorskip("zensical", reason="the documentation tools are not installed: make docs")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("cli.md"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "rpq_convert").symlink_to(ROOT / "rpq_convert")
    for command in re.findall(r"^\t\$\(BIN\)/(.*)$", recipe("docs"), re.MULTILINE):
        program, *words = shlex.split(command)
        assert program in ("python", "zensical")
        done = subprocess.run(
            [Path(sys.executable).with_name(program), *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    site = tmp_path / "site"
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    wrong = []
    for page in pages:
        found = _References(page)
        wrong += [f"{page.parent.name} loads {u}" for u in found.loaded if urlsplit(u).scheme in ("http", "https")]
        for link in found.links + found.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path or page.name == "404.html":
                continue
            target = (page.parent / unquote(parts.path)).resolve()
            if not target.exists():
                wrong.append(f"{page.relative_to(site)}: {link}")
    assert not wrong
    index = json.dumps(json.loads((site / "search.json").read_text("utf8")))
    assert "GPTQ error compensation" in index
    commands_page = (site / "cli" / "index.html").read_text("utf8")
    assert "--calibrate" in commands_page and "rpq verify" in commands_page
    api = (site / "api" / "index.html").read_text("utf8")
    assert "rpq.convert_checkpoint" in api and "size-audit report" in api


def recipe(target: str) -> str:
    """Return the recipe of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text("utf8")
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)[1]


def test_files_that_the_docs_name_exist():
    """As `layers/weight.py` in the package, or from the root: `benchmarks/speed.py`."""
    named = set()
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        text = re.sub(r"<!-- structure.*?<!-- end", "", page.read_text("utf8"), flags=re.DOTALL)  # shortened names
        named |= {(page.name, n) for n in re.findall(r"`([\w./]+\.(?:py|toml|jsonl|ipynb))`", text)}
    assert len(named) > 30
    missing = [n for n in named if "/" in n[1] and not any((r / n[1]).exists() for r in (ROOT, ROOT / "rpq_convert"))]
    assert not missing


def test_the_numbers_of_the_architecture_are_counted_from_the_source(tmp_path):
    """Levels, lines of code and parameters of a small tree; a circle of rooms is an error."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    sys.modules["structure"] = structure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(structure)
    files = {
        "rpq_convert/__init__.py": "",
        "rpq_convert/errors.py": "class E(Exception): ...\n",
        "rpq_convert/core/spec.py": "from rpq_convert.errors import E\n\n\ndef f(a, *, b=1):\n"
        '    """Said.\n\n    More.\n    """\n\n    # why\n    def g(c, d, e):\n        return c\n\n    return g\n',
        "rpq_convert/top.py": "import rpq_convert.core.spec\n",
        "cli/commands.py": "def main(self, **options):\n    from rpq_convert import top\n    return top\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    code = structure.Code(tmp_path)
    assert code.levels() == {"errors": 1, "core": 2, "top": 3, "cli": 4}
    everything = code.files
    assert str(code.longest_file(everything)) == "14 (`core/spec.py`)"
    assert str(code.longest_function(everything)) == "3 (`cli/commands.py: main`)"
    assert str(code.widest_signature(everything)) == "3 (`core/spec.py: g`)"
    assert not code.beyond()
    assert "| 4 | `cli` | 1 | 3 (`commands.py`)" in structure.tables(code)
    circle = tmp_path / "circle"
    shutil.copytree(tmp_path / "rpq_convert", circle / "rpq_convert")
    (circle / "rpq_convert/errors.py").write_text("from rpq_convert import top\n")
    with pytest.raises(ValueError, match="circle: core, errors, top"):
        structure.Code(circle).levels()
