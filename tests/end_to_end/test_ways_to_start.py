# Long because: the whole table of ways to start, in one place.
"""Every way to start Python in which an installed plugin must, or cannot, be there unasked.

The children import nothing of ours.  They import ``mlx_lm.models.minimax_m3_vl`` as mlx-lm
does for a checkpoint of that type, and report which file they got.
"""

import json
import shutil
import sys
import zipapp
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.end_to_end.environments import (
    CHECKOUT,
    CommandError,
    Environment,
    clean_variables,
    make_quick_environment,
)

MODEL_TYPES = ("minimax_m3_vl", "minimax_m3")

# As ``python -c``, as a module or as part of a larger script: the files that serve our two names.
PROBE = f"""
import importlib, json

def served():
    files = {{}}
    for name in {MODEL_TYPES}:
        try:
            files[name] = importlib.import_module("mlx_lm.models." + name).__file__
        except ModuleNotFoundError:
            files[name] = None
    return files

if __name__ == "__main__":
    print(json.dumps(served()))
"""

# What mlx-lm answers for each model type on the command line: the class's file, or the error.
LOOK_UP = """
import json, sys
from mlx_lm.utils import _get_classes

def look_up(model_type):
    try:
        model_class, _ = _get_classes({"model_type": model_type})
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["class", sys.modules[model_class.__module__].__file__.removeprefix(sys.prefix)]

print(json.dumps({model_type: look_up(model_type) for model_type in sys.argv[1:]}))
"""

META_PATH = (
    "import json, sys; print(json.dumps([getattr(f, '__name__', type(f).__name__) for f in sys.meta_path]))"
)


def answer(stdout: str) -> dict[str, str | None]:
    return json.loads(stdout.splitlines()[-1])


def ours(package: Path) -> dict[str, str | None]:
    return {name: str(package / "hosts" / "mlx_lm" / f"{name}.py") for name in MODEL_TYPES}


def upstreams(environment: Environment) -> dict[str, str | None]:
    """mlx-lm's own files: minimax_m3_vl from 0.32.0 on, None where there is no such file."""
    files = {name: environment.site_packages / "mlx_lm" / "models" / f"{name}.py" for name in MODEL_TYPES}
    return {name: str(file) if file.exists() else None for name, file in files.items()}


def append(file: Path, source: str) -> None:
    file.write_text(file.read_text() + "\n" + source + "\n")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_quick_environment(tmp_path_factory.mktemp("quick_stock"))


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory, cold_guest: Environment) -> Environment:
    environment = make_quick_environment(tmp_path_factory.mktemp("quick_guest"))
    environment.install_from(cold_guest)
    return environment


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[], Environment]:
    return lambda: make_quick_environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def stock_stderr(stock: Environment) -> list[str]:
    """What mlx-lm and its dependencies say by themselves, such as "PyTorch was not found"."""
    return stock.run("-c", PROBE).stderr.splitlines()


class TestInterpreterFlags:
    def test_without_the_plugin_mlx_lm_serves_what_it_has(self, stock: Environment):
        """The control: the other tests would see it if the environment itself were not clean."""
        assert answer(stock.run("-c", PROBE).stdout) == upstreams(stock)

    @pytest.mark.parametrize(
        "flags",
        [
            [],
            ["-I"],
            ["-E", "-s", "-P"] if sys.version_info >= (3, 11) else ["-E", "-s"],
            ["-W", "error", "-X", "dev", "-OO"],
        ],
        ids=" ".join,
    )
    def test_the_installed_plugin_serves_both_names(self, guest: Environment, flags: list[str]):
        assert answer(guest.run(*flags, "-c", PROBE).stdout) == ours(guest.plugin)

    def test_with_a_safe_path(self, guest: Environment):
        child = guest.run("-c", PROBE, env={"PYTHONSAFEPATH": "1"})

        assert answer(child.stdout) == ours(guest.plugin)

    def test_without_site_nothing_happens_by_itself(self, guest: Environment):
        path = {"PYTHONPATH": str(guest.site_packages)}

        assert answer(guest.run("-S", "-c", PROBE, env=path).stdout) == upstreams(guest)
        by_hand = guest.run("-S", "-c", "import mlx_m3_plugin\n" + PROBE, env=path)
        assert answer(by_hand.stdout) == ours(guest.plugin)


class TestInstallations:
    @pytest.mark.parametrize("form", ["path file", "import hook"])
    def test_editable(self, new_environment: Callable[[], Environment], tmp_path: Path, form: str):
        checkout = copy_of_checkout(tmp_path / "checkout")
        if form == "import hook":
            edit(checkout / "pyproject.toml", 'dev-mode-dirs = ["."]', "dev-mode-exact = true")
        environment = new_environment()
        environment.install("--editable", checkout)

        assert not environment.plugin.exists()
        assert answer(environment.run("-c", PROBE).stdout) == ours(checkout / "mlx_m3_plugin")

    def test_target_directory_on_the_path_needs_an_import(
        self, stock: Environment, wheel: Path, tmp_path: Path
    ):
        """Start-up files are read in site directories only, and PYTHONPATH does not name any."""
        stock.install("--target", tmp_path, wheel)
        path = {"PYTHONPATH": str(tmp_path)}

        assert answer(stock.run("-c", PROBE, env=path).stdout) == upstreams(stock)
        by_hand = stock.run("-c", "import mlx_m3_plugin\n" + PROBE, env=path)
        assert answer(by_hand.stdout) == ours(tmp_path / "mlx_m3_plugin")

    def test_uninstalling_leaves_no_trace(self, new_environment: Callable[[], Environment], wheel: Path):
        environment = new_environment()
        before = traces(environment)
        environment.install(wheel)
        assert traces(environment) != before
        assert answer(environment.run("-c", PROBE).stdout) == ours(environment.plugin)
        environment.uninstall()

        assert traces(environment) == before


def traces(environment: Environment) -> tuple[dict[str, str | None], str, set[str]]:
    """Who serves our names, the finders, and all files, those that a run compiles included."""
    served = answer(environment.run("-c", PROBE).stdout)
    finders = environment.run("-c", META_PATH).stdout
    return served, finders, installed_files(environment)


def copy_of_checkout(directory: Path) -> Path:
    directory.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, directory)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "mlx_m3_plugin", directory / "mlx_m3_plugin", ignore=ignored)
    return directory


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def installed_files(environment: Environment) -> set[str]:
    """The environment's own files, byte code included, and the links to borrowed packages."""
    files = (f for f in environment.path.rglob("*") if f.is_symlink() or f.is_file())
    return {str(file.relative_to(environment.path)) for file in files}


class TestCommands:
    """The stock commands themselves, asked at their exit which files serve our names."""

    @pytest.fixture
    def at_exit(self, tmp_path: Path) -> dict[str, str]:
        report = "open(os.environ['PROBE_REPORT'], 'w').write(json.dumps(served()))"
        source = PROBE + f"\nimport atexit, os\natexit.register(lambda: {report})\n"
        (tmp_path / "sitecustomize.py").write_text(source)
        return {"PYTHONPATH": str(tmp_path), "PROBE_REPORT": str(tmp_path / "report.json")}

    @pytest.mark.some(2)
    @pytest.mark.parametrize(
        "command",
        ["mlx_lm.generate", "mlx_lm.server", "mlx_lm generate", "-m mlx_lm.generate", "-m mlx_lm generate"],
    )
    def test_stock_commands(self, cold_guest: Environment, at_exit: dict[str, str], command: str):
        run = cold_guest.run if command.startswith("-m") else cold_guest.run_script
        child = run(*command.split(), "--help", env=at_exit)

        assert "--model" in child.stdout
        assert answer(Path(at_exit["PROBE_REPORT"]).read_text()) == ours(cold_guest.plugin)

    @pytest.mark.parametrize("method", ["spawn", "forkserver"])
    def test_multiprocessing_children(self, guest: Environment, tmp_path: Path, method: str):
        (tmp_path / "probe.py").write_text(PROBE)
        (tmp_path / "parent.py").write_text(
            "import json, multiprocessing, sys, probe\n"
            "if __name__ == '__main__':\n"
            "    with multiprocessing.get_context(sys.argv[1]).Pool(1) as pool:\n"
            "        files = pool.apply(probe.served)\n"
            "    assert 'mlx_lm' not in sys.modules\n"
            "    print(json.dumps(files))\n"
        )
        child = guest.run(tmp_path / "parent.py", method)

        assert answer(child.stdout) == ours(guest.plugin)

    @pytest.mark.parametrize("flags", [[], ["-p", "no:cacheprovider"]], ids=["plain", "no cache"])
    def test_pytest(self, guest: Environment, tmp_path: Path, flags: list[str]):
        """pytest's assertion rewriting is a finder in front of ours."""
        (tmp_path / "probe.py").write_text(PROBE)
        (tmp_path / "test_guest.py").write_text(
            "import json, os, probe\n"
            "def test_our_files_serve():\n"
            "    assert probe.served() == json.loads(os.environ['EXPECTED'])\n"
        )
        expected = {"EXPECTED": json.dumps(ours(guest.plugin))}
        child = guest.run("-m", "pytest", *flags, "test_guest.py", cwd=tmp_path, env=expected)

        assert "1 passed" in child.stdout

    def test_zipapp(self, guest: Environment, tmp_path: Path):
        (tmp_path / "app").mkdir()
        (tmp_path / "app" / "__main__.py").write_text(PROBE)
        zipapp.create_archive(tmp_path / "app", tmp_path / "app.pyz")

        assert answer(guest.run(tmp_path / "app.pyz").stdout) == ours(guest.plugin)


class TestNotebookKernel:
    def test_a_kernel_older_than_the_installation_needs_one_import(
        self, new_environment: Callable[[], Environment], wheel: Path
    ):
        environment = new_environment()
        with kernel(environment) as execute:
            # The user's first attempt imports the native module, where there is one.
            assert answer(execute(PROBE)) == upstreams(environment)
            environment.install(wheel)
            assert answer(execute(PROBE)) == upstreams(environment)
            execute("import mlx_m3_plugin")

            assert answer(execute(PROBE)) == ours(environment.plugin)
            look_up = "from mlx_lm.utils import _get_classes\nprint(_get_classes({'model_type': '%s'})[0])"
            for name in MODEL_TYPES:
                assert f"mlx_lm.models.{name}.Model" in execute(look_up % name)
            # Modules that were there before are extended as if they were imported now.
            tokenizer_utils = "from mlx_lm.tokenizer_utils import TokenizerWrapper\n"
            assert "mlx_m3_plugin" in execute(
                tokenizer_utils + "print(TokenizerWrapper.__init__.__code__.co_filename)"
            )
            status = execute("print(mlx_m3_plugin.status())")
            assert "is active in this process" in status
            assert "imported before the plugin: mlx_lm. Load older tokenizers" in status


@contextmanager
def kernel(environment: Environment) -> Iterator[Callable[[str], str]]:
    """A running kernel, as a function from a cell to what the cell prints."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import KernelManager

    directory = environment.path / "share" / "jupyter" / "kernels"
    (directory / "child").mkdir(parents=True)
    argv = [str(environment.python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "child", "language": "python"}
    (directory / "child" / "kernel.json").write_text(json.dumps(spec))
    manager = KernelManager(
        kernel_name="child", kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(directory)])
    )
    manager.start_kernel(cwd=str(environment.path), env=clean_variables())
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield lambda cell: execute_cell(client, cell)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute_cell(client, cell: str) -> str:
    outputs: list[dict] = []
    reply = client.execute_interactive(cell, timeout=120, allow_stdin=False, output_hook=outputs.append)
    assert reply["content"]["status"] == "ok", reply["content"]
    streams = [output["content"] for output in outputs if output["msg_type"] == "stream"]
    return "".join(stream["text"] for stream in streams if stream["name"] == "stdout")


class TestStartUpFiles:
    def test_the_wheel_has_one_pair_of_the_same_stem(self, wheel: Path):
        """PEP 829: the .start file switches off the .pth of the same stem, so neither runs twice."""
        files = [Path(name) for name in ZipFile(wheel).namelist() if name.endswith((".pth", ".start"))]

        assert sorted(map(str, files)) == ["mlx_m3_plugin_startup.pth", "mlx_m3_plugin_startup.start"]

    def test_both_files_say_the_same(self, guest: Environment):
        (entry_point,) = entry_points_of_start_file(guest)
        module, function = entry_point.split(":")
        pth = (guest.site_packages / "mlx_m3_plugin_startup.pth").read_text()

        assert pth.strip() == f"import {module}; {module}.{function}()"

    def test_start_entry_points_are_enough_and_idempotent(self, guest: Environment):
        """What Python 3.15 does, without anything that the .pth of older versions does."""
        calls = f"""
import pkgutil, sys
entry_points = [pkgutil.resolve_name(line) for line in {entry_points_of_start_file(guest)}]

def call_again():
    before = list(sys.meta_path)
    for entry_point in entry_points:
        entry_point()
    assert sys.meta_path == before, (before, sys.meta_path)

for entry_point in entry_points:
    entry_point()
call_again()
"""
        path = {"PYTHONPATH": str(guest.site_packages)}
        child = guest.run("-S", "-c", calls + PROBE + "\ncall_again()\n", env=path)

        assert answer(child.stdout) == ours(guest.plugin)


def entry_points_of_start_file(environment: Environment) -> list[str]:
    lines = (environment.site_packages / "mlx_m3_plugin_startup.start").read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


class TestManners:
    def test_an_idle_process_imports_one_module_and_gets_one_finder(
        self, guest: Environment, stock: Environment
    ):
        modules = "import sys; print('\\n'.join(sys.modules))"
        with_us, without_us = (set(e.run("-c", modules).stdout.split()) for e in (guest, stock))
        finders_with_us, finders_without_us = (
            json.loads(e.run("-c", META_PATH).stdout) for e in (guest, stock)
        )

        added = {name for name in with_us - without_us if not name.startswith("encodings.")}
        assert added == {"mlx_m3_plugin"}
        assert finders_with_us == ["_Doorbell", *finders_without_us]

    def test_importing_a_library_imports_few_modules_of_ours(self, guest: Environment):
        """Whoever imports mlx-lm for another model does not wait for M3's model and parsers."""
        modules = guest.run("-c", "import mlx_lm, sys; print('\\n'.join(sys.modules))").stdout.split()

        ours = {name.removeprefix("mlx_m3_plugin.") for name in modules if name.startswith("mlx_m3_plugin.")}
        assert {name for name in ours if not name.startswith(("startup", "hosts"))} == {
            "chat",
            "chat.markers",
        }
        assert {name for name in ours if name.startswith("hosts")} == {
            *("hosts", "hosts.patching", "hosts.mlx_lm"),
            *("hosts.mlx_lm.patches", "hosts.mlx_lm.chat", "hosts.mlx_lm.drafts"),
        }

    def test_off_gives_the_stock_process_back(self, guest: Environment, stock: Environment):
        """Same classes and errors, same finders, and no module but the few that read the switch."""
        state = LOOK_UP + "print(*sys.modules)\n" + META_PATH
        with_us, without_us = (
            e.run("-c", state, *MODEL_TYPES, "no_such_model", env={"MLX_M3_PLUGIN": "off"})
            for e in (guest, stock)
        )
        answers, modules, finders = with_us.stdout.splitlines()
        stock_answers, stock_modules, stock_finders = without_us.stdout.splitlines()

        assert answers == stock_answers
        assert finders == stock_finders
        added = set(modules.split()) - set(stock_modules.split())
        assert {name.partition(".")[0] for name in added} == {"mlx_m3_plugin"}
        assert not any(name.startswith(("mlx_m3_plugin.hosts", "mlx_m3_plugin.model")) for name in added)
        assert with_us.stderr == without_us.stderr

    def test_off_hides_no_other_finder(self, guest: Environment):
        """Someone else's finder right behind ours is asked for mlx_lm as if we were not there."""
        witness = """
import sys

class Witness:
    asked_for = []

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        cls.asked_for.append(name)

sys.meta_path.insert(1, Witness)
import mlx_lm
print('mlx_lm' in Witness.asked_for)
"""
        child = guest.run("-c", witness, env={"MLX_M3_PLUGIN": "off"})

        assert child.stdout == "True\n"

    def test_off_prints_what_stock_prints(self, guest: Environment, stock: Environment):
        with_us, without_us = (
            e.run_script("mlx_lm.generate", "--help", env={"MLX_M3_PLUGIN": "off"}) for e in (guest, stock)
        )

        assert (with_us.stdout, with_us.stderr) == (without_us.stdout, without_us.stderr)

    def test_native_is_preferred_on_request_where_there_is_one(self, guest: Environment):
        child = guest.run("-c", PROBE, env={"MLX_M3_PLUGIN_PREFER": "native"})

        native, of_ours = upstreams(guest), ours(guest.plugin)
        assert answer(child.stdout) == {name: native[name] or of_ours[name] for name in MODEL_TYPES}

    def test_a_switch_that_is_not_understood_gets_one_warning(
        self, guest: Environment, stock_stderr: list[str]
    ):
        child = guest.run("-c", PROBE, env={"MLX_M3_PLUGIN": "maybe"})

        (line,) = news(child.stderr, stock_stderr)
        assert "mlx-m3-plugin" in line
        assert "MLX_M3_PLUGIN='maybe'" in line
        assert answer(child.stdout) == ours(guest.plugin)

    def test_an_unknown_model_type_gives_the_stock_error(self, guest: Environment):
        child = guest.run("-c", LOOK_UP, "no_such_model")

        message = "Model type no_such_model not supported."
        assert json.loads(child.stdout) == {"no_such_model": ["ValueError", message]}


class TestBreakdowns:
    """Whatever is broken in us, Python starts, mlx-lm works, and the user reads whose fault it is."""

    def test_a_hook_that_cannot_be_imported(self, own_guest: Environment, stock_stderr: list[str]):
        append(own_guest.plugin / "startup" / "hook.py", "raise ImportError('broken on purpose')")
        child = own_guest.run("-c", PROBE)

        (line,) = news(child.stderr, stock_stderr)
        assert "mlx-m3-plugin" in line
        assert "broken on purpose" in line
        assert answer(child.stdout) == upstreams(own_guest)
        with pytest.raises(CommandError, match="ImportError: broken on purpose"):
            own_guest.run("-c", "import mlx_lm", env={"MLX_M3_PLUGIN_STRICT": "1"})

    def test_a_patch_that_fails(self, own_guest: Environment, stock_stderr: list[str]):
        edit(
            own_guest.plugin / "hosts" / "mlx_lm" / "patches.py",
            "mlx_lm.tokenizer_utils:TokenizerWrapper.__init__",
            "mlx_lm.tokenizer_utils:RenamedByUpstream.__init__",
        )
        child = own_guest.run("-c", PROBE)

        (line,) = news(child.stderr, stock_stderr)
        assert "mlx-m3-plugin" in line
        assert "mlx_lm.tokenizer_utils" in line
        assert "RenamedByUpstream" in line
        status = own_guest.run("-c", "import mlx_lm, mlx_m3_plugin; print(mlx_m3_plugin.status())").stdout
        # The others of this module work, and are shown.
        assert "mlx_lm.tokenizer_utils: a lone" in status or "mlx_lm.tokenizer_utils: no parser" in status
        assert answer(child.stdout) == ours(own_guest.plugin)
        with pytest.raises(CommandError, match=r"RuntimeError: mlx-m3-plugin: .*RenamedByUpstream"):
            own_guest.run("-c", "import mlx_lm", env={"MLX_M3_PLUGIN_STRICT": "1"})

    def test_a_model_file_that_cannot_be_imported(self, own_guest: Environment):
        """Upstream turns an ImportError into "not supported", which would hide the cause."""
        file = own_guest.plugin / "hosts" / "mlx_lm" / "minimax_m3_vl.py"
        append(file, "raise ImportError('broken on purpose')")
        answers = json.loads(own_guest.run("-c", LOOK_UP, *MODEL_TYPES).stdout)

        error, message = answers["minimax_m3_vl"]
        assert error == "RuntimeError"
        assert "mlx-m3-plugin" in message
        assert str(file) in message
        assert "broken on purpose" in message
        assert answers["minimax_m3"][0] == "class"

    def test_start_up_files_without_a_package(self, own_guest: Environment):
        """An interrupted uninstallation."""
        shutil.rmtree(own_guest.plugin)
        child = own_guest.run("-c", "print('alive')")

        assert child.stdout == "alive\n"
        assert "mlx_m3_plugin_startup" in child.stderr


def news(stderr: str, stock_stderr: list[str]) -> list[str]:
    return [line for line in stderr.splitlines() if line not in stock_stderr]
