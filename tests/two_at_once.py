"""Run the suite in two processes where there are two cores: half the time, and no further package.

This process starts a second pytest with the same options. One goes through the test files from the first to the last,
the other from the last to the first; each claims a file before it runs it, by creating an empty one of that number,
which only one of the two can do. Whole files, since what their fixtures make is then made once. The second writes its
reports, a line of JSON each, and the first prints and counts them as if they were its own.

`--alone` keeps all tests in one process. So do single files, and options that need one process: -x, -s, a debugger, the
choice by earlier failures, a temporary folder of one's own.
"""
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

SECOND = "MINIPALI_SECOND_PYTEST"  # in the second process the folder that both share
LONGEST = "test_xray_browser.py"  # a quarter of the time where there is a browser
THROUGH = "through"  # the second process's last line


def pytest_addoption(parser):
    parser.addoption("--alone", action="store_true", help="run all tests in one process, one after another")


def pytest_configure(config):
    """The second process sends its reports; processes that the tests start are not second ones."""
    if shared := os.environ.pop(SECOND, None):
        config.shared = Path(shared)
        config.sender = Sender(config)
        config.pluginmanager.register(config.sender)


class Sender:
    """In the second process: one line of JSON for each report."""

    def __init__(self, config):
        self.config, self.file = config, open(config.shared / "reports", "w", encoding="utf-8")

    def send(self, data):
        self.file.write(json.dumps(data) + "\n")
        self.file.flush()

    def pytest_runtest_logreport(self, report):
        self.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


class Receiver:
    """In the first process: the second one, and its reports as far as they have come."""

    def __init__(self, config, shared):
        self.config, self.shared, self.part, self.through = config, shared, "", False
        self.file = open(shared / "reports", "a+", encoding="utf-8")
        self.file.seek(0)
        command = [sys.executable, "-m", "pytest", *config.invocation_params.args, "-p", "no:cacheprovider"]
        self.process = subprocess.Popen(command, env=os.environ | {SECOND: str(shared)}, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, cwd=config.invocation_params.dir)

    def pass_on(self):
        """Report what has been reported to us since the last time."""
        *lines, self.part = (self.part + self.file.read()).split("\n")
        for data in map(json.loads, lines):
            if data == THROUGH:
                self.through = True
                return
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            self.config.hook.pytest_runtest_logreport(report=report)

    def wait(self):
        """Until the second process is through; -> whether it came so far."""
        while self.process.poll() is None and not self.through:
            self.pass_on()
            time.sleep(0.02)
        self.pass_on()
        return self.through

    def end(self):
        self.process.kill()
        self.process.wait()
        self.file.close()


def needs_one_process(config):
    """Whether a second process would not help, or would not do the same."""
    ours = "alone", "collectonly", "usepdb", "trace", "maxfail", "basetemp", "lf", "failedfirst", "newfirst", "stepwise"
    return (any(getattr(config.option, name, None) for name in ours) or config.option.capture == "no"
            or not all(Path(name).is_dir() for name in config.args) or (os.cpu_count() or 1) < 2)


def run(session, files, shared, after_each):
    """Run the files that the other process has not claimed."""
    for number, items in files:
        try:
            (shared / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        for item, following in zip(items, [*items[1:], None]):  # None: what the file's fixtures made is given up
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            after_each()
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """The second process starts before this one collects, and collects at the same time."""
    config = session.config
    if not hasattr(config, "shared") and not needs_one_process(config):
        shared = tempfile.TemporaryDirectory()
        config.add_cleanup(shared.cleanup)
        config.second = Receiver(config, Path(shared.name))
        config.add_cleanup(config.second.end)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    config = session.config
    files = [list(items) for _, items in itertools.groupby(session.items, key=lambda item: item.path)]
    # The longest file first: begun last, one process would still be at it when the other has nothing left.
    files = list(enumerate(sorted(files, key=lambda items: items[0].path.name != LONGEST)))
    if hasattr(config, "shared"):
        run(session, files[::-1], config.shared, lambda: None)
        config.sender.send(THROUGH)
        return True
    if not hasattr(config, "second") or session.testsfailed:
        return None  # pytest's own loop
    run(session, files, config.second.shared, config.second.pass_on)
    if not config.second.wait():
        session.shouldfail = (f"the second process ended with status {config.second.process.wait()} before it was "
                              "through; --alone runs all tests in this one")
        raise session.Failed(session.shouldfail)
    return True
