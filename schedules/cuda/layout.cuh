// Between row-major float32 tensors and activations. Before it: C, PITCH, VECTOR (channels that a
// thread moves at once: 4, or 1 where C is no multiple of 4), X. Threads of a block go over channels.

struct alignas(4 * VECTOR) Floats {
  float value[VECTOR];
};
struct alignas(sizeof(X) * VECTOR) Stored {
  X value[VECTOR];
};

// A row of PITCH from C floats; zeros where ``from`` is null.
__device__ inline void row_in(const float* from, X* to) {
  for (int c = threadIdx.x * VECTOR; c < PITCH; c += blockDim.x * VECTOR) {
    Floats floats;
    for (int i = 0; i < VECTOR; ++i) floats.value[i] = 0.0f;
    if (from && c < C) floats = *reinterpret_cast<const Floats*>(from + c);
    Stored stored;
    for (int i = 0; i < VECTOR; ++i) stored.value[i] = from_float<X>(floats.value[i]);
    *reinterpret_cast<Stored*>(to + c) = stored;
  }
}

// C floats from a row; zeros where ``from`` is null.
__device__ inline void row_out(const X* from, float* to) {
  for (int c = threadIdx.x * VECTOR; c < C; c += blockDim.x * VECTOR) {
    Stored stored;
    for (int i = 0; i < VECTOR; ++i) stored.value[i] = from_float<X>(0.0f);
    if (from) stored = *reinterpret_cast<const Stored*>(from + c);
    Floats floats;
    for (int i = 0; i < VECTOR; ++i) floats.value[i] = to_float(stored.value[i]);
    *reinterpret_cast<Floats*>(to + c) = floats;
  }
}
