import logging
import time

import pytest

from resq_rl.experiments.runs import progress
from resq_rl.experiments.runs.progress import stage


def test_without_a_terminal_lines_tell_the_remaining_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "resq_rl"), stage("measuring", 40) as advance:
        for _ in range(10):
            now += 3.5 * progress.SPOKEN_SECONDS / 10
            advance(4)
    texts = [record.message for record in caplog.records]
    # By hand: lines after 63, 126 and 189 s, which are 30, 60 and 90% of 210 s.
    assert texts == [
        "measuring ...",
        "measuring: 30%, about 2 min left",
        "measuring: 60%, about 84 s left",
        "measuring: 90%, about 21 s left",
        "measuring: 210 s",
    ]
