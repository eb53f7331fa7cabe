"""One line of what to install; the faults of our own files are called internal."""

import pytest

from mlx_m3_plugin import cli
from mlx_m3_plugin.toolbox.installation import FOR_MLX


def fail_with(error: ImportError, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(args: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_inspect", fail)
    return cli.main(["inspect", "somewhere"])


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("mlx", FOR_MLX),
        ("mlx.core", FOR_MLX),
        ("mlx_vlm.models", 'pip install "mlx-m3-plugin[vlm]"'),
        ("matplotlib", 'pip install "mlx-m3-plugin[plot]"'),
        ("transformers", "pip install --upgrade mlx-lm"),
    ],
)
def test_a_package_that_is_missing(
    name: str, fix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(ModuleNotFoundError("gone", name=name), monkeypatch) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"mlx-m3: {name.partition('.')[0]} cannot be imported (gone): {fix}\n"


@pytest.mark.parametrize("name", [None, "mlx_m3_plugin.toolbox.gone"])
def test_a_fault_of_ours_is_not_for_the_user_to_install(
    name: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(ImportError("gone", name=name), monkeypatch) == 2
    said = capsys.readouterr().err
    assert said.startswith("mlx-m3: ImportError: gone (")
    assert "install" not in said
