"""Errors read as one sentence, carry the exit code of the command and suggest known names."""

import pytest

from bertile import loader
from bertile.base import errors

EXIT_CODES = {
    errors.BertileError: 1,
    errors.BundleError: 1,
    errors.ModelError: 1,
    errors.InputError: 2,
    errors.UsageError: 2,
    errors.PlatformError: 3,
    errors.MissingExtraError: 3,
    errors.NumericMismatchError: 4,
}


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_error_has_exit_code_and_one_base(kind):
    assert kind("x").exit_code == EXIT_CODES[kind]
    assert issubclass(kind, errors.BertileError)


def test_error_reads_as_what_and_remedy():
    assert str(errors.UsageError("it failed", "do this")) == "it failed; do this"


def test_error_reads_as_what_when_there_is_no_remedy():
    assert str(errors.UsageError("it failed")) == "it failed"


def test_errors_are_those_of_the_loader():
    assert errors.BertileError is loader.BertileError
    assert errors.BundleError is loader.BundleError


def test_nearest_asks_for_the_near_name_and_lists_the_known():
    text = errors.nearest("x86-avx521", ["x86-avx512", "x86-avx2", "native"])
    assert text == "; did you mean 'x86-avx512'? known: x86-avx512, x86-avx2, native"


def test_nearest_ignores_case():
    assert "did you mean 'MiniLM'?" in errors.nearest("minilm", ["MiniLM", "bert"])


def test_nearest_only_lists_when_nothing_is_near():
    assert errors.nearest("zzz", ["alpha", "beta"]) == "; known: alpha, beta"


def test_nearest_is_empty_when_nothing_is_known():
    assert errors.nearest("zzz", []) == ""


def test_require_returns_the_modules():
    json, path = errors.require("bench", "json", "os.path")
    assert json.__name__ == "json" and hasattr(path, "join")


def test_require_names_package_and_extra_when_it_is_missing():
    with pytest.raises(errors.MissingExtraError) as caught:
        errors.require("export", "json", "no_such_package.inner")
    assert str(caught.value) == (
        "this step needs the package no_such_package; "
        "install it with: pip install 'bertile[export]'"
    )


def test_require_tells_why_when_a_module_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.MissingExtraError, match=r"cannot import broken_module: .*no_such"):
        errors.require("bench", "broken_module")


def test_errors_have_a_public_name():
    import bertile.errors as public

    ours = {name for name, error in vars(errors).items() if isinstance(error, type)}
    assert ours - {"ModuleType", "Iterable"} == set(public.__all__)
    assert all(getattr(public, name) is getattr(errors, name) for name in public.__all__)
