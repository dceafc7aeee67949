"""Compares a bundle with ONNX Runtime; `bertile.verify(…)` is `verifier.verify`.

May import: `quantize` and what stands before it.
"""

from __future__ import annotations

from bertile.base.callable_package import callable_package

callable_package(__name__, "verifier", "verify")
