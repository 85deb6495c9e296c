"""Honest skips: a test that cannot run here says why, and the end of the run lists every reason.

With CI=true the run fails unless each reason begins with one of `CI_MAY_SKIP`; the rest can run.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

CI_MAY_SKIP = ("needs a GPU", "needs a CPU with")


def skip_reasons(config) -> Counter[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = reporter.stats.get("skipped", []) if reporter else []
    return Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)


def not_allowed(reasons: Counter[str]) -> list[str]:
    return [reason for reason in reasons if not reason.startswith(CI_MAY_SKIP)]


def pytest_sessionfinish(session, exitstatus):
    if (
        os.environ.get("CI") == "true"
        and exitstatus == 0
        and not_allowed(skip_reasons(session.config))
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    reasons = skip_reasons(config)
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:5}  {reason}")
    if os.environ.get("CI") == "true":
        for reason in not_allowed(reasons):
            terminalreporter.line(f"FAILED: in CI a test may not skip because: {reason}", red=True)
