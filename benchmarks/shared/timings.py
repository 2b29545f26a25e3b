"""Training loops that take turns in one process, and the time of their steps.

A machine is not equally fast at all times, so only ratios of what ran side by
side mean something. Each loop is a real one, `fit` or another; it runs in a
greenlet, is stopped between two steps, and goes on when it is its turn again.
"""

import time

import greenlet
import numpy as np


class Loop:
    """A training loop that runs a few steps at a time.

    Args:
        train: function of `before_step`, a function that it calls before each
            step. It goes on for longer than anyone asks it to.
        wait: function that returns when all that was begun has ended.
    """

    def __init__(self, train, wait=lambda: None):
        self._wait = wait
        self._left = 0
        self._greenlet = greenlet.greenlet(lambda: train(self._before_step))

    def _before_step(self):
        if self._left == 0:
            self._wait()
            self._greenlet.parent.switch()
        self._left -= 1

    def run(self, steps):
        """Runs some steps; returns the seconds of one."""
        self._left = steps
        start = time.perf_counter()
        self._greenlet.switch()
        if self._greenlet.dead:
            raise RuntimeError("The loop has ended by itself.")
        return (time.perf_counter() - start) / steps

    def end(self):
        self._greenlet.throw()


def interleave(loops, rounds, steps, warm_up=3):
    """Seconds of a step, `{name: list of one number a round}`.

    Args:
        loops: dict of `Loop`s.
        rounds: int. In each, every loop has one turn; the order rotates.
        steps: int. Steps of a turn.
        warm_up: int. Steps of each loop that are not counted.
    """
    for loop in loops.values():
        loop.run(warm_up)
    names = list(loops)
    seconds = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(loops[name].run(steps))
    for loop in loops.values():
        loop.end()
    return seconds


def ratio(seconds, name, other):
    """`(median, lower, upper)` quartiles of the ratio within each round."""
    ratios = np.divide(seconds[name], seconds[other])
    lower, median, upper = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(median), float(lower), float(upper)
