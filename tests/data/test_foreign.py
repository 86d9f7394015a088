"""Small files that claim to be large: refused before memory is taken for them."""

import io
import json
import pickle
import resource
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fm_stages.data import check_array, load_tensors, parse_json, read_json, read_yaml, read_yaml_file
from fm_stages.data.foreign import PIXELS, TEXT_BYTES, open_picture

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join(['*' + before] * 9)}]\n" for before, now in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def little_memory():
    """At most 1 GiB more than there is: what is not refused fails loudly."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class TestYaml:
    def test_plain_values(self):
        assert read_yaml("a: {b: [1, 2.5, x, null, true]}\nc: &d 3\ne: *d", "x") == {
            "a": {"b": [1, 2.5, "x", None, True]}, "c": 3, "e": 3
        }  # fmt: skip
        assert read_yaml("", "x") is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (ALIASES, "stands for more than 100000 values"),
            ("a: &a [*a]", "nested more than 64 deep, or holds itself|found unconstructable recursive node"),
            ("[" * 100 + "]" * 100, "nested more than 64 deep"),
            ("[" * 50_000 + "]" * 50_000, "nested too deeply"),
            ("x" * (TEXT_BYTES + 1), "characters of YAML"),
            ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
            ("{a: [}", "not YAML"),
            ("d: 2024-99-99", "not YAML: month"),
            ("? {a: b}\n: 1", "not YAML"),
            ("9" * 5000, "not YAML: Exceeds the limit"),
        ],
    )
    def test_what_would_become_large_or_is_none(self, text, message, tmp_path, little_memory):
        file = tmp_path / "strange.yaml"
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            read_yaml_file(file)
        assert str(file) in str(error.value)

    def test_what_is_no_text(self, tmp_path):
        (tmp_path / "x.yaml").write_bytes(b"\x7fELF\xff")
        with pytest.raises(ValueError, match="x.yaml: not YAML"):
            read_yaml_file(tmp_path / "x.yaml")


class TestJson:
    @pytest.mark.parametrize("text", ["{", "[" * 200_000, "9" * 5000, "\xff", ""])
    def test_names_the_file(self, text, tmp_path):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json is not JSON"):
            read_json(tmp_path / "x.json")

    def test_values(self):
        assert parse_json(b'{"a": [1, null]}', "x") == {"a": [1, None]}


class Claim:
    """A pickle that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(file: Path, value) -> Path:
    """As torch.save, with another pickle in it."""
    torch.save({"x": torch.zeros(4)}, file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(value, 2) if name.endswith("data.pkl") else content)
    return file


class TestTensors:
    def test_what_torch_saved(self, tmp_path):
        tree = {"a": torch.randn(3, 4).T, "b": [torch.zeros(2).expand(5, 2), 1, None, "x"], "c": torch.empty(0)}
        torch.save(tree, tmp_path / "x.pt")
        found = load_tensors(tmp_path / "x.pt")
        assert found["a"].equal(tree["a"])
        assert found["b"][0].equal(tree["b"][0])
        assert found["b"][1:] == [1, None, "x"]
        torch.save(tree, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        assert load_tensors(tmp_path / "old.pt")["a"].equal(tree["a"])

    def test_a_buffer_of_any_length(self, tmp_path, little_memory):
        file = saved(tmp_path / "x.pt", {"x": Claim(bytearray, 10**11)})
        with pytest.raises(ValueError, match="it makes a buffer of any size"):
            load_tensors(file)
        with (tmp_path / "old.pt").open("wb") as old:
            for part in (0x1950A86A20F9469CFC6C, 1001, {}, Claim(bytearray, 10**11), []):
                pickle.dump(part, old, 2)
        with pytest.raises(ValueError, match="it makes a buffer of any size"):
            load_tensors(tmp_path / "old.pt")

    def test_one_number_for_all(self, tmp_path):
        torch.save({"x": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"x of shape \(1000000, 1000000\) takes 4000000000000 bytes.* holds 4"):
            load_tensors(tmp_path / "x.pt")

    def test_shapes_without_values(self, tmp_path):
        torch.save({"a": [torch.empty(10**6, 10**6, device="meta")]}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=r"a\[0\] of shape .* holds 0"):
            load_tensors(tmp_path / "x.pt")

    def test_compressed_records(self, tmp_path, little_memory):
        file = tmp_path / "x.pt"
        torch.save({"x": torch.zeros(10**6)}, file)
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        assert file.stat().st_size < 10_000
        with pytest.raises(ValueError, match="is compressed .* which torch never does"):
            load_tensors(file)

    def test_no_code_runs(self, tmp_path):
        file = saved(tmp_path / "x.pt", {"x": Claim(open, str(tmp_path / "made"), "w")})
        with pytest.raises(Exception, match="Unsupported global"):
            load_tensors(file)
        assert not (tmp_path / "made").exists()


class TestArrays:
    @staticmethod
    def archive(file: Path, shape: tuple, kind: str = "|u1", content: bytes = b"") -> zipfile.ZipFile:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            new.writestr("arr_0.npy", header.getvalue() + content)
        return zipfile.ZipFile(file)

    def test_claims(self, tmp_path, little_memory):
        check_array(self.archive(tmp_path / "x.npz", (4, 2), content=bytes(8)), "arr_0.npy", 100)
        with pytest.raises(ValueError, match=r"\(1000000000000,\) takes 1000000000000 bytes"):
            check_array(self.archive(tmp_path / "x.npz", (10**12,), content=bytes(8)), "arr_0.npy", 2**40)
        with pytest.raises(ValueError, match="more than there is memory"):
            check_array(self.archive(tmp_path / "x.npz", (10**6,), content=bytes(10**6)), "arr_0.npy", 10**5)


def test_an_image_that_claims_many_pixels(tmp_path, little_memory):
    file = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(file)
    assert open_picture(file).size == (8, 8)
    content = bytearray(file.read_bytes())
    for sides in ((12_000, 12_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1)):
        content[16:24] = struct.pack(">II", *sides)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
        file.write_bytes(content)
        with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
            open_picture(file)
    assert PIXELS < 9_000**2


def test_the_limit_on_yaml_is_far_from_configurations():
    folder = Path(__file__).parents[2] / "configs"
    for file in folder.glob("*.yaml"):
        assert json.dumps(read_yaml_file(file), default=str)
