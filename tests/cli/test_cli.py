"""The command line: exit codes, one clear line per mistake, data on stdout, nothing heavy early."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bertile.base.errors import NumericMismatchError, PlatformError
from bertile.base.progress import Progress
from bertile.cli import config_flags, main
from bertile.config import HEADS, PRECISIONS, RUNTIMES, TUNE_EFFORTS, Config
from bertile.targets import rows
from bertile.targets.processors import PROCESSORS

SUMMARY = {
    "output": "out",
    "size_bytes": 91_500_000,
    "milliseconds": 3.456,
    "length": 128,
    "threads": 2,
    "max_abs_difference": 1.2e-6,
    "check": "largest error 1.2e-06 against ONNX Runtime",
    "kernels": {"tuned": 1, "default": 12, "generic": 3},
    "kernels_in_words": "13 kernels of Bertile (1 tuned, 12 defaults), 3 of TVM",
    "stages": [{"stage": "export", "seconds": 1.0, "cached": True}],
}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver that only remembers how it was called."""
    calls = SimpleNamespace(config=None, error=None)

    def run(model: str, output: Path, config: Config, progress: Progress) -> dict:
        calls.model, calls.output, calls.config = model, output, config
        print("chatter of a library")
        progress.say("working")
        if calls.error:
            raise calls.error
        return SUMMARY

    calls.compile = calls.export = run
    monkeypatch.setitem(sys.modules, "bertile.driver", calls)
    monkeypatch.setattr("bertile.driver", calls, raising=False)
    return calls


def call(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = main.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def shown(name: str) -> str:
    """The help of a command, its lines joined."""
    _, parsers = main._parser(name)
    text = parsers[name].format_help()
    # argparse breaks lines at blanks and behind hyphens
    return re.sub(r"(?<=-)\n +", "", text).replace("\n                        ", " ")


def flags(name: str) -> set[str]:
    _, parsers = main._parser(name)
    return set(parsers[name]._option_string_actions)


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_imports_nothing_heavy_and_no_other_command(name: str) -> None:
    code = (
        "import sys; from bertile.cli import main\n"
        f"try: main.main(['{name}', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(c for c in main.COMMANDS if f'bertile.cli.{c}' in sys.modules))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'tvm', 'tvm_ffi', 'torch',"
        " 'onnx', 'transformers', 'onnxruntime', 'multiprocessing', 'ctypes'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-2:] == [f"['{name}']", "[]"]
    assert "--json" in run.stdout


def test_help_names_the_values_that_config_allows() -> None:
    metavars = {flag.name: flag.metavar for flag in config_flags.CONFIG_FLAGS}
    assert metavars["--precision"] == "|".join(PRECISIONS)
    assert metavars["--tune"] == "|".join(TUNE_EFFORTS)
    assert metavars["--runtime"] == "|".join(RUNTIMES)
    assert [flag.name for flag in config_flags.CONFIG_FLAGS] == [
        f"--{name.replace('_', '-')}" for name in Config().to_dict()
    ]
    help_text = shown("compile")
    for word in (*HEADS, *PROCESSORS, *PROCESSORS.values(), "native"):
        assert word in help_text
    assert tuple(PROCESSORS) == rows.names()


def test_commands_list_their_own_flags_alone() -> None:
    """Of the choices of a compile each offers those that it reads."""
    assert not {"--tune", "--precision", "--target", "--threads"} & flags("export")
    assert {"--head", "--rename", "--tokenizer", "--cache-dir", "--dry-run"} <= flags("export")
    assert not {"--runtime", "--no-runtime", "--libc"} & flags("tune")
    assert not {"--head", "--rename", "--tokenizer"} & flags("demo")
    assert {flag.name for flag in config_flags.CONFIG_FLAGS} <= flags("compile")
    assert "quick|full" in shown("tune") and "auto|none" not in shown("tune")


def test_flags_stand_in_groups() -> None:
    text = shown("compile")
    places = [text.index(f"\n{flag.group}:") for flag in config_flags.CONFIG_FLAGS]
    assert min(places) > 0 and len(set(places)) == 5


@pytest.mark.parametrize("name", main.COMMANDS)
def test_help_of_a_command_is_its_own_help(capsys: pytest.CaptureFixture, name: str) -> None:
    code, out, _ = call(capsys, "help", name)
    with pytest.raises(SystemExit):
        main.main([name, "--help"])
    assert code == 0 and out == capsys.readouterr().out
    assert out.startswith(f"usage: bertile {name}")


def test_help_alone_lists_all_commands(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = call(capsys, "help")
    assert code == 0 and all(name in out for name in main.COMMANDS)
    assert call(capsys, "help", "compil")[0] == 2


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_flags_and_words(
    capsys: pytest.CaptureFixture, shell: str
) -> None:
    pytest.importorskip("shtab")
    code, script, _ = call(capsys, "completion", shell)
    words = (*main.COMMANDS, "--max-drop", "x86-avx512-vnni", "masked-lm", "percentile", "tracker")
    assert code == 0 and [word for word in words if word not in script] == []


def test_bash_reads_the_completion_and_answers(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    _, script, _ = call(capsys, "completion", "bash")
    line = "COMP_WORDS=(bertile compile --precision bf); COMP_CWORD=3; _shtab_bertile"
    command = ["bash", "-c", f"{script}\n{line}; echo ${{COMPREPLY[@]}}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (run.stdout.split(), run.stderr) == (["bf16"], "")


def test_completion_names_its_extra_where_shtab_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = call(capsys, "completion", "zsh")
    assert (code, out) == (3, "") and "pip install 'bertile[completion]'" in err


def test_every_command_is_a_module_that_runs_it() -> None:
    for name in main.COMMANDS:
        module = main._command(name)
        assert callable(module.add_arguments) and callable(module.run)
    files = Path(main.__file__).parent.glob("*.py")
    runs = {file.stem for file in files if "\ndef add_arguments(" in file.read_text("utf-8")}
    assert runs == set(main.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compil"], "command 'compil' is unknown; did you mean 'compile'?"),
        ([], "the following arguments are required: COMMAND"),
        (["compile", "minilm"], "the following arguments are required: -o/--output"),
        (["compile", "minilm", "-o", "x", "--tunee", "none"], "did you mean '--tune'?"),
        (["compile", "minilm", "-o", "x", "--threa", "2"], "did you mean '--threads'?"),
        (["compile", "minilm", "-o", "x", "--tune", "quik"], "did you mean 'quick'?"),
        (["compile", "minilm", "-o", "x", "--target", "x86-avx521"], "did you mean 'x86-avx512'?"),
        (["compile", "minilm", "-o", "x", "--trials", "many"], "invalid int value: 'many'"),
        (["compile", "minilm", "-o", "x", "--trials", "0"], "trials is 0"),
        (["compile", "minilm", "-o", "x", "--head", "masked-ml"], "did you mean 'masked-lm'?"),
        (["compile", "a", "b", "-o", "x"], "unexpected argument 'b'"),
        (["compile", "minilm", "-o", "x", "--config", "/no/file"], "/no/file cannot be read"),
        (["export", "minilm", "-o", "x", "--tune", "none"], "option '--tune' is unknown"),
        (["device", "serv"], "action 'serv' of bertile device is unknown; did you mean 'serve'?"),
        (["cache", "clean"], "action 'clean' of bertile cache is unknown; did you mean 'clear'?"),
        (["--jsno", "targets"], "option '--jsno' is unknown; did you mean '--json'?"),
    ],
)
def test_usage_mistakes_are_one_line_and_exit_code_2(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out, driver.config) == (2, "", None)
    assert message in err and err.startswith("bertile: ") and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--into", "--update-readme"])
def test_bench_writes_into_a_page_by_either_name_of_the_flag(flag: str) -> None:
    assert main._parse(["bench", "minilm", flag, "RESULTS.md"]).into == "RESULTS.md"


def test_compile_hands_the_config_on_and_prints_a_table(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["compile", "minilm", "-o", "out", "--tune", "quick", "--threads", "2"]
    code, out, err = call(capsys, *arguments)
    assert code == 0 and driver.model == "minilm" and driver.output == Path("out")
    assert (driver.config.tune, driver.config.threads) == ("quick", 2)
    for text in ("91.5 MB", "3.46 ms", "1.2e-06", "(1 tuned, 12 defaults), 3 of TVM"):
        assert text in out
    assert "working" in err and "chatter" in err and "chatter" not in out


@pytest.mark.parametrize("arguments", [("--json", "-q", "compile"), ("compile", "--json", "-q")])
def test_global_flags_stand_before_or_behind_the_command(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture, arguments: tuple[str, ...]
) -> None:
    code, out, err = call(capsys, *arguments, "minilm", "-o", "out")
    assert code == 0 and json.loads(out) == SUMMARY and "working" not in err


def test_dry_run_says_the_plan_and_does_nothing(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["compile", "minilm", "-o", "out", "--target", "x86-avx2", "--dry-run"]
    code, out, _ = call(capsys, *arguments)
    assert code == 0 and driver.config is None
    assert "x86-avx2" in out and "minilm" in out and "Hugging Face" not in out
    code, out, _ = call(capsys, "compile", "a-hub/id", *arguments[2:])
    assert code == 0 and "from the Hugging Face hub, which is not asked" in out


def test_mcpu_names_the_processor_of_the_generic_target(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    line = ["compile", "minilm", "-o", "out", "--mcpu", "cortex-a55"]
    code, out, _ = call(capsys, *line, "--target", "aarch64", "--dry-run")
    assert code == 0 and "aarch64-cortex-a55" in out and "asimddp" in out
    path = tmp_path / "choices.json"
    path.write_text(Config(target="aarch64").to_json())
    code, _, _ = call(capsys, *line, "--config", str(path))
    assert code == 0 and driver.config.target == "aarch64-cortex-a55"
    code, _, err = call(capsys, *line)
    assert code == 2 and "give --mcpu with --target aarch64" in err


def test_save_config_and_config_give_the_same_choices_and_flags_go_first(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = str(tmp_path / "choices.json")
    line = ["compile", "minilm", "-o", "out"]
    call(capsys, *line, "--tune", "full", "--trials", "7", "--save-config", path)
    first = driver.config
    assert Config.from_json(Path(path).read_text()).cache_dir is None  # no trace of this machine
    call(capsys, *line, "--config", path)
    assert driver.config == first
    call(capsys, *line, "--config", path, "--trials", "9")
    assert (driver.config.tune, driver.config.trials) == ("full", 9)


def test_shipped_log_is_used_unless_refused(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    for flags, expected in (((), True), (("--no-shipped-log",), False), (("--shipped-log",), True)):
        call(capsys, "compile", "minilm", "-o", "out", *flags)
        assert driver.config.shipped_log is expected


def test_cache_directory_is_the_flag_or_xdg_cache_home(
    driver: SimpleNamespace, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    call(capsys, "compile", "minilm", "-o", "out")
    assert driver.config.cache_dir == "/somewhere/bertile"
    call(capsys, "compile", "minilm", "-o", "out", "--cache-dir", "here")
    assert driver.config.cache_dir == "here"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the XDG specification: to be ignored
    call(capsys, "compile", "minilm", "-o", "out")
    assert driver.config.cache_dir is None


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (PlatformError("no linker", "install one"), 3, "bertile: no linker; install one\n"),
        (NumericMismatchError("differs by 1"), 4, "bertile: differs by 1\n"),
        (KeyboardInterrupt(), 130, "bertile: stopped\n"),
        (PermissionError(13, "Permission denied", "/out"), 1, "bertile: /out: Permission denied\n"),
        (ModuleNotFoundError("No module named 'tvm'", name="tvm"), 3, "'bertile[compile]'"),
        (ModuleNotFoundError("No module named 'x'", name="x"), 1, "an unexpected error"),
        (ValueError("a\nlong stack"), 1, "bertile: an unexpected error: ValueError: a; run it"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    driver: SimpleNamespace,
    capsys: pytest.CaptureFixture,
    error: BaseException,
    code: int,
    message: str,
) -> None:
    driver.error = error
    exit_code, out, err = call(capsys, "compile", "-q", "minilm", "-o", "out")
    assert (exit_code, out) == (code, "")
    assert message in err and "Traceback" not in err


def test_debug_shows_the_stack(driver: SimpleNamespace) -> None:
    driver.error = PlatformError("no linker")
    with pytest.raises(PlatformError):
        main.main(["compile", "minilm", "-o", "out", "--debug"])


def test_targets_lists_every_row(capsys: pytest.CaptureFixture) -> None:
    from bertile.targets.rows import names

    code, out, _ = call(capsys, "targets")
    assert code == 0 and all(name in out for name in names())
    code, out, _ = call(capsys, "targets", "--json")
    assert [row["name"] for row in json.loads(out)] == list(names())


@pytest.mark.parametrize(("difference", "code"), [(1e-6, 0), (1e-3, 4), (float("nan"), 4)])
def test_verify_exits_with_4_past_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, difference: float, code: int
) -> None:
    check = {"max_abs_difference": difference, "tolerance": 1e-4, "reference": "ONNX Runtime"}
    verifier = SimpleNamespace(verify=lambda *_, **__: check, as_text=lambda _: "")
    monkeypatch.setitem(sys.modules, "bertile.verify.verifier", verifier)
    monkeypatch.setattr("bertile.verify.verifier", verifier, raising=False)
    assert call(capsys, "verify", "bundle")[0] == code


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "bertile", "targets"]
    run = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


def test_termination_is_an_exception_so_that_half_made_files_are_removed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        main._clean_up_when_terminated()
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
    finally:
        signal.signal(signal.SIGTERM, before)


def test_version_is_the_package_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["--version"])
    assert caught.value.code in (0, None) and capsys.readouterr().out.startswith("bertile 0.")


def test_heads_are_those_that_the_exporter_knows() -> None:
    models = pytest.importorskip("bertile.export.checkpoints")
    assert tuple(models.HEADS) == HEADS
