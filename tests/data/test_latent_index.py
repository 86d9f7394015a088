"""The index of a folder of latents: what is written comes back, and files that differ from it are named."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from fm_stages.data import latent_index
from fm_stages.data.latent_index import (
    INDEX,
    LatentIndex,
    Shard,
    check_shards,
    compare_checksums,
    locked,
    read_index,
    write_index,
)


@pytest.fixture
def folder(tmp_path):
    """Three shards of 4, 4 and 2 rows with their index."""
    kinds = {"latents": {"dtype": "float32", "shape": [2, 3, 3]}, "labels": {"dtype": "int64", "shape": []}}
    index = LatentIndex(10, 4, kinds, ["a"], {"name": "vae"}, {"seed": 0}, {"file": "sources.txt"})
    for number in range(index.num_shards):
        num = len(index.rows_of(number))
        file = tmp_path / index.file_of(number)
        save_file({"latents": torch.randn(num, 2, 3, 3), "labels": torch.zeros(num, dtype=torch.int64)}, file)
        index.shards[number] = Shard(file.name, num, file.stat().st_size, latent_index.sha256_of(file))
    write_index(tmp_path, index)
    return tmp_path


def verify(folder, index):
    check_shards(folder, index)
    compare_checksums(folder, index, range(index.num_shards))


def test_an_index_comes_back(folder):
    index = read_index(folder)
    assert index.complete
    assert [len(index.rows_of(number)) for number in range(3)] == [4, 4, 2]
    assert index.shards[2].num_rows == 2
    verify(folder, index)
    del index.shards[1]
    write_index(folder, index)
    again = read_index(folder)
    assert again == index
    assert not again.complete
    with pytest.raises(ValueError, match="encoded in part, 2 of 3 shards"):
        check_shards(folder, again)
    check_shards(folder, again, shards=range(1))


def test_names_sort_as_the_rows_do():
    index = LatentIndex(12_345, 1, {}, [], {}, {}, {})
    names = [index.file_of(number) for number in range(index.num_shards)]
    assert names == sorted(names)
    assert LatentIndex(10, 4, {}, [], {}, {}, {}).file_of(1) == "latents_rank00_shard001.safetensors"


def other_shape(file):
    save_file({"latents": torch.zeros(4, 2, 3, 2), "labels": torch.zeros(4, dtype=torch.int64)}, file)


def other_dtype(file):
    save_file({"latents": torch.zeros(4, 2, 3, 3).half(), "labels": torch.zeros(4, dtype=torch.int64)}, file)


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "is missing": lambda file: file.unlink(),
    "bytes": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "checksum": flip_a_byte,
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_shard_is_named(folder, said):
    index = read_index(folder)
    file = folder / index.file_of(1)
    DAMAGE[said](file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{said}.*(encode|copy)"):
        verify(folder, index)


def test_checksums_can_be_shared_out(folder):
    index = read_index(folder)
    flip_a_byte(folder / index.file_of(1))
    compare_checksums(folder, index, range(index.num_shards)[0::2])
    with pytest.raises(ValueError, match="shard001.*checksum"):
        compare_checksums(folder, index, range(index.num_shards)[1::2])


@pytest.mark.parametrize("make", [other_shape, other_dtype])
def test_a_shard_of_another_kind_is_named(folder, make):
    index = read_index(folder)
    file = folder / index.file_of(1)
    make(file)
    index.shards[1].num_bytes = file.stat().st_size
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} holds latents as"):
        check_shards(folder, index)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not an index"), ("[]", "not an index"), ('{"version": 1}', "not an index"), ('{"version": 2}', "index")],
)
def test_a_foreign_index_is_refused(tmp_path, text, said):
    assert read_index(tmp_path) is None
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=said):
        read_index(tmp_path)


def test_a_newer_index_is_refused(folder):
    plain = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**plain, "version": 2}))
    with pytest.raises(ValueError, match="is of version 2, .* reads version 1"):
        read_index(folder)


def test_a_lock_is_held_against_other_processes_and_free_once_they_are_gone(tmp_path):
    hold = (
        "import pathlib, sys, time; from fm_stages.data.latent_index import locked\n"
        f"with locked(pathlib.Path({str(tmp_path)!r}), 'encode'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"), locked(tmp_path, "encode", timeout_sec=0):
            pass
        other.kill()
        other.wait()
    with locked(tmp_path, "encode", timeout_sec=5):
        pass
