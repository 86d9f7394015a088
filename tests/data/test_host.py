"""What a process finds out about its machine."""

from pathlib import Path

import pytest

from fm_stages.data import available_memory_bytes, host

GIB = 2**30


def write_group(folder: Path, limit: str, used: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\n")


@pytest.fixture
def groups(tmp_path, monkeypatch) -> Path:
    """The control groups of a machine with 8 GiB left, of which this process is in /job/step."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {8 * 2**20} kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(host, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host, "CONTROL_GROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


class TestAvailableMemory:
    def test_without_limits_it_is_that_of_the_machine(self, groups):
        assert available_memory_bytes() == 8 * GIB
        write_group(groups / "job/step", "max")
        assert available_memory_bytes() == 8 * GIB

    def test_a_limit_leaves_what_is_not_used_but_for_the_cache(self, groups):
        write_group(groups / "job/step", str(6 * GIB), used=3 * GIB, cached=GIB)
        assert available_memory_bytes() == 4 * GIB

    def test_the_narrowest_limit_counts_however_far_out(self, groups):
        write_group(groups / "job/step", str(6 * GIB))
        write_group(groups / "job", str(2 * GIB))
        assert available_memory_bytes() == 2 * GIB
        write_group(groups, str(GIB))  # of a container, which sees its own group as the outermost
        assert available_memory_bytes() == GIB

    def test_nothing_is_left_of_a_limit_that_is_reached(self, groups):
        write_group(groups / "job/step", str(GIB), used=2 * GIB)
        assert available_memory_bytes() == 0

    def test_other_systems_have_no_such_files(self, groups):
        for file in ("meminfo", "self/cgroup"):
            (host.PROC / file).unlink()
        assert available_memory_bytes() > 2**26


@pytest.mark.parametrize(("ranks", "number"), [("1", 12), ("5", 2), ("100", 1)])
def test_ranks_of_a_machine_share_its_processors(monkeypatch, ranks, number):
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(12), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert host.num_processors() == number
