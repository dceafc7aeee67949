"""Two replicas of the server under Ray Serve answer as the model does by itself."""

from __future__ import annotations

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEXTS = [f"the old film of {number} cats" for number in range(40)]


@pytest.mark.slow
def test_replicas_share_the_requests(stages: str, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="which runs the replicas")
    serve = pytest.importorskip("ray.serve", reason="which runs the replicas")
    import bertile
    from bertile import driver
    from bertile.config import Config
    from bertile.server.ray_serve import deployment
    from bertile.server.settings import Settings
    from bertile.studies.serving_processes import free_port

    bundle, port = tmp_path / "minilm", free_port()
    driver.compile("minilm", bundle, Config(precision="int8", cache_dir=stages))
    with bertile.open(bundle, 1) as model:
        wanted = model.encode(TEXTS, normalize_embeddings=True)

    def get(path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", content, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = Settings(max_batch_tokens=256, quiet=True)
        serve.run(deployment({"minilm": bundle}, 2, 1, settings))
        with ThreadPoolExecutor(8) as clients:
            rows = list(clients.map(lambda text: get("/embed", {"inputs": text})[0], TEXTS))
        np.testing.assert_allclose(np.array(rows, np.float32), wanted, atol=1e-5)
        assert get("/v1/models")["data"][0]["id"] == "minilm"
        (app,) = serve.status().applications.values()
        assert app.deployments["bertile"].replica_states == {"RUNNING": 2}
    finally:
        serve.shutdown()
        ray.shutdown()
