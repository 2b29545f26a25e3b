"""The package as a package: what it imports, what it exports, what it uses."""

import pathlib
import subprocess
import sys

import keras
import pytest

import keras_srlora

ROOT = pathlib.Path(keras_srlora.__file__).parent


def test_import_brings_no_other_backend_and_no_extra():
    backend = keras.backend.backend()
    others = {"tensorflow", "jax", "torch"} - {backend}
    extras = {"keras_hub", "tensorflow_datasets", "matplotlib"}
    program = (
        "import sys, keras\n"
        "before = set(sys.modules)\n"
        "import keras_srlora\n"
        "print(*{m.split('.')[0] for m in set(sys.modules) - before})\n"
    )
    added = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()[-1]
    assert "keras_srlora" in added.split()
    assert not (others | extras) & set(added.split())


@pytest.mark.once
def test_everything_public_is_documented():
    for name in keras_srlora.__all__:
        assert getattr(keras_srlora, name).__doc__, name
    api = ROOT.parent / "docs" / "api.md"
    if not api.exists():
        pytest.skip("installed without the documentation")
    text = api.read_text()
    missing = [
        n
        for n in keras_srlora.__all__
        if n != "__version__" and f"keras_srlora.{n}" not in text
    ]
    assert not missing
