"""Upstream's own tests, with the plugin and without: which of them have another result.

    python tests/upstream/peers.py [--only mlx-lm] [--checkout mlx-vlm=DIRECTORY]

mlx-lm's come from its source package.  mlx-vlm's packages have none, so they come from its repository,
at the tag of the installed version, or from a checkout that is there already.  Nothing of them is kept.
What the network would be needed for fails on both sides.  ``docs/upstream.md`` explains the differences.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

MLX_VLM = "https://github.com/Blaizzy/mlx-vlm"


def lm_tests(directory: Path) -> Path:
    package = f"mlx-lm=={version('mlx-lm')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(directory), package], check=True)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    return next(directory.glob("mlx_lm-*/tests"))


def vlm_tests(directory: Path) -> Path:
    tag = f"v{version('mlx-vlm')}"
    git = ["git", "clone", "--quiet", "--depth", "1", "--branch", tag, MLX_VLM, str(directory / "mlx-vlm")]
    subprocess.run(git, check=True)
    return directory / "mlx-vlm" / "mlx_vlm" / "tests"


def results(tests: Path, setting: str, directory: Path) -> dict[str, str]:
    """The outcome of each test, in a process with this value of ``MLX_M3_PLUGIN``."""
    # Away from the sources beside the tests, which would be imported instead of the installed library.
    apart = directory / f"{setting or 'on'}"
    apart.mkdir()
    (apart / "tests").symlink_to(tests)
    report = apart / "report.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", "tests"]
    subprocess.run(
        [*pytest, "--continue-on-collection-errors", f"--junitxml={report}"],
        env=os.environ | {"MLX_M3_PLUGIN": setting, "HF_HUB_OFFLINE": "1"},
        cwd=apart,
        stdout=subprocess.DEVNULL,
    )
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    found = [(child.tag, child.get("message", "")) for child in case if child.tag in _OUTCOMES]
    return (
        " ".join(f"{tag}: {message.splitlines()[0] if message else ''}" for tag, message in found) or "passed"
    )


_OUTCOMES = ("failure", "error", "skipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("mlx-lm", "mlx-vlm"))
    parser.add_argument("--checkout", action="append", default=[], metavar="LIBRARY=DIRECTORY")
    args = parser.parse_args()
    checkouts = dict(given.split("=", 1) for given in args.checkout)
    for library, fetch in (("mlx-lm", lm_tests), ("mlx-vlm", vlm_tests)):
        if args.only in (None, library):
            with tempfile.TemporaryDirectory() as directory:
                there = checkouts.get(library)
                tests = Path(there).resolve() if there else fetch(Path(directory))
                off, on = (results(tests, setting, Path(directory)) for setting in ("off", "on"))
            report(library, off, on)


def report(library: str, off: dict[str, str], on: dict[str, str]) -> None:
    passed = [sum(outcome == "passed" for outcome in each.values()) for each in (off, on)]
    print(f"{library} {version(library)}: {len(on)} tests; {passed[0]} pass without us, {passed[1]} with us")
    for name in sorted(off.keys() | on.keys()):
        without, with_us = off.get(name, "not run"), on.get(name, "not run")
        if without.partition(":")[0] != with_us.partition(":")[0]:
            print(f"  {name}\n    without us: {without}\n    with us:    {with_us}")


if __name__ == "__main__":
    main()
