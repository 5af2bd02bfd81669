"""The pages say what is so: samples run, links lead somewhere, options are there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from sharded_adadiag import AdaDiag, AdafacDiag, HfacDiag, RotatedOptimizer
from sharded_adadiag.options import PLANNED, Options

README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "launch/*.md", "examples/**/*.md")
    for page in ROOT.glob(pattern)
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sample(name: str) -> str:
    """The program in README whose first line is its name."""
    (code,) = [
        code
        for language, code in FENCED.findall(README)
        if language == "python" and code.startswith(f"# {name}")
    ]
    return code


def heading_links(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from Markdown."""
    text = FENCED.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


# ---------------------------------------------------------------- README


def test_readme_takes_ten_minutes() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 110


def test_readme_leads_to_every_page() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in README, page.name


def test_readme_has_the_two_commands_and_ci_runs_them() -> None:
    assert "\nbash launch/pretrain.sh" in README
    assert "\nbash launch/test.sh" in README
    assert "bash launch/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_figure_of_readmes_table_is_in_the_log() -> None:
    log = (ROOT / "examples/benchmarks/log.md").read_text()
    measured = set(re.findall(r"\d+(?:\.\d+)?", log))
    rows = re.findall(r"^\| (?:torch|pytorch|\*\*Ada|Ada).*$", README, re.MULTILINE)
    assert len(rows) == 6
    figures = [f for row in rows for f in re.findall(r"(?<![\w.])\d+\.\d+", row)]
    assert len(figures) > 20
    assert set(figures) - measured == set()


def test_the_sample_for_one_process_runs_as_pasted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    exec(compile(sample("one.py"), "one.py", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    losses = [float(x) for x in re.findall(r"step \d+: ([\d.]+)", printed)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] < 5.5  # log(256) is 5.545
    assert "AdaDiag: 4 matrices, 11 parameters updated in place" in printed


@pytest.mark.multiprocess
def test_the_sample_for_fsdp2_runs_as_pasted(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(sample("train.py"))
    line = re.search(r"torchrun (.*) train\.py", README)
    assert line is not None
    command = [sys.executable, "-m", "torch.distributed.run", *line[1].split()]
    done = subprocess.run(
        [*command, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    losses = re.findall(r"rank [01] of 2: loss \d\.\d+", done.stdout)
    assert len(losses) == 2, done.stdout


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", FENCED.sub("", page.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in heading_links(target), link


# ---------------------------------------------------------------- ARCHITECTURE

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PACKAGE = ROOT / "sharded_adadiag"


def code_spans(text: str) -> list[str]:
    return [" ".join(s.split()) for s in re.findall(r"`([^`]+)`", FENCED.sub("", text))]


def defined_in(file: Path) -> set[str]:
    """Functions, classes, methods and constants of a file, as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
            inner = node.body if isinstance(node, ast.ClassDef) else []
            methods = (m.name for m in inner if isinstance(m, ast.FunctionDef))
            found |= {f"{node.name}.{name}" for name in methods}
    return found


def test_the_architecture_is_read_in_a_quarter_of_an_hour() -> None:
    lines = ARCHITECTURE.splitlines()
    assert len(lines) < 200
    assert max(map(len, lines)) <= 110


def test_every_file_and_name_of_the_architecture_is_there() -> None:
    named = [span for span in code_spans(ARCHITECTURE) if ".py" in span]
    assert len(named) > 80
    for span in named:
        path, _, name = span.partition(": ")
        files = [base / path for base in (PACKAGE, ROOT) if (base / path).is_file()]
        assert files, span
        assert not name or name in defined_in(files[0]), span


def test_the_architecture_has_a_word_on_every_room() -> None:
    modules = {f.name for f in PACKAGE.glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms = modules | {f"{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert len(rooms) > 10
    (about,) = re.findall(r"^## The rooms\n(.*?)^## ", ARCHITECTURE, re.M | re.DOTALL)
    assert set(re.findall(r"^\* `([^`]+)`", about, re.M)) >= rooms


# ---------------------------------------------------------------- options

FIXED = {"distribution", "buffer_bytes", "process_group", "exclude"}


def option_rows() -> dict[str, tuple[str, str, str, str]]:
    """The table of docs/options.md by option: default, values, change, meaning."""
    text = (ROOT / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|(.+)\|$", text, re.MULTILINE)
    table = {}
    for name, default, rest in rows:
        values, change, meaning = (cell.strip() for cell in rest.split("|"))
        assert name not in table, name
        table[name] = (default, values, change, meaning)
    return table


def signature_defaults() -> dict[str, Any]:
    parameters = inspect.signature(RotatedOptimizer.__init__).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def test_every_option_is_on_the_page_with_its_default() -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(Options)}
    for optimizer in (AdaDiag, AdafacDiag, HfacDiag):
        assert optimizer.rule.options.items() <= defaults.items()
    for name in defaults.keys() & signature_defaults().keys():
        assert defaults[name] == signature_defaults()[name], name
    defaults |= signature_defaults()
    rows = option_rows()
    assert rows.keys() == defaults.keys()
    for name, (default, *_) in rows.items():
        assert ast.literal_eval(default) == defaults[name], name


def test_the_page_says_when_a_change_acts() -> None:
    changes = {name: change for name, (_, _, change, _) in option_rows().items()}
    live = {f.name for f in dataclasses.fields(Options)} - set(PLANNED)
    expected = dict.fromkeys(PLANNED, "planned") | dict.fromkeys(live, "live")
    assert changes == expected | dict.fromkeys(FIXED, "fixed")


def test_page_and_signature_name_the_same_values() -> None:
    hints = typing.get_type_hints(RotatedOptimizer.__init__)
    choices = {n: h for n, h in hints.items() if typing.get_origin(h) is typing.Literal}
    assert {"sides", "basis", "nonfinite", "distribution"} <= choices.keys()
    for name, hint in choices.items():
        values = re.findall(r'"(\w+)"', option_rows()[name][1])
        assert tuple(values) == typing.get_args(hint), name


def test_the_docstring_names_the_options_of_the_page() -> None:
    documented = inspect.getdoc(RotatedOptimizer)
    for name in signature_defaults():
        assert re.search(rf"^    {name}: ", documented, re.MULTILINE), name
    for optimizer in (AdafacDiag, HfacDiag):
        for name in optimizer.rule.options:
            assert f"``{name}``" in inspect.getdoc(optimizer), name
