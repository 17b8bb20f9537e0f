"""DyDiLiT.from_pretrained: what cannot be loaded is refused in one line that names the path."""

import json
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from runs import CONFIG, RUN

from dydilit import Config, DyDiLiT, save_checkpoint


@dataclass(frozen=True)
class Wider(Config):
    """Another kind of configuration, with a field of its own."""

    extra: int = 1

    def build(self):
        return DyDiLiT(self)


@pytest.fixture
def checkpoint(tmp_path):
    """The path of a checkpoint as `train` writes it, and its contents."""
    model, ema = DyDiLiT(CONFIG), DyDiLiT(CONFIG)
    state = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "step": 7,
        "kind": "Config",
        "config": asdict(CONFIG),
        "training": asdict(RUN),
        "meta": {"name": "digits", "classes": list("0123456789")},
    }
    save_checkpoint(tmp_path / "ckpt.pt", state)
    return tmp_path / "ckpt.pt", state


@pytest.fixture
def folder(tmp_path):
    """A folder of save_pretrained."""
    DyDiLiT(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(path, error=ValueError, **how):
    """The message of the error, which is one line and names the path."""
    with pytest.raises(error) as e:
        DyDiLiT.from_pretrained(path, **how)
    message = str(e.value)
    assert str(path) in message and "\n" not in message
    return message


def edit(folder, drop=None, **values):
    """Change entries of a folder's config.json, or drop one."""
    file = folder / "config.json"
    about = json.loads(file.read_text()) | values
    about.pop(drop, None)
    file.write_text(json.dumps(about))


def same_weights(model, state):
    return all(torch.equal(z, state[name]) for name, z in model.state_dict().items())


def test_a_checkpoint_gives_the_averaged_weights(checkpoint):
    path, state = checkpoint
    model = DyDiLiT.from_pretrained(path)
    assert same_weights(model, state["ema"]) and not same_weights(model, state["model"])
    assert not model.training and model.config == CONFIG
    assert model.meta == state["meta"] and model.step == 7


def test_an_exported_checkpoint_is_the_checkpoint(checkpoint, tmp_path):
    path, state = checkpoint
    model = DyDiLiT.from_pretrained(path)
    model.save_pretrained(tmp_path / "model")
    again = DyDiLiT.from_pretrained(tmp_path / "model")
    assert same_weights(again, state["ema"]) and not again.training
    assert (again.config, again.meta, again.step) == (model.config, model.meta, model.step)
    batch = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 10])
    assert torch.equal(again(*batch), model(*batch))


def test_a_path_may_be_a_string(checkpoint, folder):
    assert DyDiLiT.from_pretrained(str(checkpoint[0])).step == 7
    assert DyDiLiT.from_pretrained(str(folder)).step is None


def test_saving_writes_two_files_that_others_can_read(folder):
    from safetensors import safe_open
    from safetensors.torch import load_file

    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    about = json.loads((folder / "config.json").read_text())
    crc32 = about.pop("crc32")
    assert about == {"kind": "Config", "config": asdict(CONFIG), "meta": {}, "step": None}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["about"]) == about | {"crc32": crc32}
    assert load_file(folder / "model.safetensors").keys() == DyDiLiT(CONFIG).state_dict().keys()


def test_a_missing_path_is_refused(tmp_path):
    assert "no checkpoint at" in refusal(tmp_path / "nothing.pt", FileNotFoundError)


def test_an_empty_folder_is_refused(tmp_path):
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused(folder, name):
    (folder / name).unlink()
    refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 20, -20])
def test_a_folder_with_a_truncated_file_is_refused(folder, name, kept):
    file = folder / name
    file.write_bytes(file.read_bytes()[:kept])
    refusal(folder)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_truncated_checkpoint_is_refused(checkpoint, kept):
    path, _ = checkpoint
    path.write_bytes(path.read_bytes()[:kept])
    assert "not a readable checkpoint" in refusal(path)


@pytest.mark.parametrize("name", ["kind", "config", "meta"])
def test_a_folder_whose_config_lacks_an_entry_is_refused(folder, name):
    edit(folder, drop=name)
    refusal(folder)


def test_a_field_that_the_config_does_not_know_is_refused_by_name(folder):
    edit(folder, config=asdict(CONFIG) | {"n_heads": 4})
    assert "n_heads" in refusal(folder)


def test_a_value_that_the_config_does_not_take_is_refused(folder):
    edit(folder, config=asdict(CONFIG) | {"hidden_size": 6})
    assert "hidden_size" in refusal(folder)


def test_a_kind_that_is_not_asked_for_is_refused_by_name(checkpoint, folder):
    path, state = checkpoint
    save_checkpoint(path, state | {"kind": "Baseline"})
    edit(folder, kind="Baseline")
    assert "'Baseline'" in refusal(path) and "'Baseline'" in refusal(folder)


def test_another_kind_is_built_where_it_is_asked_for(tmp_path):
    config = Wider(**asdict(CONFIG), extra=3)
    DyDiLiT(config).save_pretrained(tmp_path / "wider")
    model = DyDiLiT.from_pretrained(tmp_path / "wider", kinds=(Config, Wider))
    assert model.config == config and type(model.config) is Wider
    assert "'Wider'" in refusal(tmp_path / "wider")


def test_weights_of_another_model_are_refused(folder):
    edit(folder, config=asdict(replace(CONFIG, depth=2)))
    refusal(folder)
    edit(folder, config=asdict(replace(CONFIG, hidden_size=32)))
    refusal(folder)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "ckpt.pt").write_text("a text")
    assert "not a readable checkpoint" in refusal(tmp_path / "ckpt.pt")
