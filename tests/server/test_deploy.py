"""What lies in deploy/ says what the server takes: its command lines, its port, its signals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bertile.cli import serve
from bertile.cli.parser import Parser, parse

DEPLOY = Path(__file__).parents[2] / "pipeline" / "server" / "deploy"
UNIT, DOCKERFILE = DEPLOY / "bertile.service", DEPLOY / "Dockerfile"


def parsed(words: list[str]) -> Any:
    """What `bertile serve` reads of these words."""
    whole = Parser(prog="bertile serve")
    serve.add_arguments(whole)
    return parse(whole, serve.add_arguments, words)


def in_dockerfile(instruction: str) -> list[str]:
    return json.loads(re.search(rf"^{instruction} (\[.*\])$", DOCKERFILE.read_text(), re.M)[1])


def test_container_serves_on_the_port_that_it_opens() -> None:
    entry = in_dockerfile("ENTRYPOINT")
    assert entry[:2] == ["bertile", "serve"]
    options = parsed([*entry[2:], *in_dockerfile("CMD")])
    assert options.models_ == ["/models/minilm"] and options.hostname == "0.0.0.0"
    text = DOCKERFILE.read_text()
    assert f"EXPOSE {options.port}\n" in text and f"127.0.0.1:{options.port}/health" in text


def test_compose_joins_server_and_prometheus() -> None:
    yaml = pytest.importorskip("yaml", reason="which reads the files")
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    port = parsed(in_dockerfile("ENTRYPOINT")[2:]).port
    assert services["bertile"]["ports"] == [f"{port}:{port}"]
    build = services["bertile"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE.resolve()
    assert services["bertile"]["volumes"][0].split(":")[1] == in_dockerfile("CMD")[0]
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == [f"bertile:{port}"]
    mounted = services["prometheus"]["volumes"][0].split(":")[0]
    assert (DEPLOY / mounted).is_file()


def test_unit_starts_the_server_and_waits_for_its_grace() -> None:
    text = UNIT.read_text()
    words = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])
    assert words[0].endswith("/bin/bertile") and words[1] == "serve"
    options = parsed(words[2:])
    assert options.models_ == ["/srv/bertile/minilm"]
    from bertile.server.settings import Settings

    assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1]) > Settings().grace


def test_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    command = shutil.which("systemd-analyze")
    if command is None:
        pytest.skip("systemd-analyze is not there")
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/bertile/bin/bertile", sys.executable))
    done = subprocess.run([command, "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
