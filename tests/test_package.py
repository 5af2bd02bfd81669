"""What the package says of itself: version, licence, citation, source distribution."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from support import ROOT

import sharded_adadiag

BUILD = """
import sys
from setuptools import build_meta

build_meta.build_sdist(sys.argv[1])
"""


def tracked() -> set[str]:
    """All files of the project: git's, or in an unpacked sdist those it names."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "-z"]
        listed = subprocess.run(command, capture_output=True, check=True, text=True)
        names = listed.stdout.split("\0")
    else:
        sources = ROOT / "sharded_adadiag.egg-info" / "SOURCES.txt"
        names = sources.read_text().splitlines()
    made = re.compile(r"sharded_adadiag\.egg-info/|setup\.cfg$|PKG-INFO$")
    return {name for name in names if name and not made.match(name)}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    """Built from a copy, because setuptools leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=folder / "tree", capture_output=True, check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        yield opened


def test_the_sdist_has_every_file_that_git_tracks(sdist: tarfile.TarFile) -> None:
    names = {name.partition("/")[2] for name in sdist.getnames()}
    assert len(tracked()) > 100
    assert tracked() - names == set()


def test_the_metadata_have_the_version_of_the_source(sdist: tarfile.TarFile) -> None:
    (name,) = [n for n in sdist.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", n)]
    metadata = sdist.extractfile(name).read().decode()
    assert f"\nVersion: {sharded_adadiag.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata


def test_the_changelog_begins_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (.+)$", text, re.MULTILINE)[1]
    release, _, unfinished = sharded_adadiag.__version__.partition(".dev")
    assert newest.startswith(f"Unreleased ({release})" if unfinished else release)


def test_the_citation_names_the_newest_release_and_the_papers() -> None:
    yaml = pytest.importorskip("yaml", reason="no YAML parser in this environment")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert cited["license"] == "Apache-2.0"
    for work in (cited, *cited["references"]):
        assert work["title"] and work["authors"] and work["type"]
    text = (ROOT / "CHANGELOG.md").read_text()
    release = re.search(r"^## (\d\S+) - (\S+)$", text, re.MULTILINE)
    assert (cited["version"], str(cited["date-released"])) == release.groups()
    papers = {work["url"].rpartition("/")[2] for work in cited["references"]}
    assert {"2502.07488", "2406.09958", "1804.04235", "1412.6980"} <= papers


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert len(text.splitlines()) == 202
