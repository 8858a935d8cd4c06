"""The names that the package offers, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import selfdev
from selfdev.errors import UserError


def test_importing_the_package_does_not_wait_for_torch() -> None:
    code = "import sys, selfdev; assert 'torch' not in sys.modules; selfdev.load_config; selfdev.run"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", selfdev.__all__)
def test_every_offered_name_is_there(name: str) -> None:
    assert getattr(selfdev, name) is not None


def test_experts_without_names_are_told_how_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'as \{"math": "./math", "code": "./code"\}'):
        selfdev.merge("linear", "./seed", ["./math", "./code"], out=tmp_path / "out")  # type: ignore[arg-type]


def test_the_names_are_found_by_completion_and_errors_by_their_names() -> None:
    assert {"run", "open_run", "UserError", "Interrupted"} <= set(dir(selfdev))
    with pytest.raises(selfdev.UserError, match="no preset 'quikstart'"):
        selfdev.load_config("quikstart")


def test_what_is_typed_first_is_told_or_taken(tmp_path: Path) -> None:
    assert selfdev.load_config("quickstart", "seed=7").seed == 7  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"selfdev\.load_config\('quickstart'\)"):
        selfdev.run("quickstart")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="holds no run"):
        selfdev.resume(str(tmp_path))


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'rum'"):
        _ = selfdev.rum
