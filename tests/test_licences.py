"""requirements/licences.csv: a licence for each package of the lock."""

from pathlib import Path

import pytest

from tools import licences


def test_every_locked_package_has_its_licence_listed() -> None:
    known = licences.listed()
    assert list(known) == licences.locked()
    assert all(known.values())


def test_what_is_installed_says_the_same() -> None:
    known = licences.listed()
    assert {name: known[name] for name in known if licences.licence(name)} == {
        name: told for name in known if (told := licences.licence(name))
    }


def test_a_package_without_a_licence_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(licences, "LIST", tmp_path / "licences.csv")
    monkeypatch.setattr(licences, "locked", lambda: ["torch", "nosuch"])
    assert licences.main() == 1
    assert capsys.readouterr().err.startswith("nosuch: no licence is known")
    assert list(licences.listed()) == ["torch", "nosuch"]
