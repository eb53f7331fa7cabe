"""A repository on the Hub is described from its headers and settings, like its directory."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from mlx_m3_plugin.cli import main
from mlx_m3_plugin.toolbox.inspect import inspect
from tests.checkpoints.edits import edit_json

Q_PROJ = "language_model.model.layers.0.self_attn.q_proj.weight"
PROJECTOR = "multi_modal_projector.linear_1.bias"
# What the Hub's errors look at.
NO_RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """A Hub that holds ``someone/m3`` and gives its settings and headers only."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    files = {}
    for name in sorted(set(index["weight_map"].values())):
        content = (checkpoint / name).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        header.pop("__metadata__")
        files[name] = SimpleNamespace(tensors={n: SimpleNamespace(**entry) for n, entry in header.items()})
    metadata = SimpleNamespace(weight_map=index["weight_map"], files_metadata=files)

    def model_info(repository: str, revision: str | None, timeout: float) -> Any:
        if repository != "someone/m3":
            raise huggingface_hub.errors.RepositoryNotFoundError(
                "401: no such repository", response=NO_RESPONSE
            )
        siblings = [SimpleNamespace(rfilename=file.name) for file in checkpoint.iterdir()]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def download(repository: str, file: str, revision: str) -> str:
        assert revision == "abc"
        assert not file.endswith(".safetensors")
        return str(checkpoint / file)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repository, revision: metadata)
    monkeypatch.chdir(checkpoint.parent)
    return checkpoint


def test_a_repository_is_described_like_its_directory(hub):
    from_hub, from_disk = vars(inspect("someone/m3")), vars(inspect(hub))
    assert from_hub.pop("name") == "someone/m3"
    assert "--model someone/m3 " in from_hub.pop("commands")[0]
    del from_disk["name"], from_disk["commands"]
    assert from_hub == from_disk
    assert from_hub["problems"] == []


def test_problems_of_a_repository(hub):
    (hub / "chat_template.jinja").unlink()
    metadata = huggingface_hub.get_safetensors_metadata("someone/m3", revision="abc")
    tensors = metadata.files_metadata[metadata.weight_map[Q_PROJ]].tensors
    del tensors[Q_PROJ]
    tensors[PROJECTOR] = SimpleNamespace(dtype="F4", shape=[1], data_offsets=[0, 1])
    problems = inspect("someone/m3").problems
    assert len(problems) == 3
    assert re.fullmatch(r"model-\S+: \S+ MLX does not read tensors of dtype F4", problems[0])
    assert problems[1].startswith(f"{Q_PROJ} ")
    assert problems[1].endswith(f" {metadata.weight_map[Q_PROJ]}")
    assert problems[2].startswith("no chat template")


def test_a_repository_that_is_not_there(hub, capsys):
    assert main(["inspect", "someone/else"]) == 2
    said = capsys.readouterr().err
    assert "someone/else is neither" in said
    assert "401: no such repository" in said


def test_a_repository_of_another_model(hub, capsys):
    edit_json(hub / "config.json", lambda config: config.update(model_type="llama"))
    assert main(["inspect", "someone/m3"]) == 2
    assert "its config.json has model_type 'llama'" in capsys.readouterr().err
