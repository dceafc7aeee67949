"""Instructions that every machine of LLVM has, as lines of LLVM IR that a kernel links and inlines.

bertile_prefetch1(a)     bring the cache line of an address, any one, to the first-level cache
bertile_prefetch2(a)     to the second-level cache
bertile_half(a)          16 numbers of float16 as float32
"""

from __future__ import annotations

PREFETCH = "\ndeclare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n" + "".join(
    f"""
define linkonce_odr i32 @bertile_prefetch{level}(ptr %a) alwaysinline {{
  call void @llvm.prefetch.p0(ptr %a, i32 0, i32 {4 - level}, i32 1)
  ret i32 0
}}
"""
    for level in (1, 2)
)

HALF = """
define linkonce_odr <16 x float> @bertile_half(<16 x i16> %a) alwaysinline {
  %x = bitcast <16 x i16> %a to <16 x half>
  %r = fpext <16 x half> %x to <16 x float>
  ret <16 x float> %r
}
"""
