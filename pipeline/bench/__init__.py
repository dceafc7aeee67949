"""Times bundles beside other engines, in turns; `bertile.bench(…)` is `benchmark.bench`.

May import: `compress` and what stands before it.
"""

from __future__ import annotations

from bertile.base.callable_package import callable_package

callable_package(__name__, "benchmark", "bench")
