"""What a configuration may name. Each attack would leave a file, and did before it was refused."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fm_stages.studies.runs import build_run
from fm_stages.training import CONFIG_KEY, allow_imports, class_paths, explain

EVIL = "open({!r}, 'w').write('ran')\nimport torch\nclass Net(torch.nn.Linear):\n    pass\n"
DIGITS = Path(__file__).parents[2] / "configs/digits_dit.yaml"

ATTACKS = {
    "a module beside": "evil_networks.Net",
    "a name that begins as an allowed one": "torchvision_evil.Net",
    "source for a GraphModule": "torch.fx.graph_module.reduce_graph_module",
    "a checkpoint to unpickle": "fm_stages.training.FlowMatching.load_from_checkpoint",
    "a repository": "torch.hub.load",
    "a file of weights": "timm.create_model",
    "remote code": "diffusers.AutoModel.from_pretrained",
    "a shared library": "torch.ops.load_library",
    "a script": "torch.jit.load",
    "C++": "torch.utils.cpp_extension.load",
    "a program": "os.system",
    "a program, through a module that imports os": "torch.os.system",
    "the policy itself": "jsonargparse.set_parsing_settings",
}


@pytest.fixture
def pwned(tmp_path, monkeypatch) -> Path:
    """What an attack would write; modules that would lie on the path."""
    file = tmp_path / "pwned"
    for name in ("evil_networks", "torchvision_evil"):
        (tmp_path / f"{name}.py").write_text(EVIL.format(str(file)))
    monkeypatch.syspath_prepend(tmp_path)
    return file


@pytest.mark.parametrize("path", ATTACKS.values(), ids=ATTACKS)
def test_a_stranger_s_configuration_runs_nothing(path, pwned):
    arguments = {"in_features": 1, "out_features": 1, "body": {"_code": f"open({str(pwned)!r}, 'w')"}}
    arguments |= {"import_block": f"open({str(pwned)!r}, 'w')", "command": f"touch {pwned}"}
    for init_args in ({}, arguments):
        with pytest.raises(Exception) as error:  # noqa: PT011 - its type follows
            build_run({"model": {"network": {"class_path": path, "init_args": init_args}}, "data": None})
        assert type(error.value).__name__ in ("ArgumentError", "ValueError")
    assert not pwned.exists()
    assert path.rpartition(".")[0] not in sys.modules or not path.startswith(("evil", "torchvision_evil"))


def test_functions_are_no_classes_even_where_they_say_what_they_return(pwned):
    with pytest.raises(ValueError, match="model.network: torchvision.models.resnet18 is no class"):
        build_run({"model": {"network": "torchvision.models.resnet18"}, "data": None})


def test_a_class_of_another_type():
    with pytest.raises(Exception, match="does not correspond to a subclass of Module"):
        build_run({"model": {"network": "torch.optim.AdamW"}, "data": None})


def test_what_is_wanted_is_built():
    for path in ("torch.nn.Identity", "torchvision.models.ResNet", "timm.models.vision_transformer.Mlp"):
        needed = {"block": "torchvision.models.resnet.BasicBlock", "layers": [1, 1, 1, 1]} if "ResNet" in path else {}
        needed |= {"in_features": 2} if "Mlp" in path else {}
        network = {"class_path": path, "init_args": needed}
        assert isinstance(build_run({"model": {"network": network}, "data": None})[0].network, torch.nn.Module)


def test_a_trusted_package_is_imported(pwned):
    allow_imports("evil_networks")
    network = {"class_path": "evil_networks.Net", "init_args": {"in_features": 1, "out_features": 1}}
    build_run({"model": {"network": network}, "data": None})
    assert pwned.read_text() == "ran"


@pytest.mark.parametrize("name", ["", "../x", "a-b", "a..b", "jsonargparse", "*"])
def test_what_is_no_package(name):
    with pytest.raises(ValueError, match="name a package or a module, as my_package"):
        allow_imports(name)


def test_explain_leaves_other_messages_alone():
    assert explain("Option 'x' is not accepted") == "Option 'x' is not accepted"


class TestCommands:
    """Wherever a configuration comes from, one line names the class, the file and the remedy."""

    NETWORK = {"model": {"network": {"class_path": "torchvision_evil.Net", "init_args": {"in_features": 1}}}}

    def config(self) -> str:
        Path("strange.yaml").write_text(yaml.safe_dump({**self.NETWORK, "data": "Digits"}))
        return "strange.yaml"

    def checkpoint(self) -> str:
        weights = {"network.weight": torch.ones(1, 1)}
        torch.save({"state_dict": weights, CONFIG_KEY: yaml.safe_dump(self.NETWORK)}, "strange.ckpt")
        return "strange.ckpt"

    @pytest.mark.parametrize("command_of", ["fit", "validate", "doctor"])
    def test_config(self, command_of, command, pwned):
        self.refused(command(command_of, "--config", self.config(), "--trainer.logger=false"), "strange.yaml", pwned)

    def test_word_of_the_command_line(self, command, pwned):
        done = command("fit", "--config", DIGITS, "--model.network=torchvision_evil.Net")
        self.refused(done, "digits_dit.yaml", pwned)

    def test_checkpoint(self, command, pwned):
        file = self.checkpoint()
        for words in (
            ["sample", "--ckpt", file, "--num", 1, "--out", "out"],
            ["export", "--ckpt", file, "--out", "out"],
            ["handover", "--ckpt", file, "--out", "out"],
            ["diagnose", "--ckpt", file, "--data", "Digits", "--out", "out"],
            ["evaluate", "--ckpt", file, "--data", "Digits", "--features", "torch.nn.Identity", "--out", "out"],
        ):
            self.refused(command(*words), file, pwned)
        assert not Path("out").exists()

    def test_data(self, command, pwned):
        for spec in ("torchvision_evil.Net", "{class_path: torchvision_evil.Net}"):
            done = command("profile", "--data", spec, "--out", "out")
            self.refused(done, "--data", pwned)

    def test_arms(self, command, pwned):
        Path("arms.yaml").write_text(yaml.safe_dump({"a": None, "b": self.NETWORK}))
        self.refused(command("compare", "--config", DIGITS, "--arms", "arms.yaml", "--seeds", 1), "arm b", pwned)

    @staticmethod
    def refused(done, place: str, pwned: Path) -> None:
        assert done.status == 2
        assert "Traceback" not in done.err
        line = done.err.strip().splitlines()[-1]
        assert place in line
        assert "torchvision_evil.Net is not imported" in line
        assert "add --allow-import torchvision_evil" in line
        assert not pwned.exists()


def test_processes_that_a_command_starts_inherit_what_it_trusts(command, monkeypatch):
    from fm_stages import cli

    given = []
    monkeypatch.setitem(cli.COMMANDS, "fit", lambda: given.append((list(sys.argv), os.environ[VARIABLE])))
    command("fit", "--allow-import", "one", "--x", "--allow-import=two.three")
    assert given == [(["fm-stages", "fit", "--x"], "tests,one,two.three")]
    trusted = []
    note = lambda **settings: trusted.extend(settings["import_path_allowlist"])  # noqa: E731
    monkeypatch.setattr("jsonargparse.set_parsing_settings", note)
    runpy.run_path(class_paths.__file__)  # as a process does that starts
    assert {"tests", "one", "two.three"} <= set(trusted)


VARIABLE = "FM_STAGES_ALLOW_IMPORT"
