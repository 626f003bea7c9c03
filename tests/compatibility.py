"""Writes docs/compatibility.md: a row for each feature that a test proves, and the versions.

    pytest --compatibility=docs/compatibility.md

A test names its features: @pytest.mark.feature("group", "feature", "remark").
"""

import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGES = ("torch", "torchao", "transformers", "peft", "accelerate", "safetensors", "numpy")
HEAD = """# What works

Each row is a test; `pytest --compatibility=docs/compatibility.md` runs them and writes this page.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", type=Path, help="write the table of features there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "feature(group, name, remark): what the test proves to work")
    if config.getoption("--compatibility"):
        config.pluginmanager.register(Table(), "compatibility-table")


class Table:
    """Collects outcomes by feature: a feature works if all its tests pass."""

    def __init__(self) -> None:
        self.features: dict[tuple[str, str, str], list[str]] = {}
        self.names: dict[str, list[tuple[str, str, str]]] = {}
        self.files: dict[tuple[str, str, str], str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for mark in item.iter_markers("feature"):
                group, name, remark = (*mark.args, "")[:3]
                feature = group, name, remark
                self.features.setdefault(feature, [])
                self.files[feature] = f"{item.path.name}::{item.name.partition('[')[0]}"
                self.names.setdefault(item.nodeid, []).append(feature)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for feature in self.names.get(report.nodeid, []):
                self.features[feature].append(report.outcome)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        groups: dict[str, list[str]] = defaultdict(list)
        for (group, name, remark), outcomes in self.features.items():
            worst = next((o for o in ("failed", "skipped") if o in outcomes), "passed")
            result = {"passed": "works", "failed": "**fails**", "skipped": "not run here"}[worst]
            where = self.files[group, name, remark]
            groups[group].append(f"| {name} | {result} | {remark} | `{where}` |")
        versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
        text = (
            HEAD
            + f"Ran on Python {platform.python_version()}, {versions}; {platform.machine()}, CPU.\n"
        )
        for group, rows in groups.items():
            text += f"\n## {group}\n\n| feature | | remark | test |\n|---|---|---|---|\n"
            text += "\n".join(rows) + "\n"
        session.config.getoption("--compatibility").write_text(text)
