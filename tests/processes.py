"""Child processes that find Keras and KerasHub imported.

They are forked from a process that imported these and the backend, and did
nothing else. The import is most of the time that a small script takes.
"""

import multiprocessing
import os
import runpy
import sys

CONTEXT = multiprocessing.get_context("forkserver")
# What is not installed is passed over.
CONTEXT.set_forkserver_preload(["keras", "keras_hub"])


class Child:
    """A function that runs in a child process.

    Args:
        function: of a module that the tests can import.
        arguments: its positional arguments.
        log: path of a file to which the child prints.
        environment: dict of variables, set before the backend starts.
    """

    def __init__(self, function, arguments, log, environment=()):
        self._log = log
        self._process = CONTEXT.Process(
            target=_run,
            args=(str(log), dict(environment), function, arguments),
        )
        self._process.start()

    def kill(self):
        self._process.kill()
        self._process.join()

    def assert_ends(self, exit_code=0, timeout=900):
        """Returns what the child printed; `-n` is the code of signal `n`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            # It may wait for another one that failed.
            self.kill()
        with open(self._log, errors="replace") as file:
            printed = file.read()
        assert self._process.exitcode == exit_code, printed[-4000:]
        return printed


def optimize_no_graphs():
    """Turns off what takes most of the time of a small TensorFlow graph."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": True}
        )


def run_script(path, arguments):
    """What `python path arguments...` does in the folder of the script."""
    folder = os.path.dirname(path)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def run_code(code, arguments=()):
    """What `python -c code arguments...` does."""
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def _run(log, environment, function, arguments):
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for printed in (1, 2):
        os.dup2(file, printed)
    os.environ.update(environment)
    if function is not run_script:
        # Bit-equal to what the tests compute. Scripts run as users run them.
        optimize_no_graphs()
    function(*arguments)
