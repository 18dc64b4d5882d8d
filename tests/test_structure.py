"""The shape of the house: imports point one way, nothing unsafe is used, files and functions stay readable."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ldm_vae"
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = ["data", "training", "autoencoder", "latents", "diffusion", "evaluation", "applications"]

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "np.load", "numpy.load"}
UNSAFE_LOADERS = {"Loader", "UnsafeLoader", "FullLoader", "CLoader", "CFullLoader", "unsafe_load", "full_load"}
NEVER_GIVEN = {"trust_remote_code", "custom_pipeline", "allow_pickle", "shell"}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return names | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    folder = path.relative_to(PACKAGE).parts[0]
    if folder not in ORDER:
        return
    allowed = ORDER[: ORDER.index(folder) + 1]
    if folder == "training":  # the engine knows neither data nor models
        allowed = ["training"]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "ldm_vae" and len(parts) > 1 and parts[1] in ORDER:
            assert parts[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_says_what_it_owns(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} opens without a docstring"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_images_are_scaled_to_a_crop_in_one_place(path):
    """`data.samples.crop_image` counts what is enlarged; see tests/test_enlarged.py."""
    if path.relative_to(PACKAGE).as_posix() not in ("data/transforms.py", "data/samples.py"):
        assert "resize_center_crop(" not in path.read_text()


MODEL_WORDS = (
    "autoencoder", "vae", "unet", "pipeline", "latent", "latents", "discriminator", "adversarial", "phases", "crop",
    "crops", "kid", "neighbors", "neighbours", "patience", "kl", "nats_per_dim", "perceptual",
)  # fmt: skip


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").glob("*.py")), ids=lambda path: path.name)
def test_the_trainer_knows_no_key_or_folder_of_a_model(path):
    assert re.findall(rf"\b(?:{'|'.join(MODEL_WORDS)})\b", path.read_text(), re.IGNORECASE) == []


def unsafe_parts(code: str) -> list[str]:
    """What a module does that could run or trust the content of a file."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if isinstance(node, (ast.Attribute, ast.Name)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            if name in UNSAFE_LOADERS:
                found.append(name)
        if isinstance(node, ast.Call):
            found += _unsafe_call(node)
    return found


def _unsafe_call(call: ast.Call) -> list[str]:
    function = ast.unparse(call.func)
    given = {word.arg: word.value for word in call.keywords}
    found = [
        name for name in NEVER_GIVEN & given.keys()
        if not (isinstance(value := given[name], ast.Constant) and value.value is False)
    ]  # fmt: skip
    if function in UNSAFE_CALLS:
        found.append(function)
    weights_only = given.get("weights_only")
    if function == "torch.load" and not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
        found.append(function)
    return found


def calls(code: str, method: str) -> bool:
    """Whether `something.method(...)` is called; examples in texts do not count."""
    functions = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return any(isinstance(function, ast.Attribute) and function.attr == method for function in functions)


@pytest.mark.promise(9)
def test_the_package_runs_no_content_of_files(record_property):
    assert {str(path.relative_to(PACKAGE)): parts for path in FILES if (parts := unsafe_parts(path.read_text()))} == {}
    loading = [text for path in FILES if calls(text := path.read_text(), "from_pretrained")]
    assert loading
    assert all("use_safetensors" in text or "def from_pretrained" in text for text in loading)
    record_property("figure", f"{len(FILES)} modules: no pickle, eval, shell, remote code or unsafe loader in any")


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import dill", "eval(text)", "exec(text)",
        "os.system(text)", "subprocess.run(text, shell=True)", "subprocess.run(text, shell=flag)", "yaml.load(text)",
        "yaml.unsafe_load(text)", "yaml.load(text, yaml.FullLoader)", "yaml.parse(text, Loader=yaml.UnsafeLoader)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "torch.load(path, weights_only=flag)",
        "np.load(path)", "np.save(path, a, allow_pickle=True)", "load(path, trust_remote_code=True)",
        "load(path, custom_pipeline=name)", "compile(text, '', 'exec')",
    ],
)  # fmt: skip
def test_the_check_of_the_package_sees_what_is_unsafe(code):
    assert unsafe_parts(code)


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(path, map_location='cpu', weights_only=True)", "np.save(path, a, allow_pickle=False)",
        "yaml.parse(text, Loader=yaml.SafeLoader)", "re.compile(text)", "model.eval()", "torch.compile(model)",
    ],
)  # fmt: skip
def test_the_check_of_the_package_passes_what_is_safe(code):
    assert unsafe_parts(code) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 900, f"{path} is long: split it by noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 75, f"{path}: {node.name} is long"


def imports_of_modules(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules among these that it imports: at the top, in a function or for a type checker."""
    found: dict[str, set[str]] = {}
    for name, source in sources.items():
        found[name] = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            else:
                names = [(alias.name,) for alias in node.names] if isinstance(node, ast.Import) else []
            found[name] |= {next((one for one in choice if one in sources), name) for choice in names} - {name}
    return found


def on_a_circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves through others."""
    found = []
    for name in imports:
        reached, left = set(), list(imports[name])
        while left:
            if (module := left.pop()) not in reached:
                reached.add(module)
                left += imports[module]
        if name in reached:
            found.append(name)
    return sorted(found)


def test_no_modules_import_each_other():
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    sources = {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}
    assert on_a_circle(imports_of_modules(sources)) == []


def test_a_circle_is_seen_however_a_module_is_imported():
    sources = {
        "p": "",
        "p.a": "from p.b import f",
        "p.b": "def f():\n    from p import c",
        "p.c": "if TYPE_CHECKING:\n    import p.d",
        "p.d": "from p.b import f\nfrom p import e",
        "p.e": "import torch",
    }
    assert on_a_circle(imports_of_modules(sources)) == ["p.b", "p.c", "p.d"]
    assert on_a_circle(imports_of_modules(sources | {"p.c": "from p.e import g"})) == []


SHARED_NAMES = {
    "Item", "Key", "StepNoise", "make_accelerator", "markdown", "plot_histograms", "plot_spectra", "render",
    "summarize", "table",
}  # fmt: skip
"""Public names that several modules define, each with one meaning everywhere."""


def names_defined_twice(sources: dict[str, str]) -> set[str]:
    """Public functions and classes at the top level of more than one module."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, set()).add(module)
    return {name for name, modules in found.items() if len(modules) > 1}


def test_a_name_has_one_meaning():
    assert names_defined_twice({str(path): path.read_text() for path in FILES}) == SHARED_NAMES


def test_a_name_with_two_definitions_is_seen():
    overloads = "def f(x: int): ...\ndef f(x: str): ...\ndef _g(): ..."
    assert names_defined_twice({"a": overloads, "b": "class F: ...\ndef _g(): ..."}) == set()
    assert names_defined_twice({"a": overloads, "b": "class f: ..."}) == {"f"}
