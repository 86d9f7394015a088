"""Extractors: what a network has to do to be one, where weights come from, and what each makes of images."""

import hashlib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from fm_stages.studies import ClassifierFeatures, DinoFeatures, InceptionFeatures
from fm_stages.studies.features.classifier import Classifier, write_classifier
from fm_stages.studies.features.extractor import Extractor
from fm_stages.studies.features.weights import REACH_SEC, find_weights

SHAPE = (1, 8, 8)
IMAGES = torch.randint(256, (5, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Given(nn.Module):
    """Gives whatever it was made with."""

    def __init__(self, give):
        super().__init__()
        self.give = give

    def forward(self, images):
        return self.give(images)


def extractor(give) -> Extractor:
    return Extractor.of(Given(give), SHAPE, torch.device("cpu"))


class TestAnyNetwork:
    def test_features_alone(self):
        found = extractor(lambda x: x.flatten(1).double())
        features, logits = found(IMAGES)
        assert (found.num_features, found.num_classes, logits) == (64, None, None)
        assert features.dtype == torch.float32
        assert features.tolist() == IMAGES.flatten(1).tolist()

    def test_features_and_logits(self):
        found = extractor(lambda x: (x.flatten(1).float(), x.flatten(1)[:, :3].float()))
        assert (found.num_features, found.num_classes) == (64, 3)
        assert found(IMAGES)[1].tolist() == IMAGES.flatten(1)[:, :3].tolist()

    def test_weights_tell_networks_apart(self):
        one, other = (
            Extractor.of(nn.Sequential(_ToFloat(), nn.Linear(64, 3)), SHAPE, torch.device("cpu")) for _ in "ab"
        )
        assert len(one.record["weights_sha256"]) == 64
        assert one.record["weights_sha256"] != other.record["weights_sha256"]
        assert not one.module.training

    @pytest.mark.parametrize(
        ("give", "complaint"),
        [
            (lambda x: x.float(), r"Given gives shape \(2, 1, 8, 8\) for 2 images: features are \(B, F\)"),
            (lambda x: x.flatten(1).float().mean(1), r"Given gives shape \(2,\) for 2 images"),
            (lambda x: x.flatten(1)[:1], r"Given gives shape \(1, 64\) for 2 images"),
            (lambda x: x.flatten(1)[:, :0], r"Given gives shape \(2, 0\) for 2 images"),
            (lambda x: {"features": x}, "Given gives dict for 2 images"),
            (lambda x: (x.flatten(1), "cat"), "Given gives str for 2 images"),
            (lambda x: x.flatten(1) @ torch.zeros(3, 3), r"Given fails on images of 1x8x8 \(RuntimeError"),
        ],
    )
    def test_what_gives_no_features(self, give, complaint):
        with pytest.raises(ValueError, match=complaint):
            extractor(give)

    def test_features_that_are_not_finite(self):
        found = extractor(lambda x: x.flatten(1).float() / (x.flatten(1).float().sum(1, keepdim=True) - 3))
        with pytest.raises(ValueError, match="Given gives features that are not finite"):
            found(torch.ones(1, *SHAPE, dtype=torch.uint8) * torch.eye(8, dtype=torch.uint8) * 0 + _three())


def _three() -> torch.Tensor:
    image = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    image[0, 0, 0, 0] = 3
    return image


class _ToFloat(nn.Module):
    def forward(self, x):
        return x.flatten(1).float()


class TestWeights:
    URL = "https://example.invalid/weights-abc.pth"

    def test_a_named_file(self, tmp_path):
        file = tmp_path / "w.pth"
        file.write_bytes(b"weights")
        digest = hashlib.sha256(b"weights").hexdigest()
        assert find_weights(str(file), None, self.URL, "w") == (file, digest)
        assert find_weights(str(file), digest.upper(), self.URL, "w") == (file, digest)
        with pytest.raises(ValueError, match=f"{file} has the sha256 {digest}, not 00ff: it is another file"):
            find_weights(str(file), "00ff", self.URL, "w")

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/x.pth: the weights are at {self.URL}"):
            find_weights(str(tmp_path / "x.pth"), None, self.URL, "w")

    def test_what_was_downloaded_before(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        file = tmp_path / "hub/checkpoints/w.pth"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"weights")
        assert find_weights(None, None, self.URL, "w.pth")[0] == file

    def test_without_a_network_the_error_says_what_to_fetch_and_where_to_put_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        asked = []

        def unreachable(request, timeout):
            asked.append((request.method, timeout))
            raise urllib.error.URLError("no route to host")

        monkeypatch.setattr(urllib.request, "urlopen", unreachable)
        with pytest.raises(FileNotFoundError) as error:
            InceptionFeatures()
        assert asked == [("HEAD", REACH_SEC)]  # one question, with an end
        said = str(error.value)
        assert "fetch https://github.com/toshas/torch-fidelity/releases/" in said
        assert f"put it at {tmp_path}/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth" in said
        assert "--features.weights FILE" in said
        assert not list(tmp_path.rglob("*.pth"))

    def test_nothing_but_tensors_is_unpickled(self, tmp_path):
        torch.save({"x": Path("/etc")}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="w.pth is no file of weights"):
            InceptionFeatures(str(tmp_path / "w.pth"))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """Random weights in the layout of the published file, which cannot be had here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        network = FeatureExtractorInceptionV3("inception", ["2048"])
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), file)
    return file


class TestInception:
    def test_is_torch_fidelitys_network(self, inception_file):
        extractor = Extractor.of(InceptionFeatures(str(inception_file)), SHAPE, torch.device("cpu"))
        assert (extractor.num_features, extractor.num_classes) == (2048, 1008)
        plain = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(inception_file))
        features, logits = plain(IMAGES[:2].repeat(1, 3, 1, 1))
        found = extractor(IMAGES[:2])
        torch.testing.assert_close(found[0], features)
        torch.testing.assert_close(found[1], logits)
        assert extractor.record["file_sha256"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()
        assert "is not the published file, by its sha256" in extractor.record["warning"]

    def test_another_networks_weights(self, tmp_path):
        save_file({"x": torch.zeros(3)}, tmp_path / "w.safetensors")
        torch.save({"x": torch.zeros(3)}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="w.pth holds the weights of another network"):
            InceptionFeatures(str(tmp_path / "w.pth"))

    def test_channels(self, inception_file):
        with pytest.raises(ValueError, match="InceptionFeatures takes images of 1 or 3 channels, these have 4"):
            Extractor.of(InceptionFeatures(str(inception_file)), (4, 8, 8), torch.device("cpu"))


DINO = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory) -> Path:
    """Random weights as timm publishes them, at 518x518."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "dino.safetensors"
    save_file(timm.create_model(DINO, num_classes=0).state_dict(), file)
    return file


class TestDino:
    def test_is_timms_network(self, dino_file):
        extractor = Extractor.of(DinoFeatures(str(dino_file), model=DINO, image_size=28), SHAPE, torch.device("cpu"))
        own = {"file": str(dino_file)}
        plain = timm.create_model(DINO, True, pretrained_cfg_overlay=own, num_classes=0, img_size=28).eval()
        x = nn.functional.interpolate(IMAGES.float(), (28, 28), mode="bicubic", antialias=True).clamp(0, 255) / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        with torch.no_grad():
            expected = plain((x.repeat(1, 3, 1, 1) - mean) / std)
        torch.testing.assert_close(extractor(IMAGES)[0], expected, rtol=1e-4, atol=1e-4)
        assert extractor.num_features == 384
        assert "bicubic, antialiased" in extractor.record["input"]

    def test_mistakes(self, dino_file):
        with pytest.raises(ValueError, match="model 'resnet18' is no DINOv2 of timm: there are vit_"):
            DinoFeatures(str(dino_file), model="resnet18")
        with pytest.raises(ValueError, match="another network than vit_base_patch14_dinov2.lvd142m"):
            DinoFeatures(str(dino_file), model="vit_base_patch14_dinov2.lvd142m", image_size=28)


class TestClassifier:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        network = Classifier(1, 8, 10, num_features=6)
        network.initialise(0)
        write_classifier(tmp_path / "f.safetensors", network, 0.5, {"data": "Digits"})
        return tmp_path / "f.safetensors"

    def test_what_is_written_is_read(self, file):
        network = Classifier(1, 8, 10, num_features=6)
        network.initialise(0)
        features, logits = network.eval()(IMAGES.double().div(255).mul(2).sub(1).float())
        found = Extractor.of(ClassifierFeatures(str(file)), SHAPE, torch.device("cpu"))
        torch.testing.assert_close(found(IMAGES)[0], features)
        torch.testing.assert_close(found(IMAGES)[1], logits)
        assert found.record["test_accuracy"] == 0.5
        assert found.record["trained_on"] == "Digits"

    def test_the_seed_makes_the_weights(self):
        one, same, other = (Classifier(1, 8, 10) for _ in range(3))
        for network, seed in ((one, 1), (same, 1), (other, 2)):
            network.initialise(seed)
        states = [network.state_dict() for network in (one, same, other)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[0]["logits.weight"], states[2]["logits.weight"])

    @pytest.mark.parametrize("shape", [(1, 14, 14), (3, 8, 8)])
    def test_other_images(self, file, shape):
        sizes = "x".join(map(str, shape))
        with pytest.raises(ValueError, match=f"trained on images of 1x8x8 .*, these are {sizes}: train another one"):
            Extractor.of(ClassifierFeatures(str(file)), shape, torch.device("cpu"))

    def test_other_files(self, file, tmp_path):
        with pytest.raises(FileNotFoundError, match="fm-stages features trains a classifier"):
            ClassifierFeatures("nowhere.safetensors")
        with pytest.raises(ValueError, match="has the sha256 .*, not abc"):
            ClassifierFeatures(str(file), "abc")
        save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="x.safetensors is not what fm-stages features writes"):
            ClassifierFeatures(str(tmp_path / "x.safetensors"))
        state = load_file(file)
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        assert state
        (tmp_path / "damaged.safetensors").write_bytes(raw)
        with pytest.raises(ValueError, match="damaged.safetensors was damaged"):
            ClassifierFeatures(str(tmp_path / "damaged.safetensors"))
