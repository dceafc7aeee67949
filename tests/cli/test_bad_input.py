"""All that a user can get wrong, typed: one clear line, its exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import tiny_encoder
from helpers.tiny_bundle import change_manifest
from helpers.tiny_encoder import MODEL, described
from onnx import helper

import bertile
from bertile.base.errors import BertileError, InputError
from bertile.cli import main
from bertile.config import Config
from bertile.export import cached


@pytest.fixture(scope="module")
def cache(stages) -> str:
    return stages


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, stages) -> Path:
    """A real bundle with a tokenizer of seven words; not to be changed."""
    directory = tiny_encoder.compile(tmp_path_factory.mktemp("compiled") / "tiny", stages)
    again = ["-q", "compile", MODEL, "-o", str(directory.with_name("again")), *at(stages)]
    assert main.main(again) == 0
    assert main.main(["-q", "run", str(directory), "good movie"]) == 0
    return directory


@pytest.fixture
def damaged(compiled, tmp_path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(compiled, tmp_path / "damaged"))


@pytest.fixture
def refused(capfd) -> Callable[..., None]:
    """Type a command that has to fail."""

    def type_command(code: int, message: str, *arguments: str) -> None:
        exit_code = main.main(["-q", *arguments])
        out, err = capfd.readouterr()
        assert (exit_code, out) == (code, ""), err
        assert err.startswith("bertile: ") and err.count("\n") == 1 and len(err) < 600, err
        assert message in err and "unexpected" not in err, err

    return type_command


def at(cache: str) -> tuple[str, str]:
    return "--cache-dir", cache


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("*"))


# What to compile


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (2, "did you mean 'bert-tiny'?", ["synthetic:bert-tinny"]),
        (2, "did you mean 'encoder'?", ["synthetic:bert-tiny:encoderr"]),
        (2, "model 'mini lm' is unknown; did you mean 'minilm'?", ["mini lm"]),
        (1, "there is no directory './absent'", ["./absent"]),
        (1, "'absent.onnx' cannot be read: No such file", ["absent.onnx"]),
        (2, "did you mean 'x86-avx512'?", [MODEL, "--target", "x86-avx51"]),
        (2, "precision 'fp23' is unknown; did you mean 'fp32'?", [MODEL, "--precision", "fp23"]),
        (2, "did you mean 'quick'?", [MODEL, "--tune", "quikc"]),
        (2, "did you mean 'include'?", [MODEL, "--runtime", "inclde"]),
        (2, "did you mean 'masked-lm'?", ["synthetic:bert-tiny", "--head", "maskedlm"]),
        (2, "option '--tagret' is unknown; did you mean '--target'?", [MODEL, "--tagret", "x"]),
        (2, "threads is 0; give a whole number above 0", [MODEL, "--threads", "0"]),
    ],
)
def test_compile_refuses_names_that_it_does_not_know(
    tmp_path, monkeypatch, cache, refused, code, message, arguments
):
    monkeypatch.chdir(tmp_path)
    refused(code, message, "compile", *arguments, "-o", "out", *at(cache))
    assert leftovers(tmp_path) == []


def test_compile_names_the_remedy_when_the_hub_is_out_of_reach(
    tmp_path, monkeypatch, cache, refused
):
    hub = pytest.importorskip("huggingface_hub", reason="the hub's client")

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    message = "could not be fetched from the Hugging Face hub; connect to the network"
    refused(1, message, "compile", "someone/some-bert", "-o", str(tmp_path / "out"), *at(cache))
    assert leftovers(tmp_path) == []


def test_compile_refuses_a_checkpoint_that_is_damaged(tmp_path, cache, refused):
    model = tmp_path / "model"
    model.mkdir()
    command = ("compile", str(model), "-o", str(tmp_path / "out"), *at(cache))
    refused(1, "has no config.json; give the directory that save_pretrained wrote", *command)
    (model / "config.json").write_text('{"model_type": "gpt9"}')
    refused(1, "has no models of type 'gpt9'; install a newer one", *command)
    (model / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    (model / "model.safetensors").write_bytes(b"no weights")
    refused(1, "cannot be loaded", *command)
    assert leftovers(tmp_path) == ["config.json", "model", "model.safetensors"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("3", "is not a JSON object"),
        ("[" * 100_000, "is nested too deep"),
        ('{"model_type": ["bert"]}', "says model_type ['bert']; expected is a name"),
        ('{"model_type": "bert", "num_hidden_layers": 1000000000}', "expected is a whole number"),
        ('{"model_type": "bert", "num_hidden_layers": -1}', "says num_hidden_layers -1"),
        ('{"model_type": "bert", "pad_token_id": -9}', "says pad_token_id -9"),
        (
            '{"model_type": "bert", "position_embedding_type": "relative_key"}',
            "position_embedding_type 'relative_key'; --allow-unused compiles it without",
        ),
        ('{"model_type": "bert", "auto_map": {"AutoModel": "my.Bert"}}', "AutoModel: my.Bert"),
    ],
)
def test_compile_refuses_a_config_of_no_encoder(tmp_path, cache, refused, config, message):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(config)
    refused(1, message, "compile", str(model), "-o", str(tmp_path / "out"), *at(cache))
    assert leftovers(tmp_path) == ["config.json", "model"]


@pytest.fixture(scope="module")
def exported(stages) -> Path:
    """The ONNX file that the bundle was made from."""
    return cached.export_cached(MODEL, Config(cache_dir=stages)).onnx_path


def with_operator(data: bytes, op: str, domain: str) -> bytes:
    model = onnx.load_from_string(data)
    last = model.graph.node[-1]
    odd = helper.make_node(op, [last.input[0]], ["odd"], "the-node", domain=domain)
    model.graph.node.insert(len(model.graph.node) - 1, odd)
    last.input[0] = "odd"
    return model.SerializeToString()


ONNX_FILES = {
    "text": (lambda data: b"I am a text\n" * 9, "is not an ONNX file, or it is truncated"),
    "empty": (lambda data: b"", "is not an ONNX file, or it is truncated"),
    "cut in half": (lambda data: data[: len(data) // 2], "is not an ONNX file, or it is truncated"),
    "cut short": (lambda data: data[:-100], "is not an ONNX file, or it is truncated"),
    "unknown operator": (
        lambda data: with_operator(data, "FusedSecret", ""),
        "operator FusedSecret (node 'the-node') cannot be imported",
    ),
    "operator of a vendor": (
        lambda data: with_operator(data, "Sampling", "com.microsoft"),
        "operator com.microsoft.Sampling (node 'the-node') is outside the ONNX standard",
    ),
    "operator that TVM lacks": (lambda data: with_operator(data, "Det", ""), "Det"),
}


@pytest.mark.parametrize("case", ONNX_FILES)
def test_compile_refuses_a_bad_onnx_file(tmp_path, cache, exported, refused, capfd, case):
    edit, message = ONNX_FILES[case]
    (tmp_path / "bad.onnx").write_bytes(edit(exported.read_bytes()))
    capfd.readouterr()
    command = ("compile", str(tmp_path / "bad.onnx"), "-o", str(tmp_path / "out"), *at(cache))
    refused(1, message, *command)
    assert leftovers(tmp_path) == ["bad.onnx"]


# What a model is called with


def test_run_refuses_a_text_that_is_too_long_when_asked(compiled, refused):
    refused(
        2,
        "text 2 has 600 tokens, the model takes at most 512; shorten it, or let it be cut",
        *("run", str(compiled), "--no-truncate", "good", "movie " * 600),
    )


def test_run_cuts_a_text_that_is_too_long_and_says_so(compiled, capfd):
    assert main.main(["run", str(compiled), "movie " * 600, "--json"]) == 0
    out, err = capfd.readouterr()
    assert len(json.loads(out)["embedding"]) == 128
    assert err == "1 text was cut to 512 tokens\n"


def test_run_names_the_id_that_the_model_does_not_have(damaged, refused):
    path = damaged / "tokenizer.json"
    path.write_text(
        path.read_text().replace('"movie":6', '"movie":1000').replace('"movie": 6', '"movie": 1000')
    )
    change_manifest(damaged, lambda m: m["files"].update(described(path)))
    refused(
        2, "input_ids[0, 1] is 1000, the model takes 0 to 999", "run", str(damaged), "good movie"
    )


def test_run_refuses_a_bundle_without_a_tokenizer(damaged, refused):
    (damaged / "tokenizer.json").unlink()
    change_manifest(damaged, lambda m: m["files"].pop("tokenizer.json"))
    refused(1, "has no tokenizer.json; call bertile.load", "run", str(damaged), "good")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(input_ids=[[1, 1000]]), "input_ids[0, 1] is 1000, the model takes 0 to 999"),
        (dict(input_ids=[[-1]]), "input_ids[0, 0] is -1"),
        (dict(input_ids=[[1]], token_type_ids=[[2]]), "token_type_ids[0, 0] is 2"),
        (dict(input_ids=[1, 2]), "input_ids has 1 dimension; give (batch, length)"),
        (dict(input_ids=[[1.5]]), "input_ids has dtype float64; give integers"),
        (dict(input_ids=np.ones((1, 513), int)), "has 513 tokens, the model takes at most 512"),
        (dict(input_id=[[1]]), "did you mean 'input_ids'?"),
        (dict(attention_mask=[[1]]), "the input input_ids is missing"),
    ],
)
def test_call_refuses_wrong_ids_and_goes_on_working(compiled, inputs, message):
    with bertile.load(compiled) as model:
        with pytest.raises(InputError) as caught:
            model(**inputs)
        assert message in str(caught.value) and caught.value.exit_code == 2
        assert np.isfinite(model(input_ids=[[2, 4, 3]])["sentence_embedding"]).all()


@pytest.mark.parametrize("command", ["run", "inspect", "verify", "bench"])
def test_commands_refuse_what_is_no_bundle(tmp_path, refused, command):
    text = ["good"] if command == "run" else []
    refused(1, "is not a bundle: it has no manifest.json", command, str(tmp_path), *text)


def test_inspect_refuses_more_tokens_than_the_model_takes(compiled, refused):
    refused(2, "at most 512", "inspect", str(compiled), "--length", "513")


# What has happened to a bundle


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["lib.so", "params.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing; copy or compile the bundle again"),
        (cut, "it is truncated or changed: copy or compile the bundle again"),
        (flip, "has changed since it was compiled; copy or compile the bundle again"),
    ],
)
def test_run_refuses_a_damaged_file(damaged, refused, name, damage, message):
    damage(damaged / name)
    refused(1, f"{name} ", "run", str(damaged), "good")
    refused(1, message, "verify", str(damaged))


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda m: m.update(schema=99), 1, "has schema 99, this loader reads up to 1; update"),
        (lambda m: m.pop("params"), 1, "manifest.json is damaged: 'params' is missing"),
        (lambda m: m["files"].update({"../x": m["files"]["lib.so"]}), 1, "outside the bundle"),
        (lambda m: m["files"].update({"/etc/passwd": m["files"]["lib.so"]}), 1, "is outside the"),
        (lambda m: m["target"].update(arch="riscv64"), 3, "is for riscv64, this machine is"),
        (
            lambda m: m["target"].update(features=["amx_fp64", *m["target"]["features"]]),
            3,
            "this CPU lacks amx_fp64, which the bundle needs",
        ),
        (lambda m: m.update(entry="absent"), 1, "lib.so: it has no function 'absent'"),
        (
            lambda m: m["inputs"][0].update(below=999),
            1,
            "lib.so: it was compiled for 'input input_ids int64 1000 none', the manifest or the",
        ),
    ],
)
def test_run_refuses_a_manifest_that_does_not_fit(damaged, refused, change, code, message):
    change_manifest(damaged, change)
    refused(code, message, "run", str(damaged), "good")


def test_run_refuses_a_manifest_that_was_changed(damaged, refused):
    path = damaged / "manifest.json"
    path.write_text(path.read_text().replace('"lanes": 16', '"lanes": 8'))
    what = "manifest.json has changed since it was compiled; copy or compile the bundle again"
    refused(1, what, "run", str(damaged), "good")
    refused(1, what, "inspect", str(damaged))


def test_run_refuses_a_manifest_that_is_no_json(damaged, refused):
    cut(damaged / "manifest.json")
    refused(1, "manifest.json is damaged", "run", str(damaged), "good")


def test_run_refuses_a_library_of_another_machine(damaged, refused):
    """Even where the manifest says nothing of it: the system's own loader is asked last."""
    path = damaged / "lib.so"
    data = bytearray(path.read_bytes())
    data[18:20] = (243).to_bytes(2, "little")  # e_machine of ELF: RISC-V
    path.write_bytes(data)
    change_manifest(damaged, lambda m: m["files"].update(described(path)))
    refused(1, "cannot load", "run", str(damaged), "good")


# Where the result cannot go


@pytest.fixture
def small_files():
    """Files of this process cannot grow beyond 64 KiB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("compiled", "small_files")
def test_compile_leaves_nothing_behind_when_the_disk_is_full(tmp_path, cache, refused):
    command = ("compile", MODEL, "-o", str(tmp_path / "out"), *at(cache))
    refused(1, f"cannot write {tmp_path}/out: File too large", *command)
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("small_files")
def test_compile_leaves_no_stage_behind_when_the_cache_is_full(exported, tmp_path, refused):
    command = ("compile", str(exported), "-o", str(tmp_path / "out"), *at(str(tmp_path / "stages")))
    message = "stages: File too large; make room or give another directory with --cache-dir"
    refused(1, message, *command)
    assert [name for name in leftovers(tmp_path) if name not in ("stages", "locks")][1:] == []


def test_compile_leaves_the_older_bundle_when_the_disk_is_full(
    damaged, cache, refused, small_files
):
    before, leftovers_before = contents(damaged), leftovers(damaged.parent)
    refused(1, "File too large", "compile", MODEL, "-o", str(damaged), *at(cache))
    assert contents(damaged) == before
    assert leftovers(damaged.parent) == leftovers_before


@pytest.mark.usefixtures("compiled")
def test_compile_refuses_an_output_that_is_no_directory(tmp_path, cache, refused):
    (tmp_path / "file").write_text("mine")
    for output, code, message in (
        ("file", 2, "exists and is not a directory; choose another output directory"),
        ("file/out", 1, f"cannot write {tmp_path}/file/out: "),
    ):
        refused(code, message, "compile", MODEL, "-o", str(tmp_path / output), *at(cache))
    assert (tmp_path / "file").read_text() == "mine" and leftovers(tmp_path) == ["file"]


@pytest.mark.usefixtures("compiled")
def test_compile_refuses_an_output_that_is_not_writable(tmp_path, cache, refused):
    output = "/proc/out"  # nobody may write here, root neither
    refused(1, "cannot write /proc/out: ", "compile", MODEL, "-o", output, *at(cache))
    refused(1, "the cache /proc/stages: ", "compile", MODEL, "-o", output, *at("/proc/stages"))


# What is wrong with the numbers


@pytest.mark.usefixtures("compiled")
def test_compile_writes_nothing_when_the_numbers_differ(tmp_path, monkeypatch, cache, refused):
    from bertile.backends import backend

    monkeypatch.setitem(backend.TOLERANCES, "fp32", 1e-12)
    own = tmp_path / "stages"
    entry = cached.export_cached(MODEL, Config(cache_dir=cache)).directory.parent
    shutil.copytree(entry, own / entry.name)
    command = ("compile", MODEL, "-o", str(tmp_path / "out"), "--no-runtime", *at(str(own)))
    refused(4, "the compiled model differs from ONNX Runtime by", *command)
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]
    assert {path.name for path in own.iterdir()} == {entry.name, "locks"}


def test_verify_says_that_another_model_is_different(compiled, tmp_path, exported, capfd):
    model = onnx.load(exported)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("bias"))
    values = onnx.numpy_helper.to_array(weight) + np.float32(0.5)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "other.onnx")
    capfd.readouterr()
    assert main.main(["verify", str(compiled), "--onnx", str(tmp_path / "other.onnx")]) == 4
    out, err = capfd.readouterr()
    assert ": ABOVE fp32's bound of " in out and "Traceback" not in err


def test_python_raises_what_the_command_prints(tmp_path):
    with pytest.raises(BertileError, match="did you mean 'bert-tiny'") as caught:
        bertile.compile("synthetic:bert-tinny", tmp_path / "out")
    assert caught.value.exit_code == 2
