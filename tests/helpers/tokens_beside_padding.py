"""Compiles an ONNX file of a small encoder and compares it with ONNX Runtime beside any padding."""

import numpy as np
from helpers import spelled_encoder as spelled

import bertile
from bertile.config import Config
from bertile.onnx.samples import session

SHAPES = ((1, 1), (3, 37), (2, 16))


def padded(shape, seed, side):
    """Inputs of that shape whose tokens are real on one side, or with holes between them."""
    random = np.random.default_rng(seed)
    batch, length = shape
    mask = (np.arange(length) < random.integers(1, length + 1, (batch, 1))).astype(np.int64)
    if side == "left":
        mask = np.ascontiguousarray(mask[:, ::-1])
    if side == "holes":
        mask = random.integers(0, 2, shape)
        mask[:, 0] = 1
    return {
        "input_ids": random.integers(1, spelled.WORDS, shape),
        "attention_mask": mask,
        "token_type_ids": random.integers(0, 2, shape),
    }


def assert_equal(model, path, shapes=SHAPES, tolerance=2e-5):
    """The compiled model's real tokens, or rows, are those of ONNX Runtime."""
    runner = session(path)
    names = [output.name for output in runner.get_outputs()]
    types = {argument.name: argument.type for argument in runner.get_inputs()}
    for side in ("right", "left", "holes"):
        for seed, shape in enumerate(shapes):
            feed = padded(shape, seed, side)
            dtypes = {name: types[name][len("tensor(") : -1] for name in types}
            want = runner.run(names, {name: feed[name].astype(dtypes[name]) for name in types})
            got = model(**{name: feed[name] for name in model.inputs})
            for name, expected in zip(names, want):
                actual, expected = got[name], expected.astype(np.float64)
                assert actual.dtype == np.float32 and actual.shape == expected.shape, name
                if expected.shape[:2] == shape:
                    real = feed["attention_mask"] == 1
                    actual, expected = actual[real], expected[real]
                room = tolerance * max(1.0, np.abs(expected).max())
                np.testing.assert_allclose(actual, expected, rtol=0, atol=room, err_msg=name)


def compiled(path, tmp_path, cache_dir, **options):
    settings = Config(threads=2, cache_dir=str(cache_dir), **options)
    bertile.compile(str(path), tmp_path / "bundle", settings)
    return bertile.load(tmp_path / "bundle")
