// What `langppl.lm.native` compiles for the machine that it runs on: products with frozen weights,
// and what a decoder layer of Llama's form does around them, for float32 and bfloat16 on the CPU.
//
// Numbers are float32 throughout. Weights, keys and values may be bfloat16; what is multiplied with
// such weights is rounded to it, and the sums are float32.
//
// Each sum goes through its terms in one order, whatever else is computed beside it: a row's
// numbers do not depend on the other rows of a pass.

#include <immintrin.h>
#include <omp.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <vector>

#if defined(__AVX512F__)
#define WIDTH 16
#define TILE 12
#elif defined(__AVX2__) && defined(__FMA__)
#define WIDTH 8
#define TILE 6
#else
#error "neither AVX-512 nor AVX2"
#endif

#define PANEL (2 * WIDTH)
#define CHUNK 256   // rows whose sums a thread holds at a time
#define DEPTH 256   // terms that are summed by themselves: fewer digits are lost than in one go
#define AHEAD 32    // inputs of which the weights are fetched early
#define MOST_SEEN 1024
#define MOST_GROUPS 16

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

namespace {

typedef uint16_t brief;  // a bfloat16

// What is multiplied with brief weights: brief itself where the machine multiplies that.
#if defined(__AVX512BF16__) && WIDTH == 16
typedef brief term;
#else
typedef float term;
#endif

struct Product {
    const void *laid;  // [outputs / PANEL, inputs, PANEL], or, brief, [·, inputs / 2, PANEL, 2]
    const void *bias;  // [outputs], or null
    long inputs, outputs;
    long is_brief;  // whether weights and bias are brief
    // An adapter's two weights, laid out likewise, of `rank` numbers in between; no adapter if 0.
    const float *down, *up;
    long rank;
    float scale;
};

struct Layer {
    const void *first, *second;  // weights of the norms, [inputs], brief where the products' are
    float first_epsilon, second_epsilon;
    long heads, shared, width;  // heads of queries, of keys; numbers of each
    Product query, key, value, out, gate, up, down;
};

vec all(float x) { return vec{} + x; }

float sum(vec x) {
#if WIDTH == 16
    return _mm512_reduce_add_ps((__m512)x);
#else
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
#endif
}

float widened(brief x) {
    uint32_t bits = (uint32_t)x << 16;
    float found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

// To the nearest, ties to even; NaN stays NaN.
brief shortened(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? (brief)(bits >> 16 | 0x40) : (brief)even;
}

void shorten(const float *from, long count, brief *to) {
    for (long k = 0; k < count; k++) to[k] = shortened(from[k]);
}

void shorten(const float *from, long count, float *to) {
    for (long k = 0; k < count; k++) to[k] = widened(shortened(from[k]));
}

vec load(const float *from) { return *(const vec *)from; }

vec load(const brief *from) {
#if WIDTH == 16
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16);
#else
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16);
#endif
}

float number(const void *of, long k, bool is_brief) {
    return is_brief ? widened(((const brief *)of)[k]) : ((const float *)of)[k];
}

// Brief terms come in pairs.
long even(long count) { return count + (count & 1); }

// e^x, to 2 units in the last place (Cephes' polynomial); NaN stays NaN.
vec exponential(vec x) {
    x = x > 88.3f ? all(88.3f) : x;
    x = x < -87.3f ? all(-87.3f) : x;
    vec n = x * 1.44269504088896341f;
#if WIDTH == 16
    n = (vec)_mm512_roundscale_ps((__m512)n, 0);
#else
    n = (vec)_mm256_round_ps((__m256)n, 0);
#endif
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.0f;
    ints power = (__builtin_convertvector(n, ints) + 127) << 23;
    return y * (vec)power;
}

// Adds the products of some rows with a stretch of a panel to sums [ROWS, PANEL].
template <int ROWS>
void tile(const float *x, long stride, const float *laid, long depth, float *sums) {
    vec own[ROWS][2];
    for (int i = 0; i < ROWS; i++) own[i][0] = own[i][1] = vec{};
    for (long k = 0; k < depth; k++) {
        const float *at = laid + k * PANEL;
        vec first = *(const vec *)at, second = *(const vec *)(at + WIDTH);
        __builtin_prefetch(at + AHEAD * PANEL, 0, 1);
        if (WIDTH == 16) __builtin_prefetch(at + AHEAD * PANEL + WIDTH, 0, 1);
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            float factor = x[i * stride + k];
            own[i][0] += first * factor;
            own[i][1] += second * factor;
        }
    }
    for (int i = 0; i < ROWS; i++) {
        *(vec *)(sums + i * PANEL) += own[i][0];
        *(vec *)(sums + i * PANEL + WIDTH) += own[i][1];
    }
}

// The same with brief weights, which lie in pairs.
template <int ROWS>
void tile(const term *x, long stride, const brief *laid, long depth, float *sums) {
    vec own[ROWS][2];
    for (int i = 0; i < ROWS; i++) own[i][0] = own[i][1] = vec{};
    for (long k = 0; k < depth; k += 2) {
        const brief *at = laid + k * PANEL;
        ints first = *(const ints *)at, second = *(const ints *)(at + 2 * WIDTH);
        __builtin_prefetch(at + AHEAD * PANEL, 0, 1);
        if (WIDTH == 16) __builtin_prefetch(at + AHEAD * PANEL + 2 * WIDTH, 0, 1);
#if defined(__AVX512BF16__) && WIDTH == 16
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            int both;
            memcpy(&both, x + i * stride + k, sizeof both);
            __m512bh factors = (__m512bh)_mm512_set1_epi32(both);
            own[i][0] = (vec)_mm512_dpbf16_ps((__m512)own[i][0], (__m512bh)first, factors);
            own[i][1] = (vec)_mm512_dpbf16_ps((__m512)own[i][1], (__m512bh)second, factors);
        }
#else
        const ints high = ints{} + (int)0xffff0000;
        vec even_ones[] = {(vec)(first << 16), (vec)(second << 16)};
        vec odd_ones[] = {(vec)(first & high), (vec)(second & high)};
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            float factor = x[i * stride + k];
            own[i][0] += even_ones[0] * factor;
            own[i][1] += even_ones[1] * factor;
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            float factor = x[i * stride + k + 1];
            own[i][0] += odd_ones[0] * factor;
            own[i][1] += odd_ones[1] * factor;
        }
#endif
    }
    for (int i = 0; i < ROWS; i++) {
        *(vec *)(sums + i * PANEL) += own[i][0];
        *(vec *)(sums + i * PANEL + WIDTH) += own[i][1];
    }
}

// Adds the products of at most CHUNK rows [rows, inputs] with a panel to sums [rows, PANEL].
template <class Term, class Weight>
void add(const Term *x, long inputs, const Weight *laid, long rows, float *sums) {
    long tiles = (rows + TILE - 1) / TILE;
    for (long k = 0; k < inputs; k += DEPTH) {
        long depth = inputs - k < DEPTH ? inputs - k : DEPTH, i = 0;
        for (long t = 0; t < tiles; t++) {
            long next = rows * (t + 1) / tiles;  // tiles of like heights
            const Term *of = x + i * inputs + k;
            const Weight *at = laid + k * PANEL;
            float *to = sums + i * PANEL;
            switch (next - i) {
            case 1: tile<1>(of, inputs, at, depth, to); break;
            case 2: tile<2>(of, inputs, at, depth, to); break;
            case 3: tile<3>(of, inputs, at, depth, to); break;
            case 4: tile<4>(of, inputs, at, depth, to); break;
            case 5: tile<5>(of, inputs, at, depth, to); break;
            case 6: tile<6>(of, inputs, at, depth, to); break;
#if TILE == 12
            case 7: tile<7>(of, inputs, at, depth, to); break;
            case 8: tile<8>(of, inputs, at, depth, to); break;
            case 9: tile<9>(of, inputs, at, depth, to); break;
            case 10: tile<10>(of, inputs, at, depth, to); break;
            case 11: tile<11>(of, inputs, at, depth, to); break;
            case 12: tile<12>(of, inputs, at, depth, to); break;
#endif
            }
            i = next;
        }
    }
}

// Rows as brief weights take them, [rows, even(width)]; within a parallel region.
void to_terms(const float *x, long rows, long width, term *terms) {
    long stride = even(width);
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
        shorten(x + i * width, width, terms + i * stride);
        if (stride > width) terms[i * stride + width] = 0;
    }
}

// Rows, and the same as brief weights take them, where there are any.
struct Rows {
    const float *x;
    const term *terms;

    Rows from(long first, long width) const {
        return {x + first * width, terms ? terms + first * even(width) : nullptr};
    }
};

// Products of at most CHUNK rows with one panel, [rows, PANEL], bias and adapter included; `low` is
// what `lower` made of the rows.
void panel(const Product &product, long at, Rows of, const float *low, long rows, float *sums) {
    long first = at * PANEL, count = product.outputs - first, inputs = product.inputs;
    for (long k = 0; k < PANEL; k++)
        sums[k] = product.bias && k < count ? number(product.bias, first + k, product.is_brief) : 0;
    for (long i = 1; i < rows; i++)
        for (long k = 0; k < PANEL; k++) sums[i * PANEL + k] = sums[k];
    if (product.is_brief)
        add(of.terms, even(inputs), (const brief *)product.laid + first * even(inputs), rows, sums);
    else
        add(of.x, inputs, (const float *)product.laid + first * inputs, rows, sums);
    if (product.rank) add(low, product.rank, product.up + first * product.rank, rows, sums);
}

long panels(long outputs) { return (outputs + PANEL - 1) / PANEL; }

long width_of(long outputs, long number) {
    long count = outputs - number * PANEL;
    return count < PANEL ? count : PANEL;
}

// Of some products with the same rows, what their adapters' first weights make of these, scaled:
// [rows, rank] of each, one after another; within a parallel region.
void lower(const Product *const *products, long count, const float *x, long rows, float *low) {
    long most = 0, chunks = (rows + CHUNK - 1) / CHUNK;
    for (long n = 0; n < count; n++)
        if (panels(products[n]->rank) > most) most = panels(products[n]->rank);
    if (!most) return;
#pragma omp for schedule(static) collapse(3)
    for (long n = 0; n < count; n++)
        for (long c = 0; c < chunks; c++)
            for (long p = 0; p < most; p++) {
                const Product &own = *products[n];
                long before = 0;
                for (long m = 0; m < n; m++) before += products[m]->rank;
                if (p >= panels(own.rank)) continue;
                Product down = {own.down, nullptr, own.inputs, own.rank, 0, nullptr, nullptr, 0, 0};
                float sums[CHUNK * PANEL];
                long first = c * CHUNK, some = rows - first < CHUNK ? rows - first : CHUNK;
                panel(down, p, {x + first * own.inputs, nullptr}, nullptr, some, sums);
                float *to = low + before * rows + first * own.rank + p * PANEL;
                for (long i = 0; i < some; i++)
                    for (long k = 0; k < width_of(own.rank, p); k++)
                        to[i * own.rank + k] = sums[i * PANEL + k] * own.scale;
            }
}

// y = or += x Wᵀ + b; within a parallel region.
void multiply(const Product &product, Rows of, const float *low, long rows, float *y, long stride,
              bool adds) {
    long chunks = (rows + CHUNK - 1) / CHUNK, count = panels(product.outputs);
#pragma omp for schedule(static) collapse(2) nowait
    for (long c = 0; c < chunks; c++)
        for (long p = 0; p < count; p++) {
            float sums[CHUNK * PANEL];
            long first = c * CHUNK, own = rows - first < CHUNK ? rows - first : CHUNK;
            panel(product, p, of.from(first, product.inputs), low + first * product.rank, own, sums);
            long width = width_of(product.outputs, p);
            for (long i = 0; i < own; i++) {
                float *to = y + (first + i) * stride + p * PANEL;
                const float *from = sums + i * PANEL;
                if (adds)
                    for (long k = 0; k < width; k++) to[k] += from[k];
                else
                    for (long k = 0; k < width; k++) to[k] = from[k];
            }
        }
}

// Rows over their root mean squares, times a weight; within a parallel region.
void normed(const float *x, long rows, long width, const void *weight, bool is_brief, float epsilon,
            float *y) {
#pragma omp for schedule(static)
    for (long i = 0; i < rows; i++) {
        const float *from = x + i * width;
        float *to = y + i * width;
        vec squares = vec{};
        long k = 0;
        for (; k + WIDTH <= width; k += WIDTH) {
            vec own = *(const vec *)(from + k);
            squares += own * own;
        }
        float total = sum(squares);
        for (; k < width; k++) total += from[k] * from[k];
        float scale = 1.0f / sqrtf(total / width + epsilon);
        if (is_brief)
            for (k = 0; k < width; k++) to[k] = from[k] * scale * widened(((const brief *)weight)[k]);
        else
            for (k = 0; k < width; k++) to[k] = from[k] * scale * ((const float *)weight)[k];
    }
}

// Attention of queries [heads, rows, width] to keys and values [shared, ·, width], a head of them
// `key_stride` and `value_stride` numbers from the next. Row i sees the keys
// places[starts[i]], ..., places[starts[i + 1] - 1]; found is [rows, heads, width].
template <class Number>
void attend(const float *queries, const Number *keys, const Number *values, long key_stride,
            long value_stride, long heads, long shared, long rows, long width, float scaling,
            const long *starts, const long *places, float *found, int threads) {
    long groups = heads / shared;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (long i = 0; i < rows; i++)
        for (long s = 0; s < shared; s++) {
            float scores[MOST_GROUPS][MOST_SEEN + WIDTH];
            const long *seen = places + starts[i];
            long count = starts[i + 1] - starts[i];
            const Number *key = keys + s * key_stride, *value = values + s * value_stride;
            const float *query = queries + (s * groups * rows + i) * width;
            for (long j = 0; j < count; j++) {
                const Number *own = key + seen[j] * width;
                for (long g = 0; g < groups; g++) {
                    const float *of = query + g * rows * width;
                    vec products = vec{};
                    for (long k = 0; k < width; k += WIDTH)
                        products += load(own + k) * load(of + k);
                    scores[g][j] = sum(products) * scaling;
                }
            }
            for (long g = 0; g < groups; g++) {
                float *own = scores[g], most = own[0], total = 0;
                for (long j = 1; j < count; j++) most = own[j] > most ? own[j] : most;
                for (long j = count; j < count + WIDTH; j++) own[j] = most;
                for (long j = 0; j < count; j += WIDTH)
                    *(vec *)(own + j) = exponential(*(vec *)(own + j) - most);
                for (long j = 0; j < count; j++) total += own[j];
                float *to = found + (i * heads + s * groups + g) * width;
                for (long k = 0; k < width; k += WIDTH) {
                    vec sums = vec{};
                    for (long j = 0; j < count; j++)
                        sums += load(value + seen[j] * width + k) * own[j];
                    *(vec *)(to + k) = sums / total;
                }
            }
        }
}

// A weight [outputs, inputs], laid out for `multiply` by so many inputs together. The last panel, and
// what is missing of the last inputs, is filled up with zeros.
template <int TOGETHER, class Number>
void lay_out(const Number *weight, long outputs, long inputs, Number *laid, int threads) {
    long deep = (inputs + TOGETHER - 1) / TOGETHER * TOGETHER;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < panels(outputs); p++) {
        Number *to = laid + p * PANEL * deep;
        for (long k = 0; k < deep; k++)
            for (long j = 0; j < PANEL; j++) {
                long row = p * PANEL + j, at = k / TOGETHER * PANEL + j;
                bool is_there = row < outputs && k < inputs;
                to[at * TOGETHER + k % TOGETHER] = is_there ? weight[row * inputs + k] : 0;
            }
    }
}

}  // namespace

extern "C" {

long langppl_panel() { return PANEL; }
long langppl_most_seen() { return MOST_SEEN; }
long langppl_most_groups() { return MOST_GROUPS; }
long langppl_lanes() { return WIDTH; }
long langppl_has_brief() { return sizeof(term) == sizeof(brief); }

void langppl_lay_out(const float *weight, long outputs, long inputs, float *laid, int threads) {
    lay_out<1>(weight, outputs, inputs, laid, threads);
}

void langppl_lay_out_brief(const brief *weight, long outputs, long inputs, brief *laid, int threads) {
    lay_out<2>(weight, outputs, inputs, laid, threads);
}

// `room` has space for rows · even(inputs) numbers where the weight is brief.
void langppl_multiply(const Product *product, const float *x, long rows, float *y, float *room,
                      int threads) {
    term *terms = product->is_brief ? (term *)room : nullptr;
#pragma omp parallel num_threads(threads)
    {
        if (terms) to_terms(x, rows, product->inputs, terms);
        multiply(*product, {x, terms}, nullptr, rows, y, product->outputs, false);
    }
}

// A layer up to its attention: queries and keys [heads + shared, rows, width], turned by their
// positions' cosines and sines [rows, width] (the first half of the sines with the other sign), and
// values [shared, rows, width]. `room` has space for rows · (inputs + (heads + 2 shared) · width +
// 3 ranks) numbers, and for rows · even(inputs) more where the weights are brief.
void langppl_before(const Layer *layer, const float *x, long rows, const float *cosines,
                    const float *sines, float *turned, float *values, float *room, int threads) {
    const Layer &l = *layer;
    long inputs = l.query.inputs, width = l.width, half = width / 2;
    long of_queries = l.heads * width, of_keys = l.shared * width, stride = of_queries + 2 * of_keys;
    float *h = room, *raw = room + rows * inputs, *low = raw + rows * stride;
    const Product *const three[] = {&l.query, &l.key, &l.value};
    const float *of_second = low + rows * l.query.rank, *of_third = of_second + rows * l.key.rank;
    term *terms = l.query.is_brief ? (term *)(of_third + rows * l.value.rank) : nullptr;
    Rows own = {h, terms};
#pragma omp parallel num_threads(threads)
    {
        normed(x, rows, inputs, l.first, l.query.is_brief, l.first_epsilon, h);
        if (terms) to_terms(h, rows, inputs, terms);
        lower(three, 3, h, rows, low);
        multiply(l.query, own, low, rows, raw, stride, false);
        multiply(l.key, own, of_second, rows, raw + of_queries, stride, false);
        multiply(l.value, own, of_third, rows, raw + of_queries + of_keys, stride, false);
#pragma omp barrier
#pragma omp for schedule(static) collapse(2)
        for (long i = 0; i < rows; i++)
            for (long a = 0; a < l.heads + 2 * l.shared; a++) {
                const float *from = raw + i * stride + a * width;
                if (a >= l.heads + l.shared) {
                    float *to = values + ((a - l.heads - l.shared) * rows + i) * width;
                    for (long k = 0; k < width; k++) to[k] = from[k];
                    continue;
                }
                float *to = turned + (a * rows + i) * width;
                const float *c = cosines + i * width, *s = sines + i * width;
                for (long k = 0; k < half; k++) {
                    float u = from[k], w = from[k + half];
                    to[k] = u * c[k] + w * s[k];
                    to[k + half] = w * c[k + half] + u * s[k + half];
                }
            }
    }
}

void langppl_attend(const float *queries, const void *keys, const void *values, long is_brief,
                    long key_stride, long value_stride, long heads, long shared, long rows,
                    long width, float scaling, const long *starts, const long *places, float *found,
                    int threads) {
    if (is_brief)
        attend(queries, (const brief *)keys, (const brief *)values, key_stride, value_stride, heads,
               shared, rows, width, scaling, starts, places, found, threads);
    else
        attend(queries, (const float *)keys, (const float *)values, key_stride, value_stride, heads,
               shared, rows, width, scaling, starts, places, found, threads);
}

// A layer after its attention, whose result is [rows, heads · width]: x [rows, inputs] is what goes
// in and what comes out. `room` has space for rows · (inputs + gate's outputs + 4 ranks) numbers, of
// which the last are what `lower` made for the four products; brief weights take rows · even(the most
// of their inputs) more. For a backward pass, x between the two
// halves [rows, inputs] and what gate and up gave [rows, outputs] are written where `middle` is given.
void langppl_after(const Layer *layer, const float *found, float *x, long rows, float *room,
                   float *middle, float *gates, float *ups, int threads) {
    const Layer &l = *layer;
    long inputs = l.out.outputs, inner = l.gate.outputs;
    float *h = room, *gated = room + rows * inputs, *of_out = gated + rows * inner;
    float *low = of_out + rows * l.out.rank, *of_up = low + rows * l.gate.rank;
    float *of_down = of_up + rows * l.up.rank;
    const Product *const out[] = {&l.out}, *const two[] = {&l.gate, &l.up}, *const down[] = {&l.down};
    term *terms = l.out.is_brief ? (term *)(of_down + rows * l.down.rank) : nullptr;
#pragma omp parallel num_threads(threads)
    {
        if (terms) to_terms(found, rows, l.out.inputs, terms);
        lower(out, 1, found, rows, of_out);
        multiply(l.out, {found, terms}, of_out, rows, x, inputs, true);
#pragma omp barrier
        if (middle) {
#pragma omp for schedule(static) nowait
            for (long i = 0; i < rows; i++)
                memcpy(middle + i * inputs, x + i * inputs, sizeof(float) * inputs);
        }
        normed(x, rows, inputs, l.second, l.gate.is_brief, l.second_epsilon, h);
        if (terms) to_terms(h, rows, inputs, terms);
        lower(two, 2, h, rows, low);
        long chunks = (rows + CHUNK - 1) / CHUNK, count = panels(inner);
#pragma omp for schedule(static) collapse(2)
        for (long c = 0; c < chunks; c++)
            for (long p = 0; p < count; p++) {
                float gate[CHUNK * PANEL], up[CHUNK * PANEL];
                long first = c * CHUNK, own = rows - first < CHUNK ? rows - first : CHUNK;
                Rows rows_of = Rows{h, terms}.from(first, inputs);
                panel(l.gate, p, rows_of, low + first * l.gate.rank, own, gate);
                panel(l.up, p, rows_of, of_up + first * l.up.rank, own, up);
                long width = width_of(inner, p);
                for (long i = 0; i < own; i++) {
                    float *to = gated + (first + i) * inner + p * PANEL;
                    float *of = gate + i * PANEL;
                    const float *times = up + i * PANEL;
                    if (middle) {
                        long at = (first + i) * inner + p * PANEL;
                        memcpy(gates + at, of, sizeof(float) * width);
                        memcpy(ups + at, times, sizeof(float) * width);
                    }
                    for (long k = 0; k < PANEL; k += WIDTH) {
                        vec g = *(vec *)(of + k);
                        *(vec *)(of + k) = g / (1.0f + exponential(-g)) * *(const vec *)(times + k);
                    }
                    for (long k = 0; k < width; k++) to[k] = of[k];
                }
            }
        if (terms) to_terms(gated, rows, inner, terms);
        lower(down, 1, gated, rows, of_down);
        multiply(l.down, {gated, terms}, of_down, rows, x, inputs, true);
    }
}

// Layers one after another. Of each, a head of keys and of values has `stride` numbers of room, of
// which the first `held` tokens are taken: the pass's own are written behind them. `room` has space
// for what the three functions above read, write and use.
void langppl_run(const Layer *const *layers, long count, float *x, long rows, const float *cosines,
                 const float *sines, void *const *keys, void *const *values, long is_brief,
                 long held, long stride, float scaling, const long *starts, const long *places, float *room,
                 int threads) {
    for (long n = 0; n < count; n++) {
        const Layer &l = *layers[n];
        long head = rows * l.width;
        float *turned = room, *own = turned + (l.heads + l.shared) * head;
        float *found = own + l.shared * head, *rest = found + l.heads * head;
        langppl_before(&l, x, rows, cosines, sines, turned, own, rest, threads);
        for (long s = 0; s < l.shared; s++) {
            long to = s * stride + held * l.width;
            const float *key = turned + (l.heads + s) * head, *value = own + s * head;
            if (is_brief) {
                shorten(key, head, (brief *)keys[n] + to);
                shorten(value, head, (brief *)values[n] + to);
                continue;
            }
            memcpy((float *)keys[n] + to, key, sizeof(float) * head);
            memcpy((float *)values[n] + to, value, sizeof(float) * head);
        }
        langppl_attend(turned, keys[n], values[n], is_brief, stride, stride, l.heads, l.shared, rows,
                       l.width, scaling, starts, places, found, threads);
        langppl_after(&l, found, x, rows, rest, nullptr, nullptr, nullptr, threads);
    }
}

// Gradients [rows, inputs] of x, of those [rows, outputs] of its product with a weight
// [outputs, inputs]; they are added to what is there, or take its place. An adapter's part comes from
// `low` [rows, rank] and its first weight `down` [rank, inputs], if rank is not 0. `room` has space
// for rows · even(outputs) numbers where the weight is brief.
void langppl_multiply_back(const void *weight, long is_brief, long outputs, long inputs,
                           const float *gradients, const float *low, const float *down, long rank,
                           long rows, float *into, int adds, float *room, int threads) {
    long count = panels(inputs), deep = even(outputs);
    term *terms = is_brief ? (term *)room : nullptr;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> laid((is_brief ? rank : outputs + rank) * PANEL), sums(CHUNK * PANEL);
        std::vector<brief> pairs(is_brief ? deep * PANEL : 0);
        if (terms) to_terms(gradients, rows, outputs, terms);
#pragma omp for schedule(static)
        for (long p = 0; p < count; p++) {
            long width = width_of(inputs, p);
            float *to = laid.data();
            if (is_brief)
                for (long n = 0; n < outputs; n++) {
                    const brief *from = (const brief *)weight + n * inputs + p * PANEL;
                    brief *pair = pairs.data() + (n & ~1L) * PANEL + (n & 1);
                    for (long k = 0; k < width; k++) pair[2 * k] = from[k];
                }
            for (long n = is_brief ? outputs : 0; n < outputs + rank; n++, to += PANEL) {
                const float *from =
                    n < outputs ? (const float *)weight + n * inputs : down + (n - outputs) * inputs;
                for (long k = 0; k < width; k++) to[k] = from[p * PANEL + k];
            }
            for (long first = 0; first < rows; first += CHUNK) {
                long own = rows - first < CHUNK ? rows - first : CHUNK;
                memset(sums.data(), 0, sizeof(float) * own * PANEL);
                if (is_brief)
                    add(terms + first * deep, deep, (const brief *)pairs.data(), own, sums.data());
                else
                    add(gradients + first * outputs, outputs, (const float *)laid.data(), own,
                        sums.data());
                if (rank)
                    add(low + first * rank, rank,
                        (const float *)laid.data() + (is_brief ? 0 : outputs * PANEL), own,
                        sums.data());
                for (long i = 0; i < own; i++) {
                    float *at = into + (first + i) * inputs + p * PANEL;
                    const float *of = sums.data() + i * PANEL;
                    if (adds)
                        for (long k = 0; k < width; k++) at[k] += of[k];
                    else
                        for (long k = 0; k < width; k++) at[k] = of[k];
                }
            }
        }
    }
}

// Rows over their root mean squares, times a weight.
void langppl_norm(const float *x, long rows, long width, const void *weight, long is_brief,
                  float epsilon, float *y, int threads) {
#pragma omp parallel num_threads(threads)
    normed(x, rows, width, weight, is_brief, epsilon, y);
}

// Adds to `into` the gradients of x, of those of `langppl_norm`'s result.
void langppl_norm_back(const float *x, long rows, long width, const void *weight, long is_brief,
                       float epsilon, const float *gradients, float *into, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < rows; i++) {
        const float *from = x + i * width, *of = gradients + i * width;
        float *to = into + i * width;
        double squares = 0, products = 0;
        for (long k = 0; k < width; k++) {
            squares += (double)from[k] * from[k];
            products += (double)from[k] * number(weight, k, is_brief) * of[k];
        }
        float scale = (float)(1.0 / sqrt(squares / width + epsilon));
        float along = (float)(products / width) * scale * scale;
        for (long k = 0; k < width; k++)
            to[k] += scale * (number(weight, k, is_brief) * of[k] - from[k] * along);
    }
}

// Gradients of what gate and up gave, of those of their product, which is made again.
void langppl_gated_back(const float *gates, const float *ups, const float *gradients, long count,
                        float *product, float *of_gates, float *of_ups, int threads) {
    long steps = (count + WIDTH - 1) / WIDTH;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long n = 0; n < steps; n++) {
        long at = n * WIDTH, some = count - at < WIDTH ? count - at : WIDTH;
        float own[3][WIDTH] = {}, made[3][WIDTH];
        const float *from[] = {gates + at, ups + at, gradients + at};
        float *to[] = {product + at, of_gates + at, of_ups + at};
        for (int j = 0; j < 3; j++) memcpy(own[j], from[j], sizeof(float) * some);
        vec g = *(vec *)own[0], up = *(vec *)own[1], of = *(vec *)own[2];
        vec share = 1.0f / (1.0f + exponential(-g)), active = g * share;
        *(vec *)made[0] = active * up;
        *(vec *)made[1] = of * up * share * (1.0f + g * (1.0f - share));
        *(vec *)made[2] = of * active;
        for (int j = 0; j < 3; j++) memcpy(to[j], made[j], sizeof(float) * some);
    }
}

// Gradients [rows, (heads + 2 shared) · width] of what the three products gave, of those of
// `langppl_before`'s results.
void langppl_turn_back(long heads, long shared, long width, long rows, const float *cosines,
                       const float *sines, const float *of_turned, const float *of_values,
                       float *into, int threads) {
    long half = width / 2, every = heads + 2 * shared;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (long i = 0; i < rows; i++)
        for (long a = 0; a < every; a++) {
            float *to = into + (i * every + a) * width;
            if (a >= heads + shared) {
                memcpy(to, of_values + ((a - heads - shared) * rows + i) * width, sizeof(float) * width);
                continue;
            }
            const float *from = of_turned + (a * rows + i) * width;
            const float *c = cosines + i * width, *s = sines + i * width;
            for (long k = 0; k < half; k++) {
                to[k] = from[k] * c[k] + from[k + half] * s[k + half];
                to[k + half] = from[k + half] * c[k + half] + from[k] * s[k];
            }
        }
}
}
