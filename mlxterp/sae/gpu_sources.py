"""The bodies of the GPU kernels, in the common part of CUDA and Metal.

Capital names are macros of the dialect, constants of the call (`D`, `VEC`, ...), or the positions
`THREAD` in the block and `BLOCK` and `SLAB` in the grid. `VEC` entries are loaded at once.
"""

HEADERS = {
    "cuda": r"""
#define GLOBAL
#define LOCAL
#define SHARED __shared__
#define SHARED_POINTER
#define INLINE __device__ __forceinline__
#define BARRIER __syncthreads()
#define ATOMIC uint
#define ATOMIC_ADD(x, n) atomicAdd(&(x), n)
#define ATOMIC_LOAD(x) (x)
#define ATOMIC_STORE(x, n) (x) = n
#define BITS(x) __float_as_uint(x)
#define SHUFFLE(x, lane) __shfl_sync(0xffffffffu, x, lane)
#define uint unsigned int
#define ulong unsigned long long

INLINE float warp_sum(float x) {
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
INLINE uint warp_sum_before(uint x) {
  uint sum = x;
  for (uint step = 1; step < 32; step <<= 1) {
    uint other = __shfl_up_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 >= step) sum += other;
  }
  return sum - x;
}
INLINE uint block_count(bool x, uint thread, uint threads, uint* scratch) {
  return __syncthreads_count(x);
}
""",
    "metal": r"""
#define GLOBAL device
#define LOCAL thread
#define SHARED threadgroup
#define SHARED_POINTER threadgroup
#define INLINE inline
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define ATOMIC atomic_uint
#define ATOMIC_ADD(x, n) atomic_fetch_add_explicit(&(x), n, memory_order_relaxed)
#define ATOMIC_LOAD(x) atomic_load_explicit(&(x), memory_order_relaxed)
#define ATOMIC_STORE(x, n) atomic_store_explicit(&(x), n, memory_order_relaxed)
#define BITS(x) as_type<uint>(x)
#define SHUFFLE(x, lane) simd_shuffle(x, lane)

INLINE float warp_sum(float x) { return simd_sum(x); }
INLINE uint warp_sum_before(uint x) { return simd_prefix_exclusive_sum(x); }
INLINE uint block_count(bool x, uint thread, uint threads, threadgroup uint* scratch) {
  uint warp = simd_sum(uint(x)), total = 0;
  BARRIER;
  if (thread % 32 == 0) scratch[thread / 32] = warp;
  BARRIER;
  for (uint w = 0; w < threads / 32; ++w) total += scratch[w];
  return total;
}
""",
}

SHARED_HEADER = r"""
template <int N, typename T>
INLINE void load(const GLOBAL T* from, LOCAL float* to) {
  struct alignas(N * sizeof(T)) Pack { T items[N]; };
  Pack pack = *(const GLOBAL Pack*)from;
  for (int i = 0; i < N; ++i) to[i] = float(pack.items[i]);
}
template <int N>
INLINE void store(GLOBAL float* to, const LOCAL float* from) {
  struct alignas(N * sizeof(float)) Pack { float items[N]; };
  Pack pack;
  for (int i = 0; i < N; ++i) pack.items[i] = from[i];
  *(GLOBAL Pack*)to = pack;
}
// Larger numbers have larger keys; the two zeros have one.
INLINE uint sort_key(float x) {
  uint bits = BITS(x) == 0x80000000u ? 0u : BITS(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
INLINE float block_sum(float x, uint thread, uint threads, SHARED_POINTER float* scratch) {
  float total = 0, warp = warp_sum(x);
  BARRIER;
  if (thread % 32 == 0) scratch[thread / 32] = warp;
  BARRIER;
  for (uint w = 0; w < threads / 32; ++w) total += scratch[w];
  return total;
}
INLINE uint block_sum_before(
    uint x, uint thread, uint threads, SHARED_POINTER uint* scratch, LOCAL uint& total) {
  uint before = warp_sum_before(x), base = 0;
  BARRIER;
  if (thread % 32 == 31) scratch[thread / 32] = before + x;
  BARRIER;
  total = 0;
  for (uint w = 0; w < threads / 32; ++w) {
    if (w < thread / 32) base += scratch[w];
    total += scratch[w];
  }
  return base + before;
}
// One step of Adam on `p`, `m` and `v` of one entry with gradient `g`.
INLINE void adam_step(
    LOCAL float& p, LOCAL float& m, LOCAL float& v, float g, float rate, float root) {
  m += 0.1f * (g - m);
  v += 0.001f * (g * g - v);
  p -= rate * m / (sqrt(v) * root + 1e-8f);
}
"""

PRELUDES = {
    "cuda": "const uint THREAD = threadIdx.x, BLOCK = blockIdx.x, SLAB = blockIdx.y;",
    "metal": """const uint THREAD = thread_position_in_threadgroup.x;
const uint BLOCK = threadgroup_position_in_grid.x, SLAB = threadgroup_position_in_grid.y;""",
}

# One block per row. The k-th largest of the threads' own maxima bounds the k-th largest entry from
# below, and few entries reach it. Where too many do, a radix selection over the row takes over.
TOP_K = r"""
SHARED ATOMIC histogram[2048];
SHARED ATOMIC n_candidates;
SHARED ulong candidates[THREADS];
SHARED uint selected[THREADS], scratch[32], found[2];
const GLOBAL T* row = pre + (ulong)BLOCK * F;
GLOBAL uint* chosen = indices + (ulong)BLOCK * K;

if (2 * K <= THREADS) {
  uint best = 0, bound = 0;
#pragma unroll 4
  for (uint i = THREAD * VEC; i < F; i += THREADS * VEC) {
    float x[VEC];
    load<VEC>(row + i, x);
    for (int j = 0; j < VEC; ++j) best = max(best, sort_key(x[j]));
  }
  for (int bit = 31; bit >= 12; --bit) {
    uint trial = bound | 1u << bit;
    if (block_count(best >= trial, THREAD, THREADS, scratch) >= K) bound = trial;
  }
  if (THREAD == 0) ATOMIC_STORE(n_candidates, 0u);
  BARRIER;
#pragma unroll 2
  for (uint i = THREAD * VEC; i < F; i += THREADS * VEC) {
    float x[VEC];
    load<VEC>(row + i, x);
    for (int j = 0; j < VEC; ++j) {
      if (sort_key(x[j]) < bound) continue;
      uint slot = ATOMIC_ADD(n_candidates, 1u);
      if (slot < THREADS) candidates[slot] = (ulong)sort_key(x[j]) << 32 | ~(i + j);
    }
  }
  BARRIER;
  const uint n = ATOMIC_LOAD(n_candidates);
  if (n <= THREADS) {
    uint rank = 0, position = 0;
    if (THREAD < n) {
      const ulong own = candidates[THREAD];
      for (uint j = 0; j < n; ++j) rank += candidates[j] > own;
      if (rank < K) selected[rank] = ~(uint)own;
    }
    BARRIER;
    if (THREAD < K) {
      const uint own = selected[THREAD];
      for (uint j = 0; j < K; ++j) position += selected[j] < own;
      chosen[position] = own;
    }
    return;
  }
}

uint prefix = 0, decided = 0, need = K, total;
for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift - 10) {
  const uint bins = shift ? 2048 : 1024, own = 2048 / THREADS;
  BARRIER;
  for (uint i = THREAD; i < 2048; i += THREADS) ATOMIC_STORE(histogram[i], 0u);
  BARRIER;
#pragma unroll 2
  for (uint i = THREAD; i < F; i += THREADS) {
    uint key = sort_key(float(row[i]));
    // Complemented, so that the bins count from the largest keys on.
    if ((key & decided) == prefix) ATOMIC_ADD(histogram[~key >> shift & (bins - 1)], 1u);
  }
  BARRIER;
  uint sum = 0;
  for (uint i = 0; i < own; ++i) sum += ATOMIC_LOAD(histogram[THREAD * own + i]);
  uint before = block_sum_before(sum, THREAD, THREADS, scratch, total);
  for (uint i = 0; i < own; ++i) {
    uint count = ATOMIC_LOAD(histogram[THREAD * own + i]);
    if (before < need && before + count >= need) {
      found[0] = bins - 1 - (THREAD * own + i);
      found[1] = before;
    }
    before += count;
  }
  BARRIER;
  prefix |= found[0] << shift;
  decided |= (bins - 1) << shift;
  need -= found[1];
}
// `prefix` is the k-th largest key: all keys above it are taken, and the first `need` equal ones.
uint above = 0, equal = 0;
for (uint start = 0; start < F; start += THREADS) {
  uint i = start + THREAD, key = i < F ? sort_key(float(row[i])) : 0;
  bool is_above = i < F && key > prefix, is_equal = i < F && key == prefix;
  uint before = block_sum_before(
      (uint)is_above | (uint)is_equal << 16, THREAD, THREADS, scratch, total);
  uint equal_before = equal + (before >> 16);
  if (is_above || (is_equal && equal_before < need))
    chosen[above + (before & 0xffffu) + min(equal_before, need)] = i;
  above += total & 0xffffu;
  equal += total >> 16;
}
"""

# One block per segment of pairs and slab of columns. Segments are cut at multiples of PIECE: the
# first piece is summed here, the others were summed before by PARTIAL_SUMS.
SUM_PAIRS = r"""
float sum[VEC] = {};
for (uint p = low; p < high; p += UNROLL) {
  float weight[UNROLL], entries[UNROLL][VEC];
  for (int j = 0; j < UNROLL; ++j) {
    uint pair = min(p + j, high - 1);
    if (ORDERED) pair = order[pair];
    weight[j] = p + j < high ? float(values[pair]) : 0.0f;
    load<VEC>(matrix + (ulong)rows[pair] * D + column, entries[j]);
  }
  for (int j = 0; j < UNROLL; ++j)
    for (int i = 0; i < VEC; ++i) sum[i] += weight[j] * entries[j][i];
}
"""

SUMS = (
    r"""
const uint column = (SLAB * THREADS + THREAD) * VEC;
if (column >= D) return;
const uint low = starts[BLOCK], end = starts[BLOCK + 1];
const uint cut = ORDERED ? (low / PIECE + 1) * PIECE : end, high = min(cut, end);
"""
    + SUM_PAIRS
    + r"""
for (uint p = cut; p < end; p += PIECE) {
  float piece[VEC];
  load<VEC>(partial + (ulong)(p / PIECE) * D + column, piece);
  for (int i = 0; i < VEC; ++i) sum[i] += piece[i];
}
store<VEC>(out + (ulong)BLOCK * D + column, sum);
"""
)

PARTIAL_SUMS = (
    r"""
const uint column = (SLAB * THREADS + THREAD) * VEC;
if (column >= D) return;
const uint low = BLOCK * PIECE;
uint segment = 0, beyond = starts_shape[0] - 1;
while (beyond - segment > 1) {
  uint middle = (segment + beyond) / 2;
  if (starts[middle] <= low) segment = middle; else beyond = middle;
}
if (starts[segment] == low) return;
const uint high = min(starts[segment + 1], low + PIECE);
"""
    + SUM_PAIRS
    + r"""
store<VEC>(out + (ulong)BLOCK * D + column, sum);
"""
)

# A warp takes 32 pairs, of which every lane knows one, and a slab of CHUNKS * 32 * VEC columns.
# Most of the pairs share their token's row of the cotangent, which stays in registers.
DOTS = r"""
const uint lane = THREAD % 32, n = rows_shape[0], step = 32 * VEC;
const ulong first = ((ulong)BLOCK * (THREADS / 32) + THREAD / 32) * 32;
if (first >= n) return;
const ulong own = min(first + lane, (ulong)n - 1);
const uint own_row = rows[own], own_feature = features[own];
const uint column = SLAB * CHUNKS * step + lane * VEC;
float g[CHUNKS][VEC] = {}, result = 0;
for (uint start = 0; start < 32; start += UNROLL) {
  float w[UNROLL][CHUNKS][VEC] = {};
  for (int j = 0; j < UNROLL; ++j) {
    const GLOBAL T* entries = matrix + (ulong)SHUFFLE(own_feature, start + j) * D + column;
    for (int c = 0; c < CHUNKS; ++c)
      if (column + c * step < D) load<VEC>(entries + c * step, w[j][c]);
  }
  for (int j = 0; j < UNROLL; ++j) {
    const uint pair = start + j, row = SHUFFLE(own_row, pair);
    if (pair == 0 || row != SHUFFLE(own_row, max(pair, 1u) - 1))
      for (int c = 0; c < CHUNKS; ++c)
        if (column + c * step < D)
          load<VEC>(cotangent + (ulong)row * D + column + c * step, g[c]);
    float sum = 0;
    for (int c = 0; c < CHUNKS; ++c)
      for (int i = 0; i < VEC; ++i) sum += w[j][c][i] * g[c][i];
    sum = warp_sum(sum);
    if (lane == pair) result = sum;
  }
}
if (first + lane < n) out[(ulong)SLAB * n + first + lane] = result;
"""

SQUARES = r"""
const uint lane = THREAD % 32;
const ulong row = (ulong)BLOCK * (THREADS / 32) + THREAD / 32;
if (row >= g_shape[0]) return;
float squares = 0, dot = 0;
#pragma unroll 4
for (uint column = lane * VEC; column < D; column += 32 * VEC) {
  float a[VEC], b[VEC] = {};
  load<VEC>(g + row * D + column, a);
  if (PROJECTED) load<VEC>(unit + row * D + column, b);
  for (int i = 0; i < VEC; ++i) { squares += a[i] * a[i]; dot += a[i] * b[i]; }
}
squares = warp_sum(squares);
dot = warp_sum(dot);
if (lane == 0) out[row] = max(squares - dot * dot, 0.0f);
"""

ADAM = r"""
const ulong at = ((ulong)BLOCK * THREADS + THREAD) * VEC;
if (at >= (ulong)p_shape[0] * p_shape[1]) return;
float a[VEC], b[VEC], c[VEC], h[VEC];
load<VEC>(p + at, a);
load<VEC>(m + at, b);
load<VEC>(v + at, c);
load<VEC>(g + at, h);
if (good[0] != 0)
  for (int i = 0; i < VEC; ++i)
    adam_step(a[i], b[i], c[i], h[i] * factor[0], rate[0], root[0]);
store<VEC>(p_new + at, a);
store<VEC>(m_new + at, b);
store<VEC>(v_new + at, c);
"""

ADAM_UNIT_ROWS = r"""
SHARED float scratch[32];
const ulong row = (ulong)BLOCK * D;
const bool changes = good[0] != 0;
float a[ITEMS][VEC] = {}, h[ITEMS][VEC] = {}, dot = 0, squares = 0;
for (int t = 0; t < ITEMS; ++t) {
  uint column = (t * THREADS + THREAD) * VEC;
  if (column >= D) continue;
  load<VEC>(p + row + column, a[t]);
  load<VEC>(g + row + column, h[t]);
  for (int i = 0; i < VEC; ++i) dot += a[t][i] * h[t][i];
}
dot = block_sum(dot, THREAD, THREADS, scratch);
for (int t = 0; t < ITEMS; ++t) {
  uint column = (t * THREADS + THREAD) * VEC;
  if (column >= D) continue;
  float b[VEC], c[VEC];
  load<VEC>(m + row + column, b);
  load<VEC>(v + row + column, c);
  for (int i = 0; i < VEC; ++i) {
    float gradient = (h[t][i] - dot * a[t][i]) * factor[0];
    if (changes) adam_step(a[t][i], b[i], c[i], gradient, rate[0], root[0]);
    squares += a[t][i] * a[t][i];
  }
  store<VEC>(m_new + row + column, b);
  store<VEC>(v_new + row + column, c);
}
squares = block_sum(squares, THREAD, THREADS, scratch);
const float scale = changes ? 1 / max(sqrt(squares), 1e-12f) : 1;
for (int t = 0; t < ITEMS; ++t) {
  uint column = (t * THREADS + THREAD) * VEC;
  if (column >= D) continue;
  for (int i = 0; i < VEC; ++i) a[t][i] *= scale;
  store<VEC>(p_new + row + column, a[t]);
}
"""
