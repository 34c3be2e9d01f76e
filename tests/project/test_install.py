"""Installing: the kernels never break JAX, messages name what is missing, and their commands work."""

import email.message
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

import jaxnorm as jn
from jaxnorm._backends import cpu
from jaxnorm._backends.cpu import loading
from jaxnorm._backends.pallas import adapter as mosaic
from jaxnorm._core import install as _install

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]
THIRD_PARTY = ROOT / "jaxnorm" / "_backends" / "cpu" / "third_party"


# --- kernels that do not fit jaxlib -----------------------------------------------------------------------------------

# A library like ours, compiled for FFI version `built`, whose handlers tell XLA the version `told`.
SOURCE = """
#include "xla/ffi/api/c_api.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
static XLA_FFI_Error* handler(XLA_FFI_CallFrame* frame) {
  XLA_FFI_Metadata* metadata = ((XLA_FFI_Metadata_Extension*)frame->extension_start)->metadata;
  metadata->api_version.major_version = TOLD_MAJOR, metadata->api_version.minor_version = TOLD_MINOR;
  return nullptr;
}
#define HANDLER(name) EXPORT XLA_FFI_Error* jaxnorm_##name(XLA_FFI_CallFrame* frame) { return handler(frame); }
HANDLER(forward) HANDLER(moments) HANDLER(normalize) HANDLER(backward) HANDLER(gradient_sums) HANDLER(gradient)
EXPORT const char* jaxnorm_instruction_set() { return "baseline"; }
EXPORT const char* jaxnorm_instruction_sets() { return "baseline "; }
#ifdef BUILT
EXPORT const int* jaxnorm_ffi_version() { static const int version[] = {BUILT}; return version; }
#endif
"""


def build(folder: Path, built: str | None, told: tuple[int, int]) -> Path:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on the path")
    library = folder / "jaxnorm_cpu.so"
    define = [f"-DTOLD_MAJOR={told[0]}", f"-DTOLD_MINOR={told[1]}", *([f"-DBUILT={built}"] if built else [])]
    command = [compiler, "-shared", "-fPIC", "-isystem", THIRD_PARTY, *define, "-x", "c++", "-", "-o", library]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    return library


REFUSED_BY_XLA = r"API version \(0\.99\) is incompatible"


@pytest.mark.versions
@pytest.mark.parametrize(
    ("built", "told", "headers", "reason"),
    [
        ("0, 99", (0, 99), True, r"it was built for XLA FFI 0\.99, and jaxlib has 0\.\d+\."),
        ("1, 0", (1, 0), True, r"it was built for XLA FFI 1\.0, and jaxlib has 0\.\d+\."),
        ("0, 99", (0, 99), False, REFUSED_BY_XLA),
        ("0, 1", (0, 99), True, REFUSED_BY_XLA),
        (None, (0, 1), True, "undefined symbol: jaxnorm_ffi_version"),
    ],
    ids=["newer", "major", "no headers", "refused by XLA", "no version"],
)
def test_a_library_that_does_not_fit_is_not_registered(built, told, headers, reason, tmp_path, monkeypatch):
    build(tmp_path, built, told)
    monkeypatch.setattr(loading, "_FOLDERS", [str(tmp_path)])
    monkeypatch.delenv("JAXNORM_NATIVE", raising=False)
    if not headers:
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
    library = cpu.library.__wrapped__()
    assert not library.loaded
    assert re.search(rf"jaxnorm_cpu\.so does not work with jaxlib .*{reason}.*: pip install ", library.reason)


def test_importing_jaxnorm_with_kernels_that_xla_refuses_leaves_jax_working(tmp_path):
    """In a process of its own, where no backend has started: the registration must not wait in a queue either."""
    shutil.copytree(ROOT / "jaxnorm", tmp_path / "jaxnorm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    library = build(tmp_path, "0, 1", (0, 99))
    library.rename(tmp_path / "jaxnorm" / "_backends" / "cpu" / library.name)
    code = f"""
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["absl"] = None
import jax, jax.numpy as jnp, jaxnorm as jn
assert jn.__file__.startswith({str(tmp_path)!r})
print(jax.jit(lambda x: x + 1)(1.0), abs(jn.layer_norm(jnp.arange(2048.0).reshape(2, 1024)).mean()) < 1e-6)
print(jn.backends()["native"].active, jn.backends()["native"].reason)
print(jn.backends()["mosaic_gpu"].reason)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAXNORM_"))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    works, native, mosaic_gpu = done.stdout.splitlines()
    assert works == "2.0 True"
    assert re.match(f"False jaxnorm_cpu.so does not work with .*{REFUSED_BY_XLA}", native)
    assert "Pallas needs absl-py" in mosaic_gpu or "only implementation='mosaic_gpu' runs them" in mosaic_gpu


@pytest.mark.versions
@pytest.mark.skipif(not cpu.library().loaded, reason="no kernels")
def test_one_build_runs_on_every_jaxlib():
    """It is compiled with vendored headers, of the oldest supported jaxlib, not with those of the installed one."""
    text = (THIRD_PARTY / "xla" / "ffi" / "api" / "c_api.h").read_text()
    assert re.findall(r"#define XLA_FFI_API_M\w+ (\d)", text) == ["0", "1"]
    assert loading._ffi_version() >= (0, 1)
    assert jn.backends()["native"].active
    assert not any("jax" in line for line in PYPROJECT["build-system"]["requires"])


# --- environment variables --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("JAXNORM_NATIVE", "off", r"JAXNORM_NATIVE=off: unknown value. Write one of 0, 1, or unset it\."),
        ("JAXNORM_ISA", "avx", r"JAXNORM_ISA=avx: unknown value. Write one of avx512bf16, .*baseline, or unset it\."),
        ("JAXNORM_ISA", "avx512", "JAXNORM_ISA=avx512: this processor does not .* Write one of avx2, baseline, or"),
    ],
)
def test_an_unknown_value_of_an_environment_variable_is_an_error(name, value, message, monkeypatch):
    if value == "avx512":
        if not cpu.library().loaded:
            pytest.skip(cpu.library().reason)
        monkeypatch.setattr(loading, "_instruction_sets", lambda kernels: ("avx2", "baseline"))
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        cpu.library.__wrapped__()


def test_environment_variables_are_documented_and_empty_ones_are_unset(monkeypatch):
    for name in ("JAXNORM_NATIVE", "JAXNORM_ISA"):
        assert f"{name}: " in jn.backends.__doc__
        monkeypatch.setenv(name, "")
    assert all(name in jn.backends.__doc__ for name in loading._INSTRUCTION_SETS)
    assert "switched off" not in cpu.library.__wrapped__().reason


# --- what is missing, and the command that installs it ----------------------------------------------------------------


@pytest.mark.parametrize("layers", ["linen", "nnx"])
def test_without_flax_the_layers_say_what_to_install(layers, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    monkeypatch.delitem(sys.modules, f"jaxnorm.{layers}", raising=False)
    with pytest.raises(ImportError, match=rf'jaxnorm\.{layers} needs Flax: .*Write: pip install "jaxnorm\[flax\]"'):
        importlib.import_module(f"jaxnorm.{layers}")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'absl'", name="absl.flags"), "needs absl-py, .*: pip install absl-py$"),
        (ModuleNotFoundError("No module named 'jax.x'", name="jax.x"), rf"^jax {jax.__version__} lacks .*'jax\.x'"),
        (AttributeError("no CompilerParams"), rf"^jax {jax.__version__} lacks the Pallas .*no CompilerParams"),
    ],
    ids=lambda value: type(value).__name__ + str(getattr(value, "name", "")),
)
@pytest.mark.parametrize("module", ["mosaic_gpu", "mosaic_tpu"])
def test_a_pallas_backend_says_what_is_missing(module, error, reason, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    assert re.search(reason, mosaic._loaded.__wrapped__(module))


class Installed:
    """What importlib.metadata knows of an installation."""

    def __init__(self, record, urls=(f"Repository, {REPOSITORY}",)):
        self.record, self.metadata = record, email.message.Message()
        for url in urls:
            self.metadata["Project-URL"] = url

    def read_text(self, name):
        return self.record and json.dumps(self.record)


@pytest.mark.parametrize(
    ("installed", "source"),
    [
        (Installed({"url": f"file://{ROOT}", "dir_info": {}}), f" {ROOT}"),
        (Installed({"url": "https://a.b/c", "vcs_info": {"vcs": "git"}}), " git+https://a.b/c"),
        (
            Installed({"url": "https://a.b/c", "vcs_info": {"vcs": "git", "requested_revision": "v1"}}),
            " git+https://a.b/c@v1",
        ),
        (Installed({"url": "file:///not/here", "dir_info": {}}), f" git+{REPOSITORY}"),
        (Installed({"url": "file:///a/jaxnorm.whl", "archive_info": {}}), f" git+{REPOSITORY}"),
        (Installed(None), f" git+{REPOSITORY}"),
        (Installed(None, ()), " .   # in a checkout of jaxnorm"),
        (None, " .   # in a checkout of jaxnorm"),
    ],
    ids=["folder", "git", "revision", "folder gone", "wheel", "index", "old metadata", "not installed"],
)
def test_the_command_to_reinstall_names_the_source_of_the_installation(installed, source, monkeypatch):
    monkeypatch.setattr(_install, "_checkout", lambda: None)
    monkeypatch.setattr(_install, "_installed", lambda: installed)
    assert _install.reinstall() == f"pip install --force-reinstall --no-deps{source}"
    assert _install.extra("flax") == 'pip install "jaxnorm[flax]"'


def test_commands_name_the_checkout_they_run_in(monkeypatch):
    assert (_install._checkout() == str(ROOT)) == (Path(jn.__file__).parents[1] == ROOT)
    monkeypatch.setattr(_install, "_checkout", lambda: "/my code")
    assert _install.reinstall() == "pip install --force-reinstall --no-deps -e '/my code'"
    assert _install.extra("flax") == 'pip install "jaxnorm[flax]"'
    monkeypatch.setattr(_install, "_installed", lambda: None)
    assert _install.extra("flax") == "pip install -e '/my code[flax]'"


def test_every_page_has_the_address_of_pyproject():
    """[project.urls] is the one place to change it: then this test names the others."""
    name = REPOSITORY.removeprefix("https://github.com/")
    files = [ROOT / "README.md", *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(files) > 2
    for path in files:
        text = path.read_text().replace("\\", "")
        assert f"[flax{'' if path.suffix == '.md' else ',demo'}] @ git+{REPOSITORY}\"" in text, path
        for address in re.findall(r"github(?:usercontent)?\.com/([\w-]+/[\w-]+)", text):
            assert address == name, path
        for address in re.findall(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)", text):
            assert address == name, path


def test_the_installed_metadata_has_the_address():
    installed = _install._installed()
    assert installed is not None
    assert f"Repository, {REPOSITORY}" in installed.metadata.get_all("Project-URL")
