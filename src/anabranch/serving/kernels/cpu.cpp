// Kernels of the fused CPU runner.
//
// Written with the compiler's vector extensions, so that one source serves AVX-512, AVX2 and NEON;
// intrinsics stand only where compilers miss the right instruction. Weights are stored in tiles of 32 output
// channels and multiplied in single precision (bfloat16) or exactly in integers (int8).
//
// Every row is computed in an order that does not depend on the rows beside it: the same request
// gets the same bits in any batch and for any split of its prompt.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 32;       // output channels of a weight tile
constexpr int64_t GROUP = 64;      // input channels that share an activation scale
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <typename V, typename T>
inline V load(const T* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

inline Floats load16(const float* from) { return load<Floats>(from); }

inline Floats load16(const at::BFloat16* from) {
  // A bfloat16 is the upper half of a float.
#if defined(__AVX512F__)
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

inline void store16(float* to, Floats value) { __builtin_memcpy(to, &value, sizeof(value)); }
inline Floats all(float value) { return value - Floats{}; }  // folds to a broadcast, + would not

// Halves folded onto each other: four steps instead of sixteen.
template <typename F>
inline float fold(Floats v, const F& f) {
  float lanes[LANES];
  store16(lanes, v);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] = f(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return fold(v, [](float a, float b) { return a + b; });
#endif
}

inline float largest(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return fold(v, [](float a, float b) { return std::max(a, b); });
#endif
}

// exp for x <= 0 with a relative error below 2e-7; 0 for -inf. Cephes' polynomial after reducing
// the argument to a power of two and a remainder.
inline Floats exp16(Floats x) {
  Floats clamped = x > -87.0f ? x : all(-87.0f);
  Ints n = __builtin_convertvector(clamped * 1.44269504f - 0.5f, Ints);  // rounds towards zero
  Floats power = __builtin_convertvector(n, Floats);
  Floats r = clamped - power * 0.693359375f + power * 2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  y = y * (Floats)((n + 127) << 23);
  return x > -87.0f ? y : all(0.0f);
}

// Runs body(i) for i in [0, count) on all threads, each taking the next one when it is free: tasks
// of very different length end together.
template <typename Body>
void for_each_task(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) body(i);
  });
}

// ---------------------------------------------------------------------------------------------
// Row-wise operations

// x[N, H] += delta, in place; returns x / rms(x) * weight.
Tensor add_rms_norm(Tensor x, const std::optional<Tensor>& delta, const Tensor& weight, double eps) {
  int64_t rows = x.size(0), width = x.size(1);
  Tensor out = at::empty_like(x);
  float *X = x.data_ptr<float>(), *O = out.data_ptr<float>();
  const float* D = delta ? delta->data_ptr<float>() : nullptr;
  const float* W = weight.data_ptr<float>();
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float *a = X + n * width, *o = O + n * width;
      Floats squares = {};
      for (int64_t i = 0; i < width; i += LANES) {
        Floats v = load16(a + i);
        if (D) store16(a + i, v += load16(D + n * width + i));
        squares += v * v;
      }
      Floats scale = all(1.0f / std::sqrt(sum(squares) / width + (float)eps));
      for (int64_t i = 0; i < width; i += LANES)
        store16(o + i, load16(a + i) * scale * load16(W + i));
    }
  });
  return out;
}

// silu(gate) * up of x[N, 2 I] = [gate, up].
Tensor silu_mul(const Tensor& x) {
  int64_t rows = x.size(0), width = x.size(1) / 2;
  Tensor out = at::empty({rows, width}, x.options());
  const float* X = x.data_ptr<float>();
  float* O = out.data_ptr<float>();
  at::parallel_for(0, rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      const float *gate = X + n * 2 * width, *up = gate + width;
      for (int64_t i = 0; i < width; i += LANES) {
        Floats g = load16(gate + i);
        // exp16 takes arguments <= 0: sigmoid(g) is e/(1+e) or 1/(1+e) for e = exp(-|g|).
        Floats e = exp16(g > 0.0f ? -g : g);
        Floats sigmoid = (g > 0.0f ? all(1.0f) : e) / (1.0f + e);
        store16(O + n * width + i, g * sigmoid * load16(up + i));
      }
    }
  });
  return out;
}

// ---------------------------------------------------------------------------------------------
// Products of a few rows with a matrix in its natural order: attention and adapters

// Asks for `count` elements that will soon be read.
template <typename T>
inline void fetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// y[r][P] = x[r][D] . m[D][P] for R rows. Even and odd D are summed apart: two short chains of
// additions instead of a long one. P is a multiple of V LANES, D is even.
template <int R, int V, typename Matrix>
inline void project(const float* x, int64_t x_stride, const Matrix* m, int64_t D, int64_t P, float* y,
                    int64_t y_stride) {
  for (int64_t j = 0; j < P; j += V * LANES) {
    Floats even[R][V] = {}, odd[R][V] = {};
    for (int64_t d = 0; d < D; d += 2)
      for (int v = 0; v < V; v++) {
        const Matrix* at = m + d * P + j + v * LANES;
        Floats m0 = load16(at), m1 = load16(at + P);
        for (int r = 0; r < R; r++) {
          even[r][v] += m0 * x[r * x_stride + d];
          odd[r][v] += m1 * x[r * x_stride + d + 1];
        }
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++)
        store16(y + r * y_stride + j + v * LANES, even[r][v] + odd[r][v]);
  }
}

// y[r][D] += x[r][count] . m[count][D] for R rows, in the order of the rows of m.
template <int R, int V, typename Matrix>
inline void combine(const float* x, int64_t x_stride, const Matrix* m, int64_t count, int64_t D,
                    float* y, int64_t y_stride) {
  for (int64_t d = 0; d < D; d += V * LANES) {
    Floats acc[R][V];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) acc[r][v] = load16(y + r * y_stride + d + v * LANES);
    for (int64_t k = 0; k < count; k++)
      for (int v = 0; v < V; v++) {
        Floats value = load16(m + k * D + d + v * LANES);
        for (int r = 0; r < R; r++) acc[r][v] += value * x[r * x_stride + k];
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) store16(y + r * y_stride + d + v * LANES, acc[r][v]);
  }
}

// Calls f.template operator()<R>(first) for blocks of at most Most rows.
template <int Most, int R = Most, typename F>
inline void for_rows(int64_t rows, const F& f, int64_t first = 0) {
  for (; rows - first >= R; first += R) f.template operator()<R>(first);
  if constexpr (R > 1)
    if (first < rows) for_rows<Most, R - 1>(rows, f, first);
}

// ---------------------------------------------------------------------------------------------
// Linear layers. Weights are packed in tiles of 32 output channels that are read from start to end.
//
// A tile is multiplied with a block of rows at a time, as many as have their sums in registers; few
// rows take several tiles at once instead, or each sum would wait for the one before.

// The share of one row block in fetching a stretch of the tiles that come next, so that memory
// works all the time and not only while the first block passes.
struct Ahead {
  int64_t bytes, block, blocks;

  // Fetches the share of `size` bytes from `now` on, in the tiles that come next.
  inline void fetch(const void* now, int64_t size) const {
    const char* next = (const char*)now + bytes;
    for (int64_t i = size * block / blocks & -64; i < size * (block + 1) / blocks; i += 64)
      __builtin_prefetch(next + i, 0, 2);
  }
};

// Calls f.template operator()<R, T>(row, tile, ahead): R rows and T tiles, for all rows and the
// tiles in [begin, end). R <= Rows; R T <= Sums.
template <int Rows, int Sums, int R = Rows, typename F>
inline void for_row_block(int64_t rows, int64_t row, int64_t begin, int64_t end, const Ahead& ahead,
                          const F& f) {
  if constexpr (R > 1)
    if (rows < R) return for_row_block<Rows, Sums, R - 1>(rows, row, begin, end, ahead, f);
  constexpr int T = std::min(4, std::max(1, Sums / R));
  int64_t tile = begin;
  for (; tile + T <= end; tile += T) f.template operator()<R, T>(row, tile, ahead);
  for (; tile < end; tile++) f.template operator()<R, 1>(row, tile, ahead);
}

// Cuts N rows into blocks of nearly equal size, and tiles of so many bytes into ranges for threads.
template <int Rows, int Sums, typename F>
void for_blocks(int64_t N, int64_t tiles, int64_t tile_bytes, const F& f) {
  int64_t blocks = (N + Rows - 1) / Rows;
  at::parallel_for(0, (tiles + 3) / 4, 1, [&](int64_t begin, int64_t end) {
    // Four tiles stay in the cache while all rows pass.
    for (int64_t four = begin; four < end; four++)
      for (int64_t i = 0; i < blocks; i++) {
        int64_t row = N * i / blocks, rows = N * (i + 1) / blocks - row;
        for_row_block<Rows, Sums>(rows, row, 4 * four, std::min(tiles, 4 * four + 4),
                                  Ahead{4 * tile_bytes, i, blocks}, f);
      }
  });
}

// x[N, K] float -> y[N, O] float; packed[O / 32, K, 16, 2] bfloat16: the channels c and c + 16 of a
// tile are the lower and upper half of a word, so that two instructions unpack both.
Tensor linear_bfloat16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  int64_t N = x.size(0), K = x.size(1), tiles = packed.size(0), O = tiles * TILE;
  Tensor y = at::empty({N, O}, x.options());
  const float* X = x.data_ptr<float>();
  const uint16_t* W = (const uint16_t*)packed.data_ptr<at::BFloat16>();
  const float* B = bias ? bias->data_ptr<float>() : nullptr;
  float* Y = y.data_ptr<float>();
  for_blocks<12, 12>(N, tiles, K * TILE * 2, [&]<int R, int T>(int64_t row, int64_t tile,
                                                               const Ahead& ahead) {
    const float* from = X + row * K;
    const uint16_t* w = W + tile * K * TILE;
    Floats acc[R][T][2] = {};
    for (int64_t start = 0; start < K; start += LANES) {
      for (int t = 0; t < T; t++) ahead.fetch(w + (t * K + start) * TILE, LANES * TILE * 2);
      for (int64_t k = start; k < start + LANES; k++)
        for (int t = 0; t < T; t++) {
          Words both = load<Words>(w + (t * K + k) * TILE);
          Floats low = (Floats)(both << 16), high = (Floats)(both & 0xffff0000u);
          for (int r = 0; r < R; r++) {
            Floats a = all(from[r * K + k]);
            acc[r][t][0] += a * low;
            acc[r][t][1] += a * high;
          }
        }
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++)
        for (int j = 0; j < 2; j++) {
          int64_t channel = (tile + t) * TILE + j * LANES;
          store16(Y + (row + r) * O + channel, B ? acc[r][t][j] + load16(B + channel) : acc[r][t][j]);
        }
  });
  return y;
}

// One row of activations as int8: symmetric, one scale for each group of 64 channels. Returns the sum
// of all integers times their scales: weights are stored unsigned, 128 too high.
float quantise_row(const float* x, int64_t K, int8_t* q, float* scale) {
  float total = 0;
  for (int64_t g = 0; g < K / GROUP; g++) {
    const float* a = x + g * GROUP;
    Floats most = {};
    for (int64_t i = 0; i < GROUP; i += LANES) {
      Floats v = load16(a + i), magnitude = v > 0.0f ? v : -v;
      most = most > magnitude ? most : magnitude;
    }
    float peak = std::max(largest(most), 1e-30f), inverse = 127.0f / peak;
    Floats sums = {};
    for (int64_t i = 0; i < GROUP; i += LANES) {
      Floats rounded = load16(a + i) * inverse + 12582912.0f;  // 1.5 * 2^23: no place for fractions
      rounded -= 12582912.0f;
      sums += rounded;
      Bytes bytes = __builtin_convertvector(__builtin_convertvector(rounded, Ints), Bytes);
      __builtin_memcpy(q + g * GROUP + i, &bytes, sizeof(bytes));
    }
    scale[g] = peak / 127.0f;
    total += sum(sums) * scale[g];
  }
  return total;
}

// acc[32] += w[32][4] (unsigned) . x[4] (signed), the inner step of the integer product.
inline void dot4(Ints& acc, const uint8_t* w, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
#if defined(__AVX512VNNI__)
  acc = (Ints)_mm512_dpbusd_epi32((__m512i)acc, _mm512_loadu_si512(w), _mm512_set1_epi32(four));
#else
  for (int o = 0; o < LANES; o++)
    for (int j = 0; j < 4; j++) acc[o] += (int32_t)w[4 * o + j] * (int32_t)x[j];
#endif
}

// x[N, K] float -> y[N, O] float; packed[O / 32, K / 4, 32, 4] uint8; scale[O]; K a multiple of 64.
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                   const std::optional<Tensor>& bias) {
  int64_t N = x.size(0), K = x.size(1), tiles = packed.size(0), O = tiles * TILE;
  int64_t groups = K / GROUP;
  Tensor y = at::empty({N, O}, x.options());
  Tensor quantised = at::empty({N, K}, x.options().dtype(at::kChar));
  Tensor scales = at::empty({N, groups + 1}, x.options());  // and 128 times the row's sum
  const float* X = x.data_ptr<float>();
  int8_t* Q = quantised.data_ptr<int8_t>();
  float* XS = scales.data_ptr<float>();
  at::parallel_for(0, N, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float* row = XS + n * (groups + 1);
      row[groups] = 128.0f * quantise_row(X + n * K, K, Q + n * K, row);
    }
  });
  const uint8_t* W = packed.data_ptr<uint8_t>();
  const float* S = scale.data_ptr<float>();
  const float* B = bias ? bias->data_ptr<float>() : nullptr;
  float* Y = y.data_ptr<float>();
  for_blocks<6, 12>(N, tiles, K * TILE, [&]<int R, int T>(int64_t row, int64_t tile,
                                                          const Ahead& ahead) {
    const int8_t* from = Q + row * K;
    const float* x_scale = XS + row * (groups + 1);
    const uint8_t* w = W + tile * K * TILE;
    Floats acc[R][T][2] = {};
    for (int64_t g = 0; g < groups; g++) {
      Ints integers[R][T][2] = {};
      for (int t = 0; t < T; t++) ahead.fetch(w + (t * K + g * GROUP) * TILE, GROUP * TILE);
      for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 4)
        for (int t = 0; t < T; t++)
          for (int r = 0; r < R; r++) {
            const uint8_t* at = w + (t * K + k) * TILE;
            dot4(integers[r][t][0], at, from + r * K + k);
            dot4(integers[r][t][1], at + 64, from + r * K + k);
          }
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          for (int j = 0; j < 2; j++)
            acc[r][t][j] += __builtin_convertvector(integers[r][t][j], Floats) *
                            x_scale[r * (groups + 1) + g];
    }
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++)
        for (int j = 0; j < 2; j++) {
          int64_t channel = (tile + t) * TILE + j * LANES;
          Floats value = (acc[r][t][j] - x_scale[r * (groups + 1) + groups]) * load16(S + channel);
          store16(Y + (row + r) * O + channel, B ? value + load16(B + channel) : value);
        }
  });
  return y;
}

// ---------------------------------------------------------------------------------------------
// Adapters

template <typename Matrix>
void lora_rows(const float* x, int64_t K, const Matrix* a, int64_t rank, const Matrix* b,
               int64_t tile, int64_t width, float* y, int64_t y_stride, int64_t rows) {
  static thread_local std::vector<float> scratch;
  scratch.resize(rows * rank);
  float* hidden = scratch.data();
  fetch(b, rank * width);  // arrives while A is read
  for_rows<6>(rows, [&]<int R>(int64_t r) {
    project<R, 1>(x + r * K, K, a, K, rank, hidden + r * rank, rank);
    for (int64_t column = 0; column < width; column += tile) {
      const Matrix* at = b + column * rank;
      float* to = y + r * y_stride + column;
      if (tile == 4 * LANES)
        combine<R, 4>(hidden + r * rank, rank, at, rank, tile, to, y_stride);
      else
        combine<R, 1>(hidden + r * rank, rank, at, rank, tile, to, y_stride);
    }
  });
}

// y[N, O] += x A B for the rows of each block; see kernels.reference.add_lora.
void add_lora(Tensor y, const Tensor& x, const Tensor& blocks, at::TensorList a,
              at::TensorList b, at::IntArrayRef offsets) {
  int64_t parts = offsets.size(), K = x.size(1), O = y.size(1);
  const int64_t* block = blocks.data_ptr<int64_t>();
  const float* X = x.data_ptr<float>();
  float* Y = y.data_ptr<float>();
  for_each_task(blocks.size(0) * parts, [&](int64_t i) {
    const int64_t *at = block + 3 * (i / parts), part = i % parts;
    const Tensor &A = a[at[2] * parts + part], &B = b[at[2] * parts + part];
    int64_t rank = A.size(1), rows = at[1] - at[0], tile = B.size(2), width = B.size(0) * tile;
    if (rank == 0) return;
    const float* from = X + at[0] * K;
    float* to = Y + at[0] * O + offsets[part];
    if (A.scalar_type() == at::kBFloat16)
      lora_rows(from, K, A.data_ptr<at::BFloat16>(), rank, B.data_ptr<at::BFloat16>(), tile, width,
                to, O, rows);
    else
      lora_rows(from, K, A.data_ptr<float>(), rank, B.data_ptr<float>(), tile, width, to, O, rows);
  });
}

// ---------------------------------------------------------------------------------------------
// Attention over pages

// Rotates, and normalises before it if a weight is given, one head's vector in place.
void rotate(float* head, const float* cosine, const float* sine, int64_t D, const float* norm,
            float eps) {
  if (norm) {
    float squares = 0;
    for (int64_t i = 0; i < D; i++) squares += head[i] * head[i];
    float scale = 1.0f / std::sqrt(squares / D + eps);
    for (int64_t i = 0; i < D; i++) head[i] *= scale * norm[i];
  }
  for (int64_t i = 0; i < D / 2; i++) {
    float a = head[i], b = head[i + D / 2];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + D / 2] = b * cosine[i + D / 2] + a * sine[i + D / 2];
  }
}

// Scores of one row and block of keys -> weights, after shrinking what was summed before. Keys
// [start, stop) of the first `width` are visible.
void soften(float* scores, int64_t start, int64_t stop, int64_t width, float* acc, int64_t D,
            float& most, float& total) {
  if (start >= stop) {
    std::fill(scores, scores + width, 0.0f);
    return;
  }
  std::fill(scores, scores + start, NEGATIVE_INFINITY);
  std::fill(scores + stop, scores + width, NEGATIVE_INFINITY);
  int64_t end = (stop + LANES - 1) / LANES * LANES;
  Floats peaks = all(most);
  for (int64_t j = 0; j < end; j += LANES) {
    Floats v = load16(scores + j);
    peaks = peaks > v ? peaks : v;
  }
  float peak = largest(peaks);
  Floats sums = {};
  for (int64_t j = 0; j < end; j += LANES) {
    Floats e = exp16(load16(scores + j) - peak);
    store16(scores + j, e);
    sums += e;
  }
  std::fill(scores + end, scores + width, 0.0f);
  float shrink = std::exp(most - peak);
  total = total * shrink + sum(sums);
  if (shrink != 1.0f)
    for (int64_t d = 0; d < D; d += LANES) store16(acc + d, load16(acc + d) * shrink);
  most = peak;
}

struct Shape {
  int64_t heads, kv_heads, D, P, pages, table_width, window;
  float scale;
  const int64_t* visible;  // for each packed row the nodes of its tree that it sees, or null
};

// Hides the nodes of a drafted tree, the first of which is key `root`, that a row does not see.
void hide(float* scores, int64_t width, int64_t root, int64_t visible) {
  for (int64_t j = std::max<int64_t>(0, root); j < std::min(width, root + 63); j++)
    if (!(visible >> (j - root) & 1)) scores[j] = NEGATIVE_INFINITY;
}

constexpr int64_t QUERIES = 24;  // query rows (positions x heads of a group) of one task
constexpr int64_t KEYS = 256;    // keys that are softened together, from a multiple of 256 on

// Attention of `count` positions of one sequence, starting at packed row `first`, for one key head.
// The nodes of a drafted tree begin at position `root`.
template <typename Cache>
void attend(const Shape& s, const float* qkv, const Cache* keys, const Cache* values,
            const int64_t* table, int64_t first, int64_t position, int64_t count, int64_t root,
            int64_t kv_head, float* out) {
  int64_t repeats = s.heads / s.kv_heads, rows = count * repeats, D = s.D, P = s.P;
  int64_t width = (s.heads + 2 * s.kv_heads) * D, block = std::max<int64_t>(1, KEYS / P);
  int64_t stride = block * P;
  static thread_local std::vector<float> scratch;
  scratch.resize(rows * (2 * D + stride + 2));
  float *q = scratch.data(), *acc = q + rows * D, *scores = acc + rows * D;
  float *most = scores + rows * stride, *total = most + rows;
  std::fill(acc, acc + rows * D, 0.0f);
  std::fill(most, most + rows, NEGATIVE_INFINITY);
  std::fill(total, total + rows, 0.0f);
  for (int64_t r = 0; r < rows; r++) {
    const float* from = qkv + (first + r / repeats) * width + (kv_head * repeats + r % repeats) * D;
    for (int64_t d = 0; d < D; d += LANES) store16(q + r * D + d, load16(from + d) * s.scale);
  }
  // Pages lie anywhere: while one is read, the next is fetched.
  auto keys_of = [&](int64_t page) { return keys + (kv_head * s.pages + table[page]) * P * D; };
  auto values_of = [&](int64_t page) { return values + (kv_head * s.pages + table[page]) * P * D; };
  int64_t pages = (position + count - 1) / P + 1;
  int64_t oldest = s.window > 0 ? std::max<int64_t>(0, std::min(position, root) - s.window + 1) : 0;
  for (int64_t base = oldest / stride * block; base < pages; base += block) {
    int64_t end = std::min(pages, base + block), seen = (end - base) * P;
    for (int64_t page = base; page < end; page++) {
      const Cache* at = keys_of(page);
      fetch(page + 1 < end ? keys_of(page + 1) : values_of(base), P * D);
      for_rows<6>(rows, [&]<int R>(int64_t r) {
        float* to = scores + r * stride + (page - base) * P;
        if (P % (2 * LANES) == 0)
          project<R, 2>(q + r * D, D, at, D, P, to, stride);
        else
          project<R, 1>(q + r * D, D, at, D, P, to, stride);
      });
    }
    for (int64_t r = 0; r < rows; r++) {
      // A row sees keys (newest - window, here].
      int64_t here = position + r / repeats - base * P, newest = here;
      int64_t visible = s.visible ? s.visible[first + r / repeats] : -1;
      if (visible != -1) {  // other branches of the tree may lie between it and its parent
        newest = root - base * P - 1 + __builtin_popcountll(visible);
        hide(scores + r * stride, seen, root - base * P, visible);
      }
      int64_t start = s.window > 0 ? std::max<int64_t>(0, newest - s.window + 1) : 0;
      soften(scores + r * stride, std::min(start, seen), std::min(seen, here + 1), seen,
             acc + r * D, D, most[r], total[r]);
    }
    for (int64_t page = base; page < end; page++) {
      const Cache* at = values_of(page);
      if (page + 1 < pages) fetch(page + 1 < end ? values_of(page + 1) : keys_of(page + 1), P * D);
      int64_t visible = std::min(P, position + count - page * P);
      for_rows<6>(rows, [&]<int R>(int64_t r) {
        const float* weights = scores + r * stride + (page - base) * P;
        if (D % (4 * LANES) == 0)
          combine<R, 4>(weights, stride, at, visible, D, acc + r * D, D);
        else
          combine<R, 2>(weights, stride, at, visible, D, acc + r * D, D);
      });
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = out + (first + r / repeats) * s.heads * D + (kv_head * repeats + r % repeats) * D;
    for (int64_t d = 0; d < D; d += LANES) store16(to + d, load16(acc + r * D + d) / total[r]);
  }
}

// Rotates queries and keys, writes keys and values to their slots, and attends.
//
// qkv[N, (heads + 2 kv_heads) D] is changed in place. cosine, sine[N, D]. Caches: keys
// [kv_heads, pages, D, P] with the tokens of a page side by side, values [kv_heads, pages, P, D].
// slots[N]; query_start[S + 1], context[S], tables[S, width], roots[S] as in PackedBatch.
template <typename Cache>
void attention_of(Tensor& out, Tensor& qkv, const Tensor& cosine, const Tensor& sine, Tensor& keys,
                  Tensor& values, const Tensor& slots, const Tensor& query_start,
                  const Tensor& context, const Tensor& tables, const int64_t* roots, const Shape& s,
                  const float* q_norm, const float* k_norm, float eps) {
  int64_t N = qkv.size(0), D = s.D, P = s.P, width = qkv.size(1);
  float* X = qkv.data_ptr<float>();
  const float *C = cosine.data_ptr<float>(), *Z = sine.data_ptr<float>();
  Cache *K = keys.data_ptr<Cache>(), *V = values.data_ptr<Cache>();
  const int64_t* slot = slots.data_ptr<int64_t>();
  at::parallel_for(0, N, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) {
      float* x = X + n * width;
      for (int64_t h = 0; h < s.heads + s.kv_heads; h++)
        rotate(x + h * D, C + n * D, Z + n * D, D, h < s.heads ? q_norm : k_norm, eps);
      int64_t page = slot[n] / P, offset = slot[n] % P;
      for (int64_t h = 0; h < s.kv_heads; h++) {
        int64_t at = (h * s.pages + page) * P * D;
        const float *k = x + (s.heads + h) * D, *v = k + s.kv_heads * D;
        for (int64_t d = 0; d < D; d++) {
          K[at + d * P + offset] = (Cache)k[d];
          V[at + offset * D + d] = (Cache)v[d];
        }
      }
    }
  });

  struct Task {
    int64_t segment, first, position, count, kv_head;
  };
  const int64_t *starts = query_start.data_ptr<int64_t>(), *seen = context.data_ptr<int64_t>();
  int64_t block = std::max<int64_t>(1, QUERIES / (s.heads / s.kv_heads));
  std::vector<Task> tasks;
  for (int64_t i = 0; i < context.size(0); i++) {
    int64_t length = starts[i + 1] - starts[i], position = seen[i] - length;
    for (int64_t at = 0; at < length; at += block)
      for (int64_t h = 0; h < s.kv_heads; h++)
        tasks.push_back(
            {i, starts[i] + at, position + at, std::min(block, length - at), h});
  }
  const int64_t* table = tables.data_ptr<int64_t>();
  float* O = out.data_ptr<float>();
  for_each_task(tasks.size(), [&](int64_t i) {
    const Task& t = tasks[i];
    attend<Cache>(s, X, K, V, table + t.segment * s.table_width, t.first, t.position, t.count,
                  roots ? roots[t.segment] : seen[t.segment], t.kv_head, O);
  });
}

Tensor attention(Tensor qkv, const Tensor& cosine, const Tensor& sine, Tensor keys, Tensor values,
                 const Tensor& slots, const Tensor& query_start, const Tensor& context,
                 const Tensor& tables, const std::optional<Tensor>& visible,
                 const std::optional<Tensor>& roots, int64_t heads, double scale, int64_t window,
                 const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                 double eps) {
  Shape s{heads,        keys.size(0),   values.size(3), values.size(2),
          keys.size(1), tables.size(1), window,         (float)scale,
          visible ? visible->data_ptr<int64_t>() : nullptr};
  Tensor out = at::empty({qkv.size(0), heads * s.D}, qkv.options());
  const float* q = q_norm ? q_norm->data_ptr<float>() : nullptr;
  const float* k = k_norm ? k_norm->data_ptr<float>() : nullptr;
  auto run = keys.scalar_type() == at::kBFloat16 ? attention_of<at::BFloat16> : attention_of<float>;
  const int64_t* root = roots ? roots->data_ptr<int64_t>() : nullptr;
  run(out, qkv, cosine, sine, keys, values, slots, query_start, context, tables, root, s, q, k,
      (float)eps);
  return out;
}

// ---------------------------------------------------------------------------------------------
// Products with the transpose: the gradient with respect to a linear layer's input

constexpr int64_t COLUMNS = 64;  // input channels of a block: a tile of it fits the nearest cache

// Exchanges the lanes of a and b whose number has bit S set and clear: one square of a transpose.
template <int S>
inline void exchange(Words& a, Words& b) {
  auto pick = [&]<int... L>(std::integer_sequence<int, L...>) {
    Words first = __builtin_shufflevector(a, b, ((L & S) ? LANES + L - S : L)...);
    b = __builtin_shufflevector(a, b, ((L & S) ? LANES + L : L + S)...);
    a = first;
  };
  pick(std::make_integer_sequence<int, LANES>{});
}

// rows[i] lane j becomes rows[j] lane i.
inline void transpose(Words (&rows)[LANES]) {
  auto stage = [&]<int S>() {
    for (int i = 0; i < LANES; i++)
      if (!(i & S)) exchange<S>(rows[i], rows[i + S]);
  };
  stage.template operator()<1>();
  stage.template operator()<2>();
  stage.template operator()<4>();
  stage.template operator()<8>();
}

// x[R, V * 16] += y[R, outputs] w[outputs, COLUMNS]; y is O wide, x is K wide.
template <int R, int V>
inline void add_rows(float* x, int64_t K, const float* y, int64_t O, const float* w,
                     int64_t outputs) {
  Floats acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = load16(x + r * K + v * LANES);
  for (int64_t o = 0; o < outputs; o++) {
    Floats row[V];
    for (int v = 0; v < V; v++) row[v] = load16(w + o * COLUMNS + v * LANES);
    for (int r = 0; r < R; r++) {
      Floats a = all(y[r * O + o]);
      for (int v = 0; v < V; v++) acc[r][v] += a * row[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store16(x + r * K + v * LANES, acc[r][v]);
}

template <int V>
void add_block(float* x, int64_t K, const float* y, int64_t O, const float* w, int64_t outputs,
               int64_t rows) {
  constexpr int R = 6;
  int64_t n = 0;
  for (; n + R <= rows; n += R) add_rows<R, V>(x + n * K, K, y + n * O, O, w, outputs);
  for (; n < rows; n++) add_rows<1, V>(x + n * K, K, y + n * O, O, w, outputs);
}

// y[N, O] float -> x[N, K] float, for a weight [O, K] whose tiles `unpack(tile, k, columns, to)`
// writes as to[TILE, COLUMNS]. Every task owns a block of columns, so that nobody waits.
template <typename Unpack>
Tensor transposed_of(const Tensor& y, int64_t K, const Unpack& unpack) {
  int64_t N = y.size(0), O = y.size(1), tiles = (O + TILE - 1) / TILE;
  Tensor x = at::zeros({N, K}, y.options());
  const float* Y = y.data_ptr<float>();
  float* X = x.data_ptr<float>();
  for_each_task((K + COLUMNS - 1) / COLUMNS, [&](int64_t block) {
    alignas(64) float w[TILE * COLUMNS];
    int64_t k = block * COLUMNS, columns = std::min(COLUMNS, K - k);
    for (int64_t t = 0; t < tiles; t++) {
      unpack(t, k, columns, w);
      int64_t outputs = std::min(TILE, O - t * TILE);
      auto add = columns == 64   ? add_block<4>
                 : columns == 48 ? add_block<3>
                 : columns == 32 ? add_block<2>
                                 : add_block<1>;
      add(X + k, K, Y + t * TILE, O, w, outputs, N);
    }
  });
  return x;
}

// y[N, O] float -> x[N, K] float; packed as in linear_bfloat16, K a multiple of 16.
Tensor transposed_bfloat16(const Tensor& y, const Tensor& packed) {
  int64_t K = packed.size(1);
  const uint32_t* P = (const uint32_t*)packed.data_ptr<at::BFloat16>();
  return transposed_of(y, K, [&](int64_t tile, int64_t k, int64_t columns, float* to) {
    for (int64_t start = 0; start < columns; start += LANES) {
      Words rows[LANES];  // an input channel each, then two output channels each
      for (int i = 0; i < LANES; i++)
        rows[i] = load<Words>(P + (tile * K + k + start + i) * LANES);
      transpose(rows);
      for (int c = 0; c < LANES; c++) {
        store16(to + c * COLUMNS + start, (Floats)(rows[c] << 16));
        store16(to + (c + LANES) * COLUMNS + start, (Floats)(rows[c] & 0xffff0000u));
      }
    }
  });
}

// y[N, O] float -> x[N, K] float; packed and scale as in linear_int8.
Tensor transposed_int8(const Tensor& y, const Tensor& packed, const Tensor& scale) {
  int64_t K = packed.size(1) * 4;
  const uint8_t* P = packed.data_ptr<uint8_t>();
  const float* S = scale.data_ptr<float>();
  return transposed_of(y, K, [&](int64_t tile, int64_t k, int64_t columns, float* to) {
    for (int64_t first = 0; first < TILE; first += LANES) {
      Words rows[LANES] = {};  // four input channels each, then an output channel each
      for (int i = 0; i < columns / 4; i++)
        rows[i] = load<Words>(P + ((tile * K + k) / 4 + i) * TILE * 4 + first * 4);
      transpose(rows);
      for (int64_t c = first; c < first + LANES; c++) {
        uint8_t bytes[COLUMNS];
        __builtin_memcpy(bytes, &rows[c - first], COLUMNS);
        float s = S[tile * TILE + c];
        for (int64_t i = 0; i < COLUMNS; i++) to[c * COLUMNS + i] = (float)((int)bytes[i] - 128) * s;
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY(anabranch, m) {
  m.def("add_rms_norm(Tensor(a!) x, Tensor? delta, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("linear_bfloat16(Tensor x, Tensor packed, Tensor? bias) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor");
  m.def("transposed_bfloat16(Tensor y, Tensor packed) -> Tensor");
  m.def("transposed_int8(Tensor y, Tensor packed, Tensor scale) -> Tensor");
  m.def(
      "add_lora(Tensor(a!) y, Tensor x, Tensor blocks, Tensor[] a, Tensor[] b, int[] offsets) -> ()");
  m.def(
      "attention(Tensor(a!) qkv, Tensor cosine, Tensor sine, Tensor(b!) keys, Tensor(c!) values, "
      "Tensor slots, Tensor query_start, Tensor context, Tensor tables, Tensor? visible, "
      "Tensor? roots, int heads, float scale, int window, Tensor? q_norm, Tensor? k_norm, "
      "float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(anabranch, CPU, m) {
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("linear_bfloat16", linear_bfloat16);
  m.impl("linear_int8", linear_int8);
  m.impl("transposed_bfloat16", transposed_bfloat16);
  m.impl("transposed_int8", transposed_int8);
  m.impl("add_lora", add_lora);
  m.impl("attention", attention);
}
