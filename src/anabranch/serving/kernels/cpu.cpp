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
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t LANES = 16;
constexpr int64_t TILE = 32;       // output channels of a weight tile
constexpr int64_t ROWS = 6;        // rows that share a tile while it is in registers
constexpr int64_t GROUP = 64;      // input channels that share an activation scale
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

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

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

inline float largest(Floats v) {
  float value = v[0];
  for (int i = 1; i < LANES; i++) value = std::max(value, v[i]);
  return value;
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
// Linear layers. Weights are packed as [O / 32][K][32], so that a tile is read from start to end.

template <int R>
inline void rows_bfloat16(const float* x, const at::BFloat16* w, float* y, int64_t K, int64_t O,
                          const float* bias) {
  Floats acc[R][2] = {};
  for (int64_t k = 0; k < K; k++) {
    Floats w0 = load16(w + k * TILE), w1 = load16(w + k * TILE + LANES);
    for (int r = 0; r < R; r++) {
      Floats a = all(x[r * K + k]);
      acc[r][0] += a * w0;
      acc[r][1] += a * w1;
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++)
      store16(y + r * O + j * LANES, bias ? acc[r][j] + load16(bias + j * LANES) : acc[r][j]);
}

// Calls f<1..ROWS>(first) over all rows.
#define FOR_ROW_BLOCKS(N, CALL)                                 \
  for (int64_t n = 0; n < (N); n += ROWS) switch (std::min(ROWS, (N)-n)) { \
      case 6: CALL(6); break;                                   \
      case 5: CALL(5); break;                                   \
      case 4: CALL(4); break;                                   \
      case 3: CALL(3); break;                                   \
      case 2: CALL(2); break;                                   \
      default: CALL(1);                                         \
    }

// x[N, K] float -> y[N, O] float; packed[O / 32, K, 32] bfloat16; O a multiple of 32.
Tensor linear_bfloat16(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias) {
  int64_t N = x.size(0), K = x.size(1), tiles = packed.size(0), O = tiles * TILE;
  Tensor y = at::empty({N, O}, x.options());
  const float* X = x.data_ptr<float>();
  const at::BFloat16* W = packed.data_ptr<at::BFloat16>();
  const float* B = bias ? bias->data_ptr<float>() : nullptr;
  float* Y = y.data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const at::BFloat16* w = W + t * K * TILE;
      const float* b = B ? B + t * TILE : nullptr;
#define CALL(R) rows_bfloat16<R>(X + n * K, w, Y + n * O + t * TILE, K, O, b)
      FOR_ROW_BLOCKS(N, CALL)
#undef CALL
    }
  });
  return y;
}

// One row of activations as int8: symmetric, one scale for each group of 64 channels. `offset` is
// 128 times the sum of a group's integers: weights are stored unsigned, 128 too high.
void quantise_row(const float* x, int64_t K, int8_t* q, float* scale, int32_t* offset) {
  for (int64_t g = 0; g < K / GROUP; g++) {
    const float* a = x + g * GROUP;
    Floats most = {};
    for (int64_t i = 0; i < GROUP; i += LANES) {
      Floats v = load16(a + i), magnitude = v > 0.0f ? v : -v;
      most = most > magnitude ? most : magnitude;
    }
    float peak = std::max(largest(most), 1e-30f), inverse = 127.0f / peak;
    int32_t total = 0;
    for (int64_t i = 0; i < GROUP; i++) {
      int32_t value = (int32_t)std::nearbyintf(a[i] * inverse);
      q[g * GROUP + i] = (int8_t)value;
      total += value;
    }
    scale[g] = peak / 127.0f;
    offset[g] = 128 * total;
  }
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

template <int R>
inline void rows_int8(const int8_t* x, const float* x_scale, const int32_t* x_offset,
                      const uint8_t* w, const float* w_scale, float* y, int64_t K, int64_t O,
                      const float* bias) {
  int64_t groups = K / GROUP;
  Floats acc[R][2] = {};
  for (int64_t g = 0; g < groups; g++) {
    Ints integers[R][2];
    for (int r = 0; r < R; r++)
      integers[r][0] = integers[r][1] = Ints{} - x_offset[r * groups + g];
    for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 4)
      for (int r = 0; r < R; r++) {
        dot4(integers[r][0], w + k * TILE, x + r * K + k);
        dot4(integers[r][1], w + k * TILE + 64, x + r * K + k);
      }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 2; j++)
        acc[r][j] += __builtin_convertvector(integers[r][j], Floats) * x_scale[r * groups + g];
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < 2; j++) {
      Floats value = acc[r][j] * load16(w_scale + j * LANES);
      store16(y + r * O + j * LANES, bias ? value + load16(bias + j * LANES) : value);
    }
}

// x[N, K] float -> y[N, O] float; packed[O / 32, K / 4, 32, 4] uint8; scale[O]; K a multiple of 64.
Tensor linear_int8(const Tensor& x, const Tensor& packed, const Tensor& scale,
                   const std::optional<Tensor>& bias) {
  int64_t N = x.size(0), K = x.size(1), tiles = packed.size(0), O = tiles * TILE;
  int64_t groups = K / GROUP;
  Tensor y = at::empty({N, O}, x.options());
  Tensor quantised = at::empty({N, K}, x.options().dtype(at::kChar));
  std::vector<float> x_scale(N * groups);
  std::vector<int32_t> x_offset(N * groups);
  const float* X = x.data_ptr<float>();
  int8_t* Q = quantised.data_ptr<int8_t>();
  at::parallel_for(0, N, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++)
      quantise_row(X + n * K, K, Q + n * K, &x_scale[n * groups], &x_offset[n * groups]);
  });
  const uint8_t* W = packed.data_ptr<uint8_t>();
  const float* S = scale.data_ptr<float>();
  const float* B = bias ? bias->data_ptr<float>() : nullptr;
  float* Y = y.data_ptr<float>();
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* b = B ? B + t * TILE : nullptr;
#define CALL(R)                                                                            \
  rows_int8<R>(Q + n * K, &x_scale[n * groups], &x_offset[n * groups], W + t * K * TILE,   \
               S + t * TILE, Y + n * O + t * TILE, K, O, b)
      FOR_ROW_BLOCKS(N, CALL)
#undef CALL
    }
  });
  return y;
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

template <int R, typename Cache>
inline void score_rows(const float* q, const Cache* keys, float* scores, int64_t D, int64_t P) {
  for (int64_t j = 0; j < P; j += LANES) {
    Floats acc[R] = {};
    for (int64_t d = 0; d < D; d++) {
      Floats k = load16(keys + d * P + j);
      for (int r = 0; r < R; r++) acc[r] += k * q[r * D + d];
    }
    for (int r = 0; r < R; r++) store16(scores + r * P + j, acc[r]);
  }
}

template <int R, typename Cache>
inline void weigh_rows(const float* weights, const Cache* values, float* acc, int64_t D, int64_t P,
                       int64_t count) {
  for (int64_t d = 0; d < D; d += 2 * LANES) {
    Floats a[R][2];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 2; j++) a[r][j] = load16(acc + r * D + d + j * LANES);
    for (int64_t k = 0; k < count; k++) {
      Floats v0 = load16(values + k * D + d), v1 = load16(values + k * D + d + LANES);
      for (int r = 0; r < R; r++) {
        a[r][0] += v0 * weights[r * P + k];
        a[r][1] += v1 * weights[r * P + k];
      }
    }
    for (int r = 0; r < R; r++)
      for (int j = 0; j < 2; j++) store16(acc + r * D + d + j * LANES, a[r][j]);
  }
}

struct Shape {
  int64_t heads, kv_heads, D, P, pages, table_width, window;
  float scale;
};

constexpr int64_t QUERIES = 24;  // query rows (positions x heads of a group) of one task

// Attention of `count` positions of one sequence, starting at packed row `first`, for one key head.
template <typename Cache>
void attend(const Shape& s, const float* qkv, const Cache* keys, const Cache* values,
            const int64_t* table, int64_t first, int64_t position, int64_t count, int64_t kv_head,
            float* out) {
  int64_t repeats = s.heads / s.kv_heads, rows = count * repeats, D = s.D, P = s.P;
  int64_t width = (s.heads + 2 * s.kv_heads) * D;
  std::vector<float> q(rows * D), acc(rows * D, 0.0f), scores(rows * P);
  std::vector<float> most(rows, NEGATIVE_INFINITY), total(rows, 0.0f);
  for (int64_t r = 0; r < rows; r++) {
    const float* from = qkv + (first + r / repeats) * width + (kv_head * repeats + r % repeats) * D;
    for (int64_t d = 0; d < D; d += LANES) store16(&q[r * D + d], load16(from + d) * s.scale);
  }
  int64_t last = position + count - 1;
  int64_t oldest = s.window > 0 ? std::max<int64_t>(0, position - s.window + 1) : 0;
  for (int64_t page = oldest / P; page <= last / P; page++) {
    int64_t at = (kv_head * s.pages + table[page]) * P * D;
#define CALL(R) score_rows<R>(&q[n * D], keys + at, &scores[n * P], D, P)
    FOR_ROW_BLOCKS(rows, CALL)
#undef CALL
    for (int64_t r = 0; r < rows; r++) {
      float* row = &scores[r * P];
      int64_t here = position + r / repeats;  // sees keys (here - window, here]
      int64_t stop = std::min(P, here - page * P + 1);
      int64_t start = s.window > 0 ? std::max<int64_t>(0, here - s.window + 1 - page * P) : 0;
      if (start >= stop) {
        std::fill(row, row + P, 0.0f);
        continue;
      }
      std::fill(row, row + start, NEGATIVE_INFINITY);
      std::fill(row + stop, row + P, NEGATIVE_INFINITY);
      Floats peak = load16(row);
      for (int64_t j = LANES; j < P; j += LANES) {
        Floats v = load16(row + j);
        peak = peak > v ? peak : v;
      }
      float now = std::max(most[r], largest(peak));
      Floats sums = {};
      for (int64_t j = 0; j < P; j += LANES) {
        Floats e = exp16(load16(row + j) - now);
        store16(row + j, e);
        sums += e;
      }
      float shrink = std::exp(most[r] - now);
      total[r] = total[r] * shrink + sum(sums);
      for (int64_t d = 0; d < D; d += LANES)
        store16(&acc[r * D + d], load16(&acc[r * D + d]) * shrink);
      most[r] = now;
    }
    int64_t seen = std::min(P, last - page * P + 1);
#define CALL(R) weigh_rows<R>(&scores[n * P], values + at, &acc[n * D], D, P, seen)
    FOR_ROW_BLOCKS(rows, CALL)
#undef CALL
  }
  for (int64_t r = 0; r < rows; r++) {
    float* to = out + (first + r / repeats) * s.heads * D + (kv_head * repeats + r % repeats) * D;
    for (int64_t d = 0; d < D; d += LANES) store16(to + d, load16(&acc[r * D + d]) / total[r]);
  }
}

// Rotates queries and keys, writes keys and values to their slots, and attends.
//
// qkv[N, (heads + 2 kv_heads) D] is changed in place. cosine, sine[N, D]. Caches: keys
// [kv_heads, pages, D, P] with the tokens of a page side by side, values [kv_heads, pages, P, D].
// slots[N]; query_start[S + 1], context[S], tables[S, width] as in PackedBatch.
template <typename Cache>
void attention_of(Tensor& out, Tensor& qkv, const Tensor& cosine, const Tensor& sine, Tensor& keys,
                  Tensor& values, const Tensor& slots, const Tensor& query_start,
                  const Tensor& context, const Tensor& tables, const Shape& s, const float* q_norm,
                  const float* k_norm, float eps) {
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
                  t.kv_head, O);
  });
}

Tensor attention(Tensor qkv, const Tensor& cosine, const Tensor& sine, Tensor keys, Tensor values,
                 const Tensor& slots, const Tensor& query_start, const Tensor& context,
                 const Tensor& tables, int64_t heads, double scale, int64_t window,
                 const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm,
                 double eps) {
  Shape s{heads,          keys.size(0),   values.size(3), values.size(2),
          keys.size(1),   tables.size(1), window,         (float)scale};
  Tensor out = at::empty({qkv.size(0), heads * s.D}, qkv.options());
  const float* q = q_norm ? q_norm->data_ptr<float>() : nullptr;
  const float* k = k_norm ? k_norm->data_ptr<float>() : nullptr;
  auto run = keys.scalar_type() == at::kBFloat16 ? attention_of<at::BFloat16> : attention_of<float>;
  run(out, qkv, cosine, sine, keys, values, slots, query_start, context, tables, s, q, k,
      (float)eps);
  return out;
}

}  // namespace

TORCH_LIBRARY(anabranch, m) {
  m.def("add_rms_norm(Tensor(a!) x, Tensor? delta, Tensor weight, float eps) -> Tensor");
  m.def("silu_mul(Tensor x) -> Tensor");
  m.def("linear_bfloat16(Tensor x, Tensor packed, Tensor? bias) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor");
  m.def(
      "attention(Tensor(a!) qkv, Tensor cosine, Tensor sine, Tensor(b!) keys, Tensor(c!) values, "
      "Tensor slots, Tensor query_start, Tensor context, Tensor tables, int heads, float scale, "
      "int window, Tensor? q_norm, Tensor? k_norm, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(anabranch, CPU, m) {
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("silu_mul", silu_mul);
  m.impl("linear_bfloat16", linear_bfloat16);
  m.impl("linear_int8", linear_int8);
  m.impl("attention", attention);
}
