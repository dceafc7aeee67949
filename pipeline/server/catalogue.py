"""Keeps the models that are served, by name; loads, exchanges and drops them while it serves."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bertile import text
from bertile.base.errors import BertileError, UsageError
from bertile.server import errors, token_budget
from bertile.server.errors import Refusal
from bertile.server.metrics import Metrics, ModelMetrics
from bertile.server.scheduler import Scheduler
from bertile.server.settings import Settings, check_name
from bertile.text.classifier import Classifier
from bertile.text.embedder import Embedder
from bertile.text.featurizer import Featurizer
from bertile.text.text_model import Steps, TextModel

LOG = logging.getLogger("bertile")
# What a model answers, by which routes choose one.
DENSE, SPARSE, TOKENS = "embedding", "sparse", "tokens"
CLASSIFIER, RERANKER, OTHER = "classifier", "reranker", "other"
CLASSIFIERS = (CLASSIFIER, RERANKER)
KEPT_STEPS = 256


class Served:
    """A model that is served, with the scheduler that its requests go through."""

    def __init__(
        self, name: str, directory: Path, model: TextModel, settings: Settings, watch: ModelMetrics
    ) -> None:
        self.name, self.directory, self.model = name, directory, model
        self.kind = kind_of(model)
        self.loaded = int(time.time())
        self.mark = mark_of(directory)
        self._settings, self._steps = settings, {}
        most, rate = settings.max_batch_tokens, 0.0
        if most is None:
            most, rate = token_budget.measured(model.engine, model.max_seq_length)
        self.max_batch_tokens = most
        self.scheduler = Scheduler(model.engine, most, watch)
        self.scheduler.blocks_a_second = rate
        watch.queue_size = lambda: self.scheduler.queue_size
        self._made(self.prompt(None), {}).prepare(["a"])  # which reads the tokenizer

    @property
    def source(self) -> str:
        """What was compiled: a directory, or a model's name."""
        return str(self.manifest["model"].get("source") or self.name)

    @property
    def manifest(self) -> dict[str, Any]:
        """What the bundle says of itself."""
        return self.model.model.manifest

    @property
    def labels(self) -> int:
        """How many classes a classifier has."""
        return self.manifest["outputs"][0]["axes"][-1] if self.kind in CLASSIFIERS else 0

    @property
    def dimensions(self) -> int:
        """How many numbers a vector has at most."""
        return self.model.get_sentence_embedding_dimension()

    @property
    def compute_type(self) -> bytes:
        """On what kind of machine it runs, in TEI's words."""
        return b"cpu+optimized" if hasattr(self.model.model, "threads") else b"gpu+optimized"

    def described(self) -> dict[str, Any]:
        """How it was compiled: version, precision, target, head, and whether kernels are tuned."""
        manifest = self.manifest
        origins = Counter(kernel["provenance"] for kernel in manifest.get("kernels", ()))
        config = manifest.get("config", {})
        return {
            "version": manifest.get("bertile", ""),
            "precision": config.get("precision", "fp32"),
            "target": manifest["target"]["name"],
            "head": manifest["model"]["head"],
            "tuned": origins["tuned"] > 0,
            "kernels": dict(origins),
            "streams": self.scheduler.places,
        }

    def prompt(self, name: str | None) -> str:
        """What goes in front of a text for this name; None is the default, as the server's is."""
        text = None
        if name is None:
            text, name = self._settings.default_prompt, self._settings.default_prompt_name
        if name is not None and name not in self.model.prompts:
            # in TEI's words, of which clients read the names
            known = ", ".join(f'"{name}"' for name in self.model.prompts)
            raise UsageError(f"prompt '{name}' is unknown", f"Available prompts: [{known}]")
        return self.model.prompt_text(name, text)

    def steps(
        self, prompt_name: str | None = None, *, prompted: bool = True, **options: Any
    ) -> Steps:
        """The steps of a request with these options; equal ones have the same.

        `options` are those of the model's `steps`. Refusal for an unknown prompt.
        """
        key = (prompt_name, prompted, *options.items())
        steps = self._steps.get(key)
        if steps is None:
            try:
                before = self.prompt(prompt_name) if prompted else ""
                steps = self._made(before, options)
            except BertileError as error:
                raise errors.of_preparing(error) from error
            if len(self._steps) >= KEPT_STEPS:
                self._steps.clear()
            self._steps[key] = steps
        return steps

    async def close(self) -> None:
        """Answer what is in the house, then give the model back."""
        await self.scheduler.close()
        self.model.close()

    def _made(self, prompt: str, options: dict[str, Any]) -> Steps:
        if isinstance(self.model, (Embedder, Classifier, Featurizer)):
            return self.model.steps(None, prompt, **options)
        return Steps(self.model.preparer(None, prompt, **options), _outputs)


def _outputs(answer: Any) -> Any:
    return answer.outputs


def kind_of(model: TextModel) -> str:
    """What a model answers."""
    if isinstance(model, Embedder):
        return {"sparse": SPARSE, "tokens": TOKENS}.get(model.settings.kind, DENSE)
    if isinstance(model, Classifier):
        return RERANKER if model.model.manifest["outputs"][0]["axes"][-1] == 1 else CLASSIFIER
    return TOKENS if isinstance(model, Featurizer) else OTHER


def mark_of(directory: Path) -> str:
    """What changes when a bundle is compiled anew: a hash of its manifest, with all hashes in it.

    Of a directory without, "".
    """
    try:
        return hashlib.sha256((directory / "manifest.json").read_bytes()).hexdigest()
    except OSError:
        return ""


class Catalogue:
    """The models by name, in the order in which they came; changed in the event loop alone."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._models: dict[str, Served] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()

    def __iter__(self) -> Any:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    @property
    def directories(self) -> dict[str, str]:
        """Where each model lies."""
        return {name: str(served.directory) for name, served in self._models.items()}

    def find(self, name: str) -> Served:
        """The model of this name, or that was compiled of a source of this name; else Refusal."""
        served = self._models.get(name)
        if served is None:
            served = next((model for model in self if model.source == name), None)
        if served is None:
            known = ", ".join(f"'{known}'" for known in self._models)
            raise Refusal(
                errors.UNKNOWN_MODEL,
                f"The model '{name}' does not exist; there are {known or 'none'}",
                param="model",
            )
        return served

    def first(self, kinds: Iterable[str] = (), otherwise: str = "") -> Served:
        """The first model of one of these kinds, or of any; a Refusal says what is `otherwise`."""
        for served in self:
            if not kinds or served.kind in kinds:
                return served
        if not self._models:
            raise Refusal(errors.UNHEALTHY, "no model is loaded")
        raise Refusal(errors.WRONG_MODEL, f"Backend error: {otherwise}")

    def choose(self, name: str | None, kinds: Iterable[str] = (), otherwise: str = "") -> Served:
        """The model that is named, which must be of these kinds, or the first that is."""
        if not name:
            return self.first(kinds, otherwise)
        served = self.find(name)
        if kinds and served.kind not in kinds:
            raise Refusal(errors.WRONG_MODEL, f"Backend error: {otherwise}", param="model")
        return served

    async def put(self, name: str, directory: str | Path) -> Served | None:
        """Serve the bundle in `directory`; gives the model that had this name until now.

        That answers what it was asked, and is then closed. BertileError for what cannot be loaded:
        nothing changes then.
        """
        check_name(name)
        async with self._changing:
            return await self._put(name, Path(directory))

    async def become(self, directories: Mapping[str, str | Path]) -> dict[str, str]:
        """Serve these and no others; gives what was done with each that is not as it was.

        A bundle of the same files stays. One that cannot be loaded leaves the old in its place.
        """
        done: dict[str, str] = {}
        async with self._changing:
            for name, directory in directories.items():
                old = self._models.get(name)
                same = old is not None and old.mark == mark_of(Path(directory))
                if same and old.directory == Path(directory):
                    continue
                try:
                    await self._put(name, Path(directory))
                    done[name] = "loaded" if old is None else "exchanged"
                except BertileError as error:
                    done[name] = f"not loaded: {error}"
            for name in [name for name in self._models if name not in directories]:
                self._let_go(self._models.pop(name))
                done[name] = "removed"
        return done

    async def close(self) -> None:
        """Answer what is in the house, and give all models back."""
        for name in list(self._models):
            self._let_go(self._models.pop(name))
        await asyncio.gather(*self._closing)

    async def _put(self, name: str, directory: Path) -> Served | None:
        served = await asyncio.to_thread(self._opened, name, directory)
        served.scheduler.start()
        old, self._models[name] = self._models.get(name), served
        if old is not None:
            self._let_go(old)
        return old

    def _opened(self, name: str, directory: Path) -> Served:
        settings = self._settings
        model = text.open(directory, settings.threads, streams=settings.workers)
        try:
            return Served(name, directory, model, settings, self._metrics.of(name))
        except BertileError:
            model.close()
            raise

    def _let_go(self, served: Served) -> None:
        task = asyncio.get_running_loop().create_task(served.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
