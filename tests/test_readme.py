"""What the README and the documentation say is so: their commands, configs, code, links and figures."""

import ast
import importlib
import re
import subprocess
from pathlib import Path

import pytest

import selfdev
from selfdev.algorithms.library import methods
from selfdev.algorithms.screening import PROBES, TOLERANCE
from selfdev.algorithms.source import wrap_short
from selfdev.cli import main
from selfdev.config import load_config
from selfdev.sandbox.syntax import ALLOWED_IMPORTS
from selfdev.zoo import zoo_models

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRACT = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for its_language, block in fenced if its_language == language]


def commands() -> list[str]:
    """Every command that the README names, on a line of its own or in a line of text."""
    alone = [line for block in blocks(README, "") for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", prose)
    return sorted({line.strip() for line in alone + inline if re.match(r"(selfdev|make) \S", line.strip())})


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("selfdev ")])
def test_each_command_and_its_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()[1:]
    path = words[: 2 if words[0] == "zoo" else 1]
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in words if option.startswith("--"))


def test_the_readme_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    listed = capsys.readouterr().out.partition("Commands:")[2]
    assert {line.split()[1] for line in commands() if line.startswith("selfdev ")} == {
        line.split()[0] for line in listed.splitlines() if re.match(r"  \w", line)
    }


def test_options_in_prose_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("run", "evaluate", "export", "merge", "show"):
        main([command, "--help"])
    shown = capsys.readouterr().out
    named = re.findall(r"`(--[\w-]+)", README)
    assert named
    assert all(option in shown for option in named)


@pytest.mark.parametrize("text", blocks(README, "yaml"))
def test_each_config_is_valid(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    assert load_config(str(file)).name in text


@pytest.mark.parametrize("command", [line for line in commands() if "--set" in line])
def test_each_change_is_valid(command: str) -> None:
    words = command.split()
    changes = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    if words[2] == "quickstart":
        load_config("quickstart", changes)


@pytest.mark.parametrize("text", blocks(README, "python"))
def test_the_python_names_exist(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "selfdev"
        ):
            assert hasattr(selfdev, node.attr)


@pytest.mark.parametrize(
    "target", sorted({line.split()[1] for line in commands() if line.startswith("make ")})
)
def test_each_make_target_exists(target: str) -> None:
    asked = ["make", "--dry-run", "VENV=/nonexistent/venv", target]
    subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_ci_runs_the_test_command_of_the_readme_and_the_checks() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "make test" in commands()
    assert re.search(r"^make test\b", script, re.MULTILINE)
    assert re.search(r"^make check\b", script, re.MULTILINE)
    assert re.search(r"^make test-unprivileged\b", script, re.MULTILINE)


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_each_linked_file_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link


def test_the_zoo_is_as_described() -> None:
    models = zoo_models("nano")
    assert len(models["experts"]) + 1 == 5
    assert "five small models" in README
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"{len(methods())} methods" in changes
    assert len(load_config("quickstart").rivals) == 7
    assert "seven tuned methods" in " ".join(changes.split())


def test_the_short_form_is_wrapped_as_shown() -> None:
    short, wrapped = (block for block in blocks(CONTRACT, "python") if "merge_average" in block)
    assert wrap_short(short) == wrapped


def test_the_numbers_of_screening_are_those_of_the_code() -> None:
    text = " ".join(CONTRACT.split())
    sizes = [probe.task_vectors[0].numel() for probe in PROBES]
    assert [len(probe.task_vectors) for probe in PROBES] == 6 * [4] + 6 * [2]
    assert "six with 4 experts and six with 2" in text
    assert f"size ({min(sizes)} to {max(sizes):,} entries)" in text
    assert f"at most {TOLERANCE:g} of the norm" in text
    assert TOLERANCE == 0.01
    most = max(len(method.grid(4)) for method in methods().values())
    assert f"up to {most} settings" in text


def test_the_imports_of_the_contract_are_those_of_the_jail() -> None:
    [listed] = re.findall(r"`import` reaches (.*?), and nothing else", " ".join(CONTRACT.split()))
    assert set(re.split(r", | and ", listed)) == ALLOWED_IMPORTS
