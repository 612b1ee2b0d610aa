/* Adagrad's and Adam's family on the CPU: reduce a list of tensors, then step them. Called from backend.py through ctypes. */

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))
typedef struct {
    void *weight;
    const void *grad;
    void *total;         /* the accumulator G; of Adam v */
    void *moment;        /* m of Adam; null for Adagrad */
    float *count;        /* Adam's steps before this one */
    const int64_t *rows; /* which rows of a table these are; null for a whole tensor */
    int64_t width;       /* of a row, at least 1 */
    int64_t size;        /* coordinates */
    int64_t is_double;   /* float otherwise */
} Tensor;

typedef struct {
    double sign, decay, eps;
    double bound_rel, bound_abs, bound_acc; /* b = bound_rel * |w| + bound_abs + bound_acc / root */
    double shrink;                          /* decoupled weight decay */
    double joined, beta1, beta2;            /* of Adam; joined: weight decay that is part of r */
    int64_t delayed, inside;
    int64_t clips_gradient, feeds_clipped; /* r is of sigma * g', and so is what G is fed */
    int64_t grads, weights, updates, largest, overshoot; /* which reductions are wanted */
} Settings;

/* w <- keep * w - rate * r of (seen * g'), G <- G + (fed * g')^2 */
typedef struct {
    double keep, rate, seen, fed;
} Factors;

enum { GRAD_SQ, WEIGHT_SQ, UPDATE_SQ, UPDATE_MAX, OVERSHOOT, INDEX, WEIGHT, GRAD, TOTAL, MOMENT, COLUMNS };
enum { MOVED_SQ, MOVED_MAX, SIZES }; /* of the step taken, lr and sigma included */
/* The row of a tensor, as FIELDS of stats.py has it. */
enum { SIGMA, SIGMA_MIN, SIGMA_MEAN, STEPS, CLIPPED, STEP_MAX, STEP_NORM, COORDINATE, TERM, STILL, FIELDS };
enum { RELATIVE, ABSOLUTE, ACCUMULATOR }; /* TERMS of registry.py */
#define DECAY 0.99                        /* of stats.py */
/* A float chunk of w, g and G fits a 1 MiB cache. */
enum { CHUNK = 1 << 16, BLOCK = 512, LANES = 32, WAYS = 4 };

#define REAL float
#define NAME(x) x##_float
#define SQRT sqrtf
#define FABS fabsf
#define WORD int32_t
#define EPSILON FLT_EPSILON
#define SMALLEST FLT_MIN
#define LARGEST FLT_MAX
#include "kernels.h"
#include "adam.h"
#undef REAL
#undef NAME
#undef SQRT
#undef FABS
#undef WORD
#undef EPSILON
#undef SMALLEST
#undef LARGEST

#define REAL double
#define NAME(x) x##_double
#define SQRT sqrt
#define FABS fabs
#define WORD int64_t
#define EPSILON DBL_EPSILON
#define SMALLEST DBL_MIN
#define LARGEST DBL_MAX
#include "kernels.h"
#include "adam.h"

/* Compared with structs.py before anything else is called. */
int optim_layout(void) { return (sizeof(Tensor) * 10000 + sizeof(Settings)) * 100 + FIELDS; }

static int64_t chunks(const Tensor *t) { return (t->size + CHUNK - 1) / CHUNK; }

static int64_t width(const Tensor *t, int64_t chunk) {
    const int64_t left = t->size - chunk * CHUNK;
    return left < CHUNK ? left : CHUNK;
}

/* The part of n chunks that this thread works on, the same in both passes: what it has just read is in its cache. */
typedef struct {
    int64_t begin, end;
} Part;

static Part part_of(int64_t n) {
#ifdef _OPENMP
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
#else
    const int64_t threads = 1, thread = 0;
#endif
    return (Part){n * thread / threads, n * (thread + 1) / threads};
}

static double larger(double a, double b) { return a != a || a > b ? a : b; } /* NaN wins from either side */

/* parts: [chunks of all tensors, COLUMNS], the reductions of every chunk; out: [count, COLUMNS], of every tensor.
 * lr: null, or where to read it: an overshoot of no more than 1 / lr may be given as 0. The sums run over chunks in
 * order, whatever the number of threads. */
void optim_reduce(const Tensor *tensors, int64_t count, const Settings *s, const double *lr, double *parts, double *out,
                  int64_t threads) {
    const double least = lr ? (1 - 1e-6) / *lr : 0; /* below 1 / lr also when rounded to float */
    memset(out, 0, count * COLUMNS * sizeof(double));
    for (int64_t t = 0; t < count; t++) {
        const Tensor *tensor = &tensors[t];
        const int64_t n = chunks(tensor);
        memset(parts, 0, n * COLUMNS * sizeof(double));
#pragma omp parallel num_threads(threads) if (n > 1)
        {
            double worst = least; /* of this thread: the overshoot to exceed */
            const Part mine = part_of(n);
            for (int64_t c = mine.begin; c < mine.end; c++) {
                double *part = parts + c * COLUMNS;
                if (tensor->moment && tensor->is_double)
                    adam_reduce_chunk_double(tensor, c, width(tensor, c), s, &worst, part);
                else if (tensor->moment)
                    adam_reduce_chunk_float(tensor, c, width(tensor, c), s, &worst, part);
                else if (tensor->is_double)
                    reduce_chunk_double(tensor, c, width(tensor, c), s, &worst, part);
                else
                    reduce_chunk_float(tensor, c, width(tensor, c), s, &worst, part);
            }
        }
        double *sum = out + t * COLUMNS;
        for (int64_t c = 0; c < n; c++, parts += COLUMNS) {
            for (int k = GRAD_SQ; k <= UPDATE_SQ; k++) sum[k] += parts[k];
            sum[UPDATE_MAX] = larger(sum[UPDATE_MAX], parts[UPDATE_MAX]);
            if (parts[OVERSHOOT] != parts[OVERSHOOT] || parts[OVERSHOOT] > sum[OVERSHOOT])
                memcpy(sum + OVERSHOOT, parts + OVERSHOOT, (COLUMNS - OVERSHOOT) * sizeof(double));
        }
    }
}

/* out: [count], whether all gradients of a tensor are finite, and their squares. */
void optim_finite(const Tensor *tensors, int64_t count, const Settings *s, uint8_t *out, int64_t threads) {
    (void)s;
    for (int64_t t = 0; t < count; t++) {
        const Tensor *tensor = &tensors[t];
        const int64_t n = chunks(tensor);
        int finite = 1;
#pragma omp parallel num_threads(threads) if (n > 1) reduction(&& : finite)
        {
            const Part mine = part_of(n);
            for (int64_t c = mine.begin; c < mine.end && finite; c++)
                finite = tensor->is_double ? chunk_finite_double(tensor, c, width(tensor, c))
                                           : chunk_finite_float(tensor, c, width(tensor, c));
        }
        out[t] = finite;
    }
}

/* Last tensor first: what the reduction read last may still be in cache. sigma: [count], or null for 1. lr:
 * where to read it. ok: null, or where to read whether to step at all. parts: null, or room for [chunks of the largest
 * tensor, SIZES]; out is then [count, SIZES], how far every tensor moved. */
void optim_step(const Tensor *tensors, int64_t count, const Settings *s, const double *sigma, const double *lr,
                const uint8_t *ok, double *parts, double *out, int64_t threads) {
    if (parts) memset(out, 0, count * SIZES * sizeof(double));
    if (ok && !*ok) return;
    for (int64_t t = count - 1; t >= 0; t--) {
        const Tensor *tensor = &tensors[t];
        const double factor = sigma ? sigma[t] : 1;
        const Factors factors = {
            .keep = 1 - *lr * s->shrink,
            .rate = s->clips_gradient ? *lr : *lr * factor,
            .seen = s->clips_gradient ? factor : 1,
            .fed = s->feeds_clipped ? factor : 1,
        };
        const int64_t n = chunks(tensor);
        if (parts) memset(parts, 0, n * SIZES * sizeof(double));
#pragma omp parallel num_threads(threads) if (n > 1)
        {
            const Part mine = part_of(n);
            for (int64_t c = mine.begin; c < mine.end; c++) {
                double *part = parts ? parts + c * SIZES : 0;
                if (tensor->moment && tensor->is_double)
                    adam_step_chunk_double(tensor, c, width(tensor, c), s, &factors, part);
                else if (tensor->moment)
                    adam_step_chunk_float(tensor, c, width(tensor, c), s, &factors, part);
                else if (tensor->is_double)
                    step_chunk_double(tensor, c, width(tensor, c), s, &factors, part);
                else
                    step_chunk_float(tensor, c, width(tensor, c), s, &factors, part);
            }
        }
        if (tensor->count) *tensor->count += 1;
        for (int64_t c = 0; parts && c < n; c++) {
            double *size = out + t * SIZES;
            size[MOVED_SQ] += parts[c * SIZES + MOVED_SQ];
            size[MOVED_MAX] = larger(size[MOVED_MAX], parts[c * SIZES + MOVED_MAX]);
        }
    }
}

/* The largest term of the bound at the coordinate that limits sigma. Of equal ones the first. */
static int largest_term(const double *at, const Settings *s) {
    const double relative = s->bound_rel * fabs(at[WEIGHT]);
    const int term = s->bound_abs > relative ? ABSOLUTE : RELATIVE;
    if (!s->bound_acc) return term;
    const double scale = 1 / root_double(at[TOTAL], at[GRAD], s->eps, s->delayed, s->inside);
    return s->bound_acc * scale > (term ? s->bound_abs : relative) ? ACCUMULATOR : term;
}

/* The flat index in the whole parameter. */
static double place_of(const Tensor *tensor, int64_t index) {
    if (!tensor->rows) return index;
    return tensor->rows[index / tensor->width] * tensor->width + index % tensor->width;
}

/* After a step, writes the row of each tensor as `explain` and `record` of stats.py do, with the same rounding. columns:
 * of optim_reduce, or null where no coordinate limits sigma; sizes: of optim_step; the rest as there. */
void optim_record(const Tensor *tensors, int64_t count, const Settings *s, const double *sigma, const double *lr,
                  const uint8_t *ok, const double *columns, const double *sizes, double *const *rows, int64_t threads) {
    (void)threads;
    if (ok && !*ok) return;
    for (int64_t t = 0; t < count; t++) {
        double *row = rows[t];
        const double *at = columns ? columns + t * COLUMNS : 0, *size = sizes + t * SIZES, factor = sigma ? sigma[t] : 1;
        const int limited = at && factor < 1 && at[OVERSHOOT] == at[OVERSHOOT];
        row[SIGMA] = factor;
        if (*lr != 0) {
            /* Not fused into one rounding, which torch does not do either. */
            const volatile double kept = row[SIGMA_MEAN] * DECAY, added = factor * (1 - DECAY);
            row[SIGMA_MEAN] = kept + added;
            if (factor != factor || factor < row[SIGMA_MIN]) row[SIGMA_MIN] = factor;
            row[STEPS] += 1;
            row[CLIPPED] += factor < 1;
        }
        row[STEP_MAX] = size[MOVED_MAX];
        row[STEP_NORM] = sqrt(size[MOVED_SQ]);
        row[COORDINATE] = limited ? place_of(&tensors[t], at[INDEX]) : -1;
        row[TERM] = limited ? largest_term(at, s) : -1;
        row[STILL] = limited ? at[WEIGHT] == 0 : -1;
    }
}
