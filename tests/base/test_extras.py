"""What is missing is said with the smallest extra that brings it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from bertile.base import extras as extras_module
from bertile.base.errors import MissingExtraError
from bertile.base.extras import EXTRA_OF, extra_of, must_be_there

ROOT = Path(__file__).parents[2]
# How packages are called that are imported by another name.
PACKAGES = {
    "tvm": "apache-tvm",
    "tvm_ffi": "apache-tvm-ffi",
    "xgboost": "xgboost-cpu",
    "llama_index": "llama-index-core",
    "haystack": "haystack-ai",
    "opentelemetry": "opentelemetry-sdk",
    "ray.serve": "ray[serve]",
}
# What others of an extra bring along.
BROUGHT = {"huggingface_hub": "transformers"}
DEVICES, DEVELOPERS = ("device", "tracker"), ("test", "dev")


@pytest.fixture(scope="module")
def extras() -> dict[str, set[str]]:
    """Each extra with all packages that it brings."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["optional-dependencies"]

    def brought(extra: str) -> set[str]:
        packages = set()
        for requirement in listed[extra]:
            inner = re.fullmatch(r"bertile\[([\w,-]+)\]", requirement)
            for name in inner[1].split(",") if inner else ():
                packages |= brought(name)
            if not inner:
                whole = re.split(r"[<>=!~]", requirement)[0]  # what ray brings depends on its extra
                packages |= {whole, whole.partition("[")[0]}
        return packages

    return {extra: brought(extra) for extra in listed}


def package_of(module: str) -> str:
    name = BROUGHT.get(module, module)
    return PACKAGES.get(name, name.replace("_", "-"))


def smallest(extras: dict[str, set[str]], modules: list[str]) -> str:
    """The extra with the fewest packages among those that have all of some modules; what a machine
    that only shares out or serves devices installs is for nobody else.
    """
    wanted = {PACKAGES.get(module) or package_of(module.partition(".")[0]) for module in modules}
    enough = [extra for extra in extras if wanted <= extras[extra] and extra not in DEVELOPERS]
    return min(enough, key=lambda extra: (extra in DEVICES, len(extras[extra])))


def test_table_names_the_smallest_extra_of_each_package(extras: dict[str, set[str]]) -> None:
    assert {name: smallest(extras, [name]) for name in EXTRA_OF} == EXTRA_OF
    assert extra_of("onnxruntime.quantization") == "compile" and extra_of("os") is None


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"onnx"}, "the package onnx; install with: pip install 'bertile[compile]'"),
        (
            {"onnx", "torch"},
            "the packages onnx, torch; install with: pip install 'bertile[export]'",
        ),
        ({"onnx", "tokenizers"}, "pip install 'bertile[compile,run]'"),
    ],
)
def test_extras_of_all_that_is_missing_are_named(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], message: str
) -> None:
    monkeypatch.setattr(extras_module, "_is_there", lambda module: module not in missing)
    must_be_there("numpy", "tvm")
    with pytest.raises(MissingExtraError) as caught:
        must_be_there("numpy", "onnx", "torch", "tokenizers")
    assert message in str(caught.value) and caught.value.exit_code == 3


def test_every_step_names_the_smallest_extra_of_what_it_needs(
    extras: dict[str, set[str]],
) -> None:
    wrong = []
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                words = [a.value for a in node.args if isinstance(a, ast.Constant)]
                if words[1:] and words[0] != smallest(extras, words[1:]):
                    wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {words}")
    assert wrong == []
