import signal
import threading

import pytest

from keras_srlora.backend.interrupts import held_interrupts

pytestmark = [
    pytest.mark.once,
    pytest.mark.usefixtures("ctrl_c_raises"),
]


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_interrupts():
            press_ctrl_c()
            press_ctrl_c()
            done.append("block")
        done.append("after")
    assert done == ["block"]
    # Once is enough, and the next one is not held.
    with pytest.raises(KeyboardInterrupt):
        press_ctrl_c()


def test_within_each_other_the_outer_one_holds():
    done = []
    with pytest.raises(KeyboardInterrupt):
        with held_interrupts():
            with held_interrupts():
                press_ctrl_c()
            done.append("outer")
    assert done == ["outer"]


def test_without_an_interrupt_the_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)
    with held_interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_the_block_comes_first():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(MemoryError):
        with held_interrupts():
            press_ctrl_c()
            raise MemoryError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_ignores_interrupts_goes_on():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_interrupts():
            press_ctrl_c()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_runs_its_block():
    done = []

    def work():
        with held_interrupts():
            done.append("block")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["block"]
