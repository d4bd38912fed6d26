"""PEFT's own tests, from its released sources, run on the rotation."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import peft
import pytest

HERE = Path(__file__).parent
FILES = ("custom_models", "decoder_models", "seq_classifier", "config")
CASES = "(HRA or hra or RotationConfig or (TestMixedAdapterBatches and RoAd))"
# What does not apply, and why.
LEFT_OUT = {
    "Conv2d": "a rotation is of linear layers, and refuses others by name",
    "test_requires_grad_hra": "names HRA's parameters",
    "test_from_pretrained": "downloads from the hub",
    "test_save_pretrained_with_runtime_config": "downloads from the hub",
    "test_save_pretrained_with_target_modules": "wants a set; ours stay a list, for files that "
    "are the same each time",
}


@pytest.mark.slow
def test_peft_released_tests_pass(tmp_path: Path, record_property):
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "-q"]
    pip += ["--no-binary", ":all:", "-d", str(tmp_path), f"peft=={peft.__version__}"]
    download = subprocess.run(pip, capture_output=True, text=True, timeout=60)
    if download.returncode:
        pytest.skip(f"PEFT's sources are out of reach: {download.stderr.strip()[-200:]}")
    (archive,) = tmp_path.glob("peft-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(tmp_path, filter="data")
    (tests,) = tmp_path.glob("peft-*/tests")
    tests.rename(tmp_path / "released")
    (tmp_path / "released" / "__init__.py").touch()
    shutil.copy(HERE / "released_conftest.py", tmp_path / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short"]
        + [f"released/test_{name}.py" for name in FILES]
        + ["-k", " and not ".join([CASES, *LEFT_OUT])],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1]), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    summary = run.stdout.strip().splitlines()[-1]
    record_property("table", f"PEFT {peft.__version__}'s own tests: {summary}")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", summary)[1]) > 300
