/* What the memory of a method costs, and nothing else: benchmark only. Chunks, what each thread does and the
 * order of tensors are those of src/optim/native. Built and called by bench_floor.py. */

#include <omp.h>
#include <stdint.h>

enum { CHUNK = 1 << 16, LANES = 32, WAYS = 4 };
enum { READ_G = 1, READ_W = 2, READ_TOTAL = 4 };

typedef struct {
    float *weight;
    const float *grad;
    float *total;
    int64_t size;
} Tensor;

/* One addition a coordinate and stream: less than any rule needs. From WAYS places at once, as the kernels' norms read. */
#define SUM(name, streams, value)                                                      \
    static float name streams {                                                        \
        float lanes[LANES] = {0}, result = 0;                                          \
        const int64_t part = n / WAYS / LANES * LANES;                                 \
        for (int64_t j = 0; j < part; j += LANES)                                      \
            for (int way = 0; way < WAYS; way++)                                       \
                for (int64_t k = 0, i = way * part + j; k < LANES; k++, i++) lanes[k] += value; \
        for (int64_t i = WAYS * part; i < n; i++) result += value;                     \
        for (int k = 0; k < LANES; k++) result += lanes[k];                            \
        return result;                                                                 \
    }
SUM(sum, (const float *x, int64_t n), x[i])
SUM(sum2, (const float *x, const float *y, int64_t n), x[i] + y[i])
SUM(sum3, (const float *x, const float *y, const float *z, int64_t n), x[i] + y[i] + z[i])

/* With zero = 0, which the compiler does not know, this writes back what it read. */
static void update(float *restrict w, const float *restrict g, float *restrict total, int64_t n, float zero) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) w[i + k] += zero * g[i + k], total[i + k] += zero * g[i + k];
    for (; i < n; i++) w[i] += zero * g[i], total[i] += zero * g[i];
}

/* A thread's part of n chunks, in both passes. */
static int64_t first(int64_t n) { return n * omp_get_thread_num() / omp_get_num_threads(); }
static int64_t end(int64_t n) { return n * (omp_get_thread_num() + 1) / omp_get_num_threads(); }

/* First pass: read what `reads` names (nothing: no pass); second pass: read w, g, G, write w, G. */
double floor_step(const Tensor *tensors, int64_t count, int64_t reads, double zero, int64_t threads) {
    double seen = 0;
    for (int64_t t = 0; reads && t < count; t++) {
        const Tensor x = tensors[t];
        const int64_t chunks = (x.size + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) reduction(+ : seen) if (chunks > 1)
        for (int64_t c = first(chunks); c < end(chunks); c++) {
            const int64_t at = c * CHUNK, n = x.size - at < CHUNK ? x.size - at : CHUNK;
            const float *w = x.weight + at, *g = x.grad + at, *total = x.total + at;
            if (reads == (READ_G | READ_W | READ_TOTAL))
                seen += sum3(w, g, total, n);
            else if (reads == (READ_G | READ_W))
                seen += sum2(w, g, n);
            else
                seen += sum(g, n);
        }
    }
    for (int64_t t = count - 1; t >= 0; t--) {
        const Tensor x = tensors[t];
        const int64_t chunks = (x.size + CHUNK - 1) / CHUNK;
#pragma omp parallel num_threads(threads) if (chunks > 1)
        for (int64_t c = first(chunks); c < end(chunks); c++) {
            const int64_t at = c * CHUNK, n = x.size - at < CHUNK ? x.size - at : CHUNK;
            update(x.weight + at, x.grad + at, x.total + at, n, (float)zero);
        }
    }
    return seen;
}
