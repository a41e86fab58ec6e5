"""A limit of time for code from files."""

import signal
import threading
import time

import pytest
from helpers.tiny import make_model, make_tokenizer

from sparselet.errors import ModelError
from sparselet.generation import prompts
from sparselet.generation.prompts import prompt_format
from sparselet.io.time_limit import time_limit


def busy(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_what_takes_too_long_is_stopped_and_nothing_is_left():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"longer than 0\.1 seconds"), time_limit(0.1):
        busy(20)
    with time_limit(20):
        busy(0.01)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_alarm_that_is_set_goes_before():
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with time_limit(0.05):
            busy(0.2)
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_other_threads_have_no_limit():
    done = []

    def work():
        with time_limit(0.05):
            busy(0.2)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [FOREVER, "{{ 1 / 0 }}", "{{ raise_exception('\x1b[2J') }}", "{{", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"],
)
def test_a_template_that_loops_or_fails_is_refused(monkeypatch, template):
    monkeypatch.setattr(prompts, "_TEMPLATE_SECONDS", 0.3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match="chat template cannot ask a user's question"):
        prompt_format(make_model(), tokenizer, True)
