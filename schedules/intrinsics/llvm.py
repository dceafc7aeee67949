"""Instructions that every machine of LLVM has, as lines of LLVM IR that a kernel links and inlines.

bertile_prefetch(a)      bring the cache line of an address closer; any address will do
"""

from __future__ import annotations

PREFETCH = """
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
define linkonce_odr i32 @bertile_prefetch(ptr %a) alwaysinline {
  call void @llvm.prefetch.p0(ptr %a, i32 0, i32 2, i32 1)
  ret i32 0
}
"""
