"""What all tests share: one thread, no network, no account, and a temporary place for what wandb keeps."""

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest
import torch

# Read when a run starts, and by the processes that tests start.
_WANDB = tempfile.TemporaryDirectory(prefix="fm-stages-wandb-", ignore_cleanup_errors=True)
os.environ.update(
    {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        **{f"WANDB_{name}": "240" for name in ("INIT_TIMEOUT", "X_SERVICE_WAIT")},  # sec, on however busy a machine
        **{f"WANDB_{name}_DIR": _WANDB.name for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
        "OMP_NUM_THREADS": "1",
        "FM_STAGES_ALLOW_IMPORT": "tests",  # networks and data of their own
    }
)
for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
    os.environ.pop(name, None)

torch.set_num_threads(1)  # the machine is shared, and sums are then always made in the same order

hypothesis.settings.register_profile(
    "fm-stages", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("fm-stages")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Found .* module.* in eval mode")  # the frozen twin


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _own_wandb_service():
    """wandb's service keeps the folder that it was started in, and relative paths of later runs would lead there."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is None:
        return
    if wandb.run is not None:  # a logger of a later test would take it for its own
        with contextlib.suppress(Exception):  # of a service that a test has killed
            wandb.finish()
        wandb.run = None
    wandb.teardown()


@pytest.fixture(autouse=True, scope="session")
def _no_network():
    """Only this machine can be reached: a test that waits for another one would be slow, or pass for the weather."""
    connect = socket.socket.connect

    def connect_here(self: socket.socket, address) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
            raise OSError(f"a test tried to reach {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(scope="session")
def launch() -> Callable[..., list]:
    """Start a script on several ranks; what each left in its ``rank<r>.pt``. A hang ends in a failure."""

    def start(script: Path, folder: Path, num_ranks: int, device: str, timeout_sec: int = 240) -> list:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
        running = subprocess.Popen(
            [*command, str(script), str(folder), device],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = running.communicate(timeout=timeout_sec)
        except subprocess.TimeoutExpired:
            running.terminate()  # which it hands on to the ranks
            output, _ = running.communicate(timeout=40)
            pytest.fail(f"{num_ranks} ranks do not come to an end:\n{output[-6000:]}")
        assert running.returncode == 0, output[-6000:]
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(num_ranks)]

    return start


@pytest.fixture(scope="session")
def write_vae() -> Callable[..., Path]:
    """Saves a small AutoencoderKL with random weights: latents of 4 channels, a fourth of the image's side."""

    def write(folder: Path, seed: int = 0, **config) -> Path:
        from diffusers import AutoencoderKL

        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
        AutoencoderKL(**blocks, block_out_channels=(8, 8, 16), norm_num_groups=8, **config).save_pretrained(folder)
        return folder

    return write


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname())


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Calls the command in an empty folder; returns its status and what it printed."""
    from fm_stages import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # which fit sets: so that it is unset afterwards
    monkeypatch.setenv("FM_STAGES_ALLOW_IMPORT", os.environ["FM_STAGES_ALLOW_IMPORT"])  # and --allow-import this

    def run(*arguments) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["fm-stages", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status or 0, out=out, err=err)

    return run
