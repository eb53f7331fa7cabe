"""What tests may not do."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import mlx_m3_plugin.toolbox.new_process as of_ours


def test_the_standard_library_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (subprocess, of_ours.subprocess):
        with pytest.raises(AssertionError, match=r"subprocess\.run is the whole process's"):
            monkeypatch.setattr(target, "run", None)
    with pytest.raises(AssertionError, match=r"subprocess\.run is the whole process's"):
        monkeypatch.setattr("mlx_m3_plugin.toolbox.new_process.subprocess.run", None)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="is the whole process's"):
        patch.setattr(subprocess, "run", None)
    for target, name in ((os, "lstat"), (sys, "platform"), (os.path, "exists")):
        with pytest.raises(AssertionError, match="is the whole process's"):
            monkeypatch.setattr(target, name, None)


def test_a_name_of_our_own_can(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        monkeypatch.setattr(of_ours, "subprocess", SimpleNamespace(run=1))
        monkeypatch.setattr("mlx_m3_plugin.toolbox.new_process.json", None)
        patch.setattr(sys, "argv", ["x"])
        assert (of_ours.subprocess.run, of_ours.json, sys.argv) == (1, None, ["x"])
