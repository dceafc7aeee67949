"""What all tests share: markers that skip with a reason, --update-golden, bare Python, a cache."""

from __future__ import annotations

import functools
import os
import shutil
import venv
from pathlib import Path

import numpy as np
import pytest

from bertile.loader import cpu_features
from bertile.targets.rows import TABLE
from bertile.tune.log import tuning_log

# pytest's workers share the cores: a thread of torch's that waits leaves its core to others. Read
# when torch is loaded; processes that tests start have it too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("isa"):
        missing = missing_features(marker.args[0])
        if missing:
            pytest.skip(f"this CPU lacks {' '.join(missing)}")
    if item.get_closest_marker("gpu") and shutil.which("nvidia-smi") is None:
        pytest.skip("this machine has no CUDA device (no nvidia-smi)")


def missing_features(name: str) -> list[str]:
    """What this CPU lacks of a target row's features, or of the one feature of that name."""
    rows = {row.name: row.features for row in TABLE}
    return sorted(set(rows.get(name, (name,))) - cpu_features())


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of a new virtual environment that has numpy and nothing else."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    packages = next(home.glob("lib/python*/site-packages"))
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (installed / name).exists():
            (packages / name).symlink_to(installed / name)
    return home / "bin" / "python"


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Commands in tests keep their stage results, and what they measure, apart from the user's.

    Not ziglang its C libraries, which take it half a minute to build for the first time.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        if "ZIG_GLOBAL_CACHE_DIR" not in os.environ:
            patch.setenv("ZIG_GLOBAL_CACHE_DIR", str(user / "zig"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        patch.setattr(tuning_log, "USER_LOG", tmp_path_factory.mktemp("log"))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_translation_table():
    """torch reads its table of ONNX operators, 0.6 s, once for all exports."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    once = functools.cache(ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(once))
        yield


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stage cache for all tests that compile the same models."""
    return str(tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A stage cache for models that several files need; pytest's workers share it."""
    root = tmp_path_factory.getbasetemp()
    return str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "stages")


@pytest.fixture(scope="session")
def exported(stages: str):
    """The two-layer model, exported once for all files that test stages with it."""
    from bertile.config import Config
    from bertile.export.cached import export_cached

    return export_cached("synthetic:bert-tiny", Config(cache_dir=stages))


@pytest.fixture(scope="session")
def llvm_mca():
    """Skips where llvm-mca is missing or too old; `make test` installs it where it may."""
    from bertile.base.errors import PlatformError
    from bertile.tune.estimate import mca

    try:
        return mca.tool(mca.MODELS["arm-a76"])
    except PlatformError as error:
        pytest.skip(str(error))
