"""What is shown of a long step: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import io
import logging
import time

from prts import progress
from prts.progress import ConsoleLog, of_section, track, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_step_says_once_in_a_while_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.05)
    caplog.set_level(logging.INFO, "prts.progress")
    with of_section("lung1"):
        seen = [item for item in track("ab", "features") if time.sleep(0.14) is None]
    with working("gene panel"):
        time.sleep(0.08)
    assert seen == ["a", "b"]
    said = caplog.messages
    assert said[0] == "features lung1: running for 0 min, 0 of 2 done"
    assert any(line.startswith("features lung1: running for 0 min, 1 of 2 done") for line in said)
    assert said[-1] == "gene panel: running for 0 min"
    time.sleep(0.12)
    assert caplog.messages == said  # nothing is said of a step that is over


def test_a_short_step_says_nothing_in_a_log(caplog):
    caplog.set_level(logging.INFO)
    assert list(track(range(3), "features")) == [0, 1, 2]
    assert not caplog.messages


def test_a_terminal_has_one_bar_with_the_name_of_the_section(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    log = logging.Logger("x")
    log.addHandler(ConsoleLog(terminal))
    with of_section("lung1"), working("training"):
        log.info("epoch 1")
        assert list(track([1], "inner")) == [1]
    log.info("done")
    text = terminal.getvalue()
    assert "training lung1" in text
    assert "inner" not in text
    assert "\r\x1b[2Kepoch 1\n" in text
    assert not text.endswith("\r\x1b[2Kdone\n")  # no bar, nothing to clear
