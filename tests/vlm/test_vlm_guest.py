"""Guest manners: the native classes are there when ours do not fit, and other models see nothing of us."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.environments import clean_variables, here
from tests.vlm import vlm_runs  # noqa: F401


def run(*args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return here().run(*args, env=env, check=False)


# --- upstream has changed ---

# What stands in for another mlx-vlm: a module that has lost a method as soon as it is executed.
DAMAGE = """
import importlib.machinery, sys
sys.modules["torch"] = None  # transformers would import it, for seconds

class Damage:
    def find_spec(self, name, path=None, target=None):
        if name != "mlx_vlm.models.minimax_m3_vl.minimax_m3_vl":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module
        def exec_and_damage(module):
            execute(module)
            del module.Model._compute_visual_features
        spec.loader.exec_module = exec_and_damage
        return spec

sys.meta_path.insert(0, Damage())
"""
MISSING = "mlx_vlm.models.minimax_m3_vl.minimax_m3_vl has no Model._compute_visual_features"
IMPORT = """
import json, logging, sys
logging.basicConfig(format="%(name)s: %(message)s")
from mlx_vlm.models import minimax_m3_vl, minimax_m3
from mlx_m3_plugin.startup import hook
print(json.dumps({
    "files": [minimax_m3_vl.__file__, minimax_m3.__file__],
    "classes": [m.Model.__module__ for m in (minimax_m3_vl, minimax_m3)],
    "same": minimax_m3_vl.LanguageModel is sys.modules["mlx_vlm.models.minimax_m3_vl.language"].LanguageModel,
    "config": minimax_m3_vl.ModelConfig.from_dict({"model_type": "minimax_m3_vl"}).model_type,
    "errors": hook.status["errors"],
    "served": hook.status["served"],
}))
"""


def test_the_native_classes_where_a_part_is_missing() -> None:
    """Upstream's file under upstream's name, one warning for each module, and ``status`` tells it."""
    done = run("-c", DAMAGE + IMPORT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    directory = Path(answer["files"][0]).parents[1]
    names = ("minimax_m3_vl", "minimax_m3")
    assert answer["files"] == [str(directory / name / "__init__.py") for name in names]
    assert all(name.startswith("mlx_vlm.models.minimax_m3") for name in answer["classes"])
    assert answer["same"]
    assert answer["config"] == "minimax_m3_vl"
    assert list(answer["served"].values()) == answer["files"]
    assert len(answer["errors"]) == 2
    for error, name in zip(answer["errors"], names, strict=True):
        assert MISSING in error
        assert f"mlx_vlm.models.{name} is upstream's own" in error
    assert done.stderr.count("mlx-m3-plugin: ") == 2


def test_an_error_where_a_part_is_missing_and_the_user_is_strict() -> None:
    done = run("-c", DAMAGE + IMPORT, MLX_M3_PLUGIN_STRICT="1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: mlx-m3-plugin: ")
    assert MISSING in last


def test_the_doctor_says_who_serves_where_a_part_is_missing(tmp_path: Path) -> None:
    """It asks in processes of its own, to which only the environment leads."""
    (tmp_path / "sitecustomize.py").write_text(DAMAGE)
    command = [sys.executable, "-m", "mlx_m3_plugin.cli", "doctor", "--json"]
    variables = clean_variables() | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.returncode == 1
    diagnosis = json.loads(done.stdout)
    modules = {module["name"]: module for module in diagnosis["modules"]}
    assert modules["mlx_vlm.models.minimax_m3_vl"]["source"] == "native"
    assert any(MISSING in error for error in diagnosis["errors"])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mlx_vlm.models.base", "InputEmbeddingsFeatures"),
        ("mlx_vlm.models.cache", "QuantizedKVCache"),
        ("mlx_vlm.models.switch_layers", "SwitchGLU"),
        ("mlx_vlm.models.minimax_m3_vl.language", "MiniMaxM3BatchKVCache"),
        ("mlx_vlm.models.minimax_m3_vl.processing_minimax_m3_vl", "MiniMaxM3VLProcessor"),
    ],
)
def test_each_missing_part_is_named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    from mlx_m3_plugin.hosts.mlx_vlm.parts import PartsDoNotFitError, check_parts

    check_parts()
    monkeypatch.delattr(import_module(module), name)
    with pytest.raises(PartsDoNotFitError, match=f"{module} has no {name}") as raised:
        check_parts()
    assert raised.value.fall_back_to_native


def test_layers_that_mlx_vlm_does_not_have_are_those_of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with mlx-vlm 0.6.3.  until: mlx-vlm 0.6.4"""
    from mlx_lm.models.rope_utils import initialize_rope
    from mlx_lm.models.switch_layers import SwitchGLU
    from mlx_vlm import models

    from mlx_m3_plugin.hosts.mlx_vlm.parts import rope_and_experts

    assert SwitchGLU not in rope_and_experts()
    monkeypatch.delattr("mlx_vlm.models.rope_utils.initialize_rope")
    monkeypatch.delattr(models, "switch_layers")
    monkeypatch.setitem(sys.modules, "mlx_vlm.models.switch_layers", None)
    assert rope_and_experts() == (initialize_rope, SwitchGLU)


def test_each_changed_method_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_vlm.models.minimax_m3_vl import language

    from mlx_m3_plugin.hosts.mlx_vlm.parts import PartsDoNotFitError, check_parts

    def rollback(self: Any, caches: Any) -> int:
        return 0

    monkeypatch.setattr(language.LanguageModel, "rollback_speculative_cache", rollback)
    with pytest.raises(PartsDoNotFitError, match="rollback_speculative_cache"):
        check_parts()


# --- other models ---

LOGITS = """
import hashlib, importlib, json, sys
sys.modules["torch"] = None  # transformers would import it, for seconds
import mlx.core as mx
from mlx_vlm.models.cache import make_prompt_cache
import mlx_vlm.utils

plugged = any("mlx_m3_plugin" in type(f).__module__ for f in sys.meta_path)
for config in json.loads(sys.argv[1]):
    module = importlib.import_module("mlx_vlm.models." + config["model_type"])
    mx.random.seed(7)
    made = module.ModelConfig.from_dict(config)
    for part in ("text", "vision"):
        cls = getattr(module, part.capitalize() + "Config", None)
        if cls is not None and part + "_config" in config:
            setattr(made, part + "_config", cls.from_dict(config[part + "_config"]))
    model = module.Model(made)
    tokens = mx.random.randint(0, 100, (1, 40))
    media = {}
    if "image_token_id" in config:
        tokens[:, 3:9] = config["image_token_id"]
        media = {"pixel_values": mx.random.normal((24, 1176)), "image_grid_thw": mx.array([[1, 4, 6]])}
    embeds = model.get_input_embeddings(tokens, media.pop("pixel_values", None), **media).inputs_embeds
    cache = make_prompt_cache(model.language_model)
    logits = [
        model.language_model(tokens[:, a:b], inputs_embeds=embeds[:, a:b], cache=cache).logits
        for a, b in ((0, 31), (31, 39), (39, 40))
    ]
    digest = hashlib.sha256(bytes(memoryview(mx.concatenate(logits, axis=1).astype(mx.float32)))).hexdigest()
    print(config["model_type"], module.__file__.split("site-packages")[1], digest)
print(plugged, file=sys.stderr)
"""
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128,
    "rope_theta": 10000,
    "max_position_embeddings": 512,
}
QWEN2_VL = {
    "model_type": "qwen2_vl",
    **TEXT,
    "tie_word_embeddings": False,
    "image_token_id": 101,
    "video_token_id": 102,
    "vision_start_token_id": 103,
    "text_config": {
        "model_type": "qwen2_vl",
        **TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
    },
    "vision_config": {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vocab_size": 128,
        "mlp_ratio": 2.0,
        "in_channels": 3,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}


QWEN2 = {"model_type": "qwen2", **TEXT, "tie_word_embeddings": False}
OTHERS = [QWEN2_VL, QWEN2]


def test_logits_of_other_models_are_bit_identical() -> None:
    config = json.dumps(OTHERS)
    with_us, without_us = (run("-c", LOGITS, config, MLX_M3_PLUGIN=switch) for switch in ("on", "off"))
    assert with_us.returncode == without_us.returncode == 0, with_us.stderr + without_us.stderr
    assert with_us.stderr.split()[-1] == "True"
    assert without_us.stderr.split()[-1] == "False"
    assert with_us.stdout == without_us.stdout
    lines = with_us.stdout.splitlines()
    assert len(lines) == len(OTHERS)
    assert all(len(line.split()[-1]) == 64 for line in lines)
