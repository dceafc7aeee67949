// One row of an activation in the registers of WARPS warps, eight neighbouring channels at a time.
// Before it: C, PITCH, WARPS, ROWS (rows of a thread block), KIND (0: none, 1: a range for each row,
// 2: one for all), SMOOTH, EPSILON, RMS (the mean is not taken off).

constexpr int LANES = 32 * WARPS;
constexpr int CHUNKS = (PITCH / 8 + LANES - 1) / LANES;
constexpr int OTHERS = (PITCH / 2 + 15) / 32 * 32 + 16;  // see ``ask_for``
constexpr int HALVES = OTHERS + PITCH / 2;
constexpr float LEVELS = 255.0f;

struct alignas(16) Sixteen {
  unsigned word[4];
};
struct alignas(8) Eight {
  unsigned word[2];
};
struct alignas(16) Four {
  float value[4];
};

template <typename T>
__device__ inline void load_chunk(const T* from, float (&x)[8]) {
  const Sixteen s = *reinterpret_cast<const Sixteen*>(from);
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack2<T>(s.word[i], x[2 * i], x[2 * i + 1]);
}
template <>
__device__ inline void load_chunk<float>(const float* from, float (&x)[8]) {
  const Four low = reinterpret_cast<const Four*>(from)[0];
  const Four high = reinterpret_cast<const Four*>(from)[1];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[i] = low.value[i];
    x[i + 4] = high.value[i];
  }
}

template <typename T>
__device__ inline void store_chunk(T* to, const float (&x)[8]) {
  Sixteen s;
#pragma unroll
  for (int i = 0; i < 4; ++i) s.word[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<Sixteen*>(to) = s;
}
template <>
__device__ inline void store_chunk<float>(float* to, const float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Four four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.value[i] = x[4 * half + i];
    reinterpret_cast<Four*>(to)[half] = four;
  }
}
// Levels, rounded to nearest.
template <>
__device__ inline void store_chunk<u8>(u8* to, const float (&x)[8]) {
  Eight bytes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) word |= static_cast<unsigned>(to_u8(x[4 * half + i])) << (8 * i);
    bytes.word[half] = word;
  }
  *reinterpret_cast<Eight*>(to) = bytes;
}

// The thread block starts to copy a vector of PITCH floats to shared memory: the first halves of all
// chunks, and from OTHERS on the second ones. So lanes that read a half of a chunk each lie 16 bytes
// apart, and as OTHERS is 16 banks away, those that write both halves meet no other either.
__device__ inline void ask_for(const float* from, float* to) {
#pragma unroll
  for (int start = 0; start < PITCH; start += LANES * ROWS * 4) {
    const int i = start + threadIdx.x * 4;
    if (i < PITCH) copy_async_16(to + i / 8 * 4 + i % 8 / 4 * OTHERS, from + i, true);
  }
}

__device__ inline void load_halves(const float* from, int channel, float (&x)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Four four = *reinterpret_cast<const Four*>(from + channel / 2 + half * OTHERS);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * half + i] = four.value[i];
  }
}

struct Sum {
  static __device__ float of(float a, float b) { return a + b; }
};
struct Least {
  static __device__ float of(float a, float b) { return fminf(a, b); }
};
struct Most {
  static __device__ float of(float a, float b) { return fmaxf(a, b); }
};

struct Row {
  int row, lane;      // lane: 0 ... LANES - 1 among those of this row
  bool inside;        // rows behind the last repeat it and store nothing
  float* partial;     // shared: what each warp found, four times

  __device__ Row(int rows, float* shared) {
    const int mine = blockIdx.x * ROWS + threadIdx.x / LANES;
    inside = mine < rows;
    row = inside ? mine : rows - 1;
    lane = threadIdx.x % LANES;
    partial = shared + threadIdx.x / LANES * WARPS;
  }

  __device__ bool has(int chunk) const { return (chunk * LANES + lane) * 8 < PITCH; }
  __device__ int channel(int chunk) const { return (chunk * LANES + lane) * 8; }
  __device__ bool real(int chunk, int i) const { return C == PITCH || channel(chunk) + i < C; }

  template <typename T>
  __device__ void load(const T* from, float (&x)[CHUNKS][8]) const {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (has(chunk)) {
        load_chunk<T>(from + channel(chunk), x[chunk]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) x[chunk][i] = 0.0f;
      }
    }
  }

  template <typename T>
  __device__ void store(T* to, const float (&x)[CHUNKS][8]) const {
    if (!inside) return;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
      if (has(chunk)) store_chunk<T>(to + channel(chunk), x[chunk]);
  }

  __device__ static void add(float (&x)[CHUNKS][8], const float (&other)[CHUNKS][8]) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
      for (int i = 0; i < 8; ++i) x[chunk][i] += other[chunk][i];
  }

  // Combines a value over the row's lanes. Each call in a kernel has its own ``place`` of four.
  template <typename F>
  __device__ float over_row(float value, int place) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = F::of(value, shuffle_xor(value, mask));
    if (WARPS == 1) return value;
    float* found = partial + place * ROWS * WARPS;
    if (lane % 32 == 0) found[lane / 32] = value;
    block_sync();
    value = found[0];
#pragma unroll
    for (int warp = 1; warp < WARPS; ++warp) value = F::of(value, found[warp]);
    return value;
  }

  // LayerNorm (RMSNorm) in place; mean and variance one after the other, both from the registers.
  // gamma and beta (shared, see ``ask_for``) are waited for behind the sums.
  __device__ void normalize(float (&x)[CHUNKS][8], const float* gammas, const float* betas) const {
    float mean = 0.0f;
    if (!RMS) {
      float sum = 0.0f;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[chunk][i];
      mean = over_row<Sum>(sum, 0) * (1.0f / C);
    }
    float squares = 0.0f;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float away = x[chunk][i] - mean;
        if (has(chunk) && real(chunk, i)) squares += away * away;
      }
    const float scale = reciprocal_sqrt(over_row<Sum>(squares, 1) * (1.0f / C) + EPSILON);
    copy_wait<0>();
    block_sync();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      if (!has(chunk)) continue;
      float gamma[8], beta[8];
      load_halves(gammas, channel(chunk), gamma);
      load_halves(betas, channel(chunk), beta);
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[chunk][i] = (x[chunk][i] - mean) * scale * gamma[i] + beta[i];
    }
  }

  // The row as bytes: (scale, low) of its own range, or low and steps per unit that are given.
  __device__ void narrow(float (&x)[CHUNKS][8], const float* smooth, const float* limits, u8* q,
                         float* range) const {
    if (SMOOTH) {
      float factor[CHUNKS][8];
      load<float>(smooth, factor);
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int i = 0; i < 8; ++i) x[chunk][i] *= factor[chunk][i];
    }
    float low, steps;
    if (KIND == 2) {
      low = limits[0];
      steps = limits[1];
    } else {
      float least = 3e38f, most = -3e38f;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (has(chunk) && real(chunk, i)) {
            least = fminf(least, x[chunk][i]);
            most = fmaxf(most, x[chunk][i]);
          }
      low = over_row<Least>(least, 2);
      const float spread = fmaxf(over_row<Most>(most, 3) - low, 1e-30f);
      steps = LEVELS / spread;
      if (inside && lane == 0) {
        range[2 * row] = spread * (1.0f / LEVELS);
        range[2 * row + 1] = low;
      }
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        x[chunk][i] = real(chunk, i) ? (x[chunk][i] - low) * steps : 0.0f;
    store<u8>(q + static_cast<long long>(row) * PITCH, x);
  }
};
