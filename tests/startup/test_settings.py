"""All environment variables of ours are read in one place, in one way."""

import ast
from pathlib import Path

import pytest

from mlx_m3_plugin.startup import settings
from mlx_m3_plugin.startup.settings import read_settings

ROOT = Path(settings.__file__).parents[1]

# Variable -> attribute, a value, what it means, and a value that is not understood.
SWITCHES = {
    "MLX_M3_PLUGIN": ("enabled", "off", False, "of"),
    "MLX_M3_PLUGIN_PREFER": ("prefer_native", "native", True, "nativ"),
    "MLX_M3_PLUGIN_STRICT": ("strict", "on", True, "2"),
    "MLX_M3_PLUGIN_ATTENTION": ("attention", "dense", "dense", "densee"),
    "MLX_M3_PLUGIN_EXPERT_MEMORY": ("expert_memory", "64.5GB", 129 << 29, "64 GX"),
    "MLX_M3_PLUGIN_PIPELINE_SPLIT": ("pipeline_split", "40,20", (40, 20), "40;20"),
    "MLX_M3_PLUGIN_REASONING_EFFORT": ("reasoning_effort", "xhigh", "xhigh", "none"),
}
each_switch = pytest.mark.parametrize("name", SWITCHES)


@each_switch
def test_every_switch_is_trimmed_and_lower_cased(name: str) -> None:
    attribute, value, meaning, _ = SWITCHES[name]
    for written in (value, value.upper(), value.capitalize(), f" {value}\n", value.replace(",", " , ")):
        read = read_settings({name: written})
        assert getattr(read, attribute) == meaning
        assert read.complaints == ()


@each_switch
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_switch_is_the_default(name: str, empty: str) -> None:
    assert read_settings({name: empty}) == read_settings({})


@each_switch
def test_a_value_that_is_not_understood_is_named_with_its_variable(name: str) -> None:
    attribute, _, _, wrong = SWITCHES[name]
    read = read_settings({name: f" {wrong}"})
    assert getattr(read, attribute) == getattr(read_settings({}), attribute)
    (complaint,) = read.complaints
    assert complaint.startswith(f"{name}=' {wrong}' is not understood; use ")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("MLX_M3_PLUGIN_PREFR", "MLX_M3_PLUGIN_PREFER"),
        ("MLX_M3_PLUGINS", "MLX_M3_PLUGIN"),
        ("mlx_m3_plugin", "MLX_M3_PLUGIN"),
        ("MLX_M3_PLUGIN_PIPELINE", "MLX_M3_PLUGIN_PIPELINE_SPLIT"),
    ],
)
def test_a_misspelt_variable_is_named_with_the_nearest_right_one(name: str, meant: str) -> None:
    assert read_settings({name: "off"}).complaints == (f"unknown variable {name}; did you mean {meant}?",)


def test_variables_of_others_are_not_complained_of() -> None:
    assert read_settings({"PLUGIN": "x", "MLX_METAL_JIT": "1", "MLX_M3": "1"}).complaints == ()


@pytest.mark.parametrize("name", ["MLX_M3_PLUGIN_ATTENTION", "MLX_M3_PLUGIN_PIPELINE_SPLIT"])
def test_what_changes_a_model_is_refused_when_a_model_is_made(name: str) -> None:
    """A warning would be easy to overlook; importing a library for other models must go on."""
    wrong = SWITCHES[name][3]
    with pytest.raises(ValueError, match=f"^{name}='{wrong}' is not understood"):
        settings.model_settings({name: wrong})


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("64", 64 << 30),
        ("64 gib", 64 << 30),
        ("1.5t", 3 << 39),
        ("7B", 7),
        ("1k", 1024),
        ("auto", "auto"),
        ("off", 0),
    ],
)
def test_memory_for_experts(value: str, meaning: object) -> None:
    assert settings.checked("expert_memory", {"MLX_M3_PLUGIN_EXPERT_MEMORY": value}) == meaning


def test_what_is_not_set_is_not_asked_of_a_model() -> None:
    assert settings.model_settings({}) == {}
    environ = {"MLX_M3_PLUGIN_ATTENTION": "Dense", "MLX_M3_PLUGIN_PIPELINE_SPLIT": "1,2"}
    assert settings.model_settings(environ) == {"attention": "dense", "pipeline_split": (1, 2)}


def test_no_other_file_reads_our_variables() -> None:
    readers = set()
    for file in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                readers.add(file.relative_to(ROOT).as_posix())
    # The other one reads what is not ours: whether a notebook asks.
    assert readers == {
        "startup/settings.py",
        "toolbox/doctor.py",
    }
