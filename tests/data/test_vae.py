"""The VAE against diffusers' own calls on the same weights, and what is said of folders that hold none."""

import json
import re
import shutil
import time

import huggingface_hub.constants
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from fm_stages.data import load_vae
from fm_stages.data.vae import WEIGHTS


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def folder(write_vae, tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae"))


class TestNumbers:
    def test_moments_and_images_are_those_of_float64(self, folder, images):
        vae = load_vae(str(folder))
        model = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).double().eval()
        with torch.no_grad():
            posterior = model.encode(images.double()).latent_dist
            expected = model.decode(posterior.mean).sample.clamp(-1, 1)
        mean, std = vae.moments(images)
        assert (vae.channels, vae.factor, vae.gaussian) == (4, 4, True)
        assert mean.dtype == std.dtype == torch.float32
        assert mean.shape == (3, 4, 8, 8)
        torch.testing.assert_close(mean.double(), posterior.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(std.double(), posterior.std, rtol=1e-5, atol=1e-5)
        decoded = vae.decode(mean)
        torch.testing.assert_close(decoded.double(), expected, rtol=1e-5, atol=1e-5)
        assert (expected.abs() == 1).any()  # so that it is cut off

    def test_bf16_is_near(self, folder, images):
        (mean, std), (mean16, std16) = (load_vae(str(folder), precision=p).moments(images) for p in ("fp32", "bf16"))
        assert mean16.dtype == std16.dtype == torch.float32
        error = (mean16 - mean).square().mean().sqrt() / mean.std()
        assert 1e-4 < error < 0.03  # rounded, as asked for, but no more than that
        assert (std16 / std - 1).abs().max() < 0.05
        assert not std16.equal(std16.bfloat16().float())  # the logarithm is of bfloat16, its exponential is not

    def test_weights_and_configuration_tell_vaes_apart(self, folder, write_vae, tmp_path):
        record = load_vae(str(folder)).record
        assert record["name"] == str(folder)
        assert (record["kind"], record["scaling_factor"], record["shift_factor"]) == ("AutoencoderKL", 0.18215, 0.0)
        assert load_vae(str(shutil.copytree(folder, tmp_path / "copy"))).sha256 == record["sha256"]
        other = load_vae(str(write_vae(tmp_path / "pipeline/vae", seed=1, shift_factor=0.1).parent))
        assert other.shift_factor == 0.1
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "copy/config.json").write_text(json.dumps({**config, "norm_num_groups": 4}))
        assert len({record["sha256"], other.sha256, load_vae(str(tmp_path / "copy")).sha256}) == 3

    def test_an_encoder_without_a_distribution(self, tmp_path, images):
        torch.manual_seed(0)
        widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        model = AutoencoderTiny(**widths, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4).eval()
        model.save_pretrained(tmp_path)
        vae = load_vae(str(tmp_path))
        mean, std = vae.moments(images)
        assert (vae.factor, vae.gaussian) == (8, False)
        with torch.no_grad():
            assert mean.equal(model.encode(images).latents)
        assert not std.any()
        assert vae.decode(mean).shape == images.shape


class TestBadInput:
    def test_sides_that_the_factor_does_not_divide(self, folder, images):
        with pytest.raises(ValueError, match="30x32 pixels .* multiples of 4"):
            load_vae(str(folder)).moments(images[..., :30])

    @pytest.mark.parametrize(
        ("break_it", "said"),
        [
            (lambda folder: (folder / "config.json").unlink(), "is no VAE in diffusers' layout"),
            (lambda folder: (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin"), "pickles are not read"),
            (lambda folder: (folder / WEIGHTS).write_bytes(b"{}"), "cannot read a VAE"),
            (lambda folder: (folder / "config.json").write_text("{"), "cannot read a VAE"),
            (lambda folder: (folder / "config.json").write_text('{"_class_name": "utils"}'), "cannot read a VAE"),
        ],
    )
    def test_folders_that_hold_no_vae(self, folder, tmp_path, break_it, said):
        broken = shutil.copytree(folder, tmp_path / "broken")
        break_it(broken)
        with pytest.raises(ValueError, match=f"{re.escape(str(broken))}.*{said}|{said}.*{re.escape(str(broken))}"):
            load_vae(str(broken))

    def test_another_model_of_diffusers(self, tmp_path):
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
        UNet2DModel(**blocks).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="UNet2DModel, which encodes no RGB images"):
            load_vae(str(tmp_path))

    def test_other_words(self, folder):
        with pytest.raises(ValueError, match="precision 'fp16': there are fp32 and bf16"):
            load_vae(str(folder), precision="fp16")
        with pytest.raises(ValueError, match="revision main is of a name on the hub"):
            load_vae(str(folder), revision="main")


class TestHub:
    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def test_what_was_downloaded_is_read_without_a_network(self, folder, tmp_path):
        repository = tmp_path / "cache/models--owner--name"
        shutil.copytree(folder, repository / "snapshots/0123abc/vae")
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("0123abc")
        record = load_vae("owner/name").record
        assert (record["name"], record["revision"]) == ("owner/name", "0123abc")
        assert record["sha256"] == load_vae(str(folder)).sha256

    def test_without_a_network_it_says_at_once_what_to_fetch(self, monkeypatch):
        """The hub's client would wait between its attempts, 23 s in all."""
        waits: list[float] = []
        monkeypatch.setattr(time, "sleep", waits.append)
        with pytest.raises(FileNotFoundError, match="cannot be reached for owner/name .*--revision v1 --local-dir"):
            load_vae("owner/name", revision="v1")
        assert waits == []

    def test_a_path_that_is_not_there(self):
        with pytest.raises(FileNotFoundError, match="there is no folder /no/such/folder, nor is"):
            load_vae("/no/such/folder")
