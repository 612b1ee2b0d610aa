/* Adam's two passes over one chunk of a tensor, for one floating-point type: included as kernels.h is.
 *
 * A coordinate's direction, as in updates.py, with k1 = 1 / (1 - beta1^t) and k2 = 1 / (1 - beta2^t):
 *     g' = sign * g + decay * w
 *     m' = beta1 * m + (1 - beta1) * g'
 *     v' = beta2 * v + (1 - beta2) * g'^2
 *     r  = k1 * m' / (sqrt(k2 * v') + eps) + joined * w
 */

typedef struct {
    REAL *w, *m, *v;
    const REAL *g;
    REAL sign, decay, joined, beta1, rest1, beta2, rest2, k1, k2, eps;
} NAME(Adam);

static NAME(Adam) NAME(adam_at)(const Tensor *t, int64_t begin, const Settings *s) {
    const double step = *t->count + 1.0;
    return (NAME(Adam)){
        .w = (REAL *)t->weight + begin,
        .m = (REAL *)t->moment + begin,
        .v = (REAL *)t->total + begin,
        .g = (const REAL *)t->grad + begin,
        .sign = s->sign,
        .decay = s->decay,
        .joined = s->joined,
        .beta1 = s->beta1,
        .rest1 = 1 - s->beta1,
        .beta2 = s->beta2,
        .rest2 = 1 - s->beta2,
        .k1 = 1 / (1 - pow(s->beta1, step)),
        .k2 = 1 / (1 - pow(s->beta2, step)),
        .eps = s->eps,
    };
}

/* g', m', v', and the numerator of r, at coordinate j of restrict pointers w, g, m, v. ADAM: its denominator, too. */
#define ADAM_MOMENTS(j)                                                                              \
    const REAL wj = w[j], gj = a->sign * g[j] + a->decay * wj, mj = a->beta1 * m[j] + a->rest1 * gj; \
    const REAL vj = a->beta2 * v[j] + a->rest2 * gj * gj, top = a->k1 * mj
#define ADAM(j)      \
    ADAM_MOMENTS(j); \
    const REAL root = SQRT(a->k2 * vj) + a->eps
#define ADAM_POINTERS                                     \
    const REAL *restrict w = a->w + i0, *restrict g = a->g + i0; \
    const REAL *restrict m = a->m + i0, *restrict v = a->v + i0

/* Sums of squares, and the largest |r|. */
INLINE void NAME(adam_norms)(const NAME(Adam) *a, int64_t n, double *out) {
    const int64_t i0 = 0;
    ADAM_POINTERS;
    REAL grad_sq[LANES] = {0}, weight_sq[LANES] = {0}, update_sq[LANES] = {0}, largest[LANES] = {0};
#define AT(k)                                                      \
    {                                                              \
        ADAM(i + k);                                               \
        const REAL r = top / root + a->joined * wj;                \
        grad_sq[k] += gj * gj;                                     \
        weight_sq[k] += wj * wj;                                   \
        update_sq[k] += r * r;                                     \
        largest[k] = FABS(r) > largest[k] ? FABS(r) : largest[k];  \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    for (int k = 0; k < LANES; k++) {
        out[GRAD_SQ] += grad_sq[k];
        out[WEIGHT_SQ] += weight_sq[k];
        out[UPDATE_SQ] += update_sq[k];
        if (largest[k] > out[UPDATE_MAX]) out[UPDATE_MAX] = largest[k];
    }
    if (NAME(in_range)(out[GRAD_SQ]) && NAME(in_range)(out[WEIGHT_SQ]) && NAME(in_range)(out[UPDATE_SQ])) return;
    out[GRAD_SQ] = out[WEIGHT_SQ] = out[UPDATE_SQ] = 0; /* again in double: a square has left the range of REAL */
    for (i = 0; i < n; i++) {
        ADAM(i);
        const double r = top / root + a->joined * wj;
        out[GRAD_SQ] += (double)gj * gj;
        out[WEIGHT_SQ] += (double)wj * wj;
        out[UPDATE_SQ] += r * r;
    }
    if (out[UPDATE_SQ] != out[UPDATE_SQ]) out[UPDATE_MAX] = NAN;
}

/* Whether any of n coordinates may overshoot by `worst` or more: the comparison of squares, without root or division, as
 * may_exceed. (sqrt(x) + eps)^2 is at least x + eps^2. */
INLINE int NAME(adam_may_exceed)(const NAME(Adam) *a, int64_t i0, int64_t n, const Settings *s, REAL worst) {
    ADAM_POINTERS;
    const REAL limit = worst * (1 - 16 * EPSILON), relative = limit * (REAL)s->bound_rel;
    const REAL absolute = limit * (REAL)s->bound_abs, eps_sq = a->eps * a->eps;
    WORD hit[LANES] = {0};
#define AT(k)                                                                                     \
    {                                                                                             \
        ADAM_MOMENTS(i + k);                                                                      \
        const REAL bound = relative * FABS(wj) + absolute, limit_sq = bound * bound;              \
        const REAL base = a->k2 * vj + eps_sq;                                                    \
        hit[k] |= !(top * top + SMALLEST < limit_sq * base) | !(base >= SMALLEST);                \
        hit[k] |= !(limit_sq >= SMALLEST) | !(limit_sq <= LARGEST);                               \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    WORD any = a->joined != 0;
    for (int k = 0; k < LANES; k++) any |= hit[k];
    return any != 0;
}

/* max |r| / bound of n coordinates, exactly, with where it is; NaN where r is. */
static REAL NAME(adam_largest_overshoot)(const NAME(Adam) *a, int64_t i0, int64_t n, const Settings *s, int64_t *where) {
    ADAM_POINTERS;
    const REAL relative = s->bound_rel, absolute = s->bound_abs;
    REAL over[BLOCK], largest = 0;
    for (int64_t i = 0; i < n; i++) {
        ADAM(i);
        const REAL size = FABS(top / root + a->joined * wj);
        over[i] = size == 0 ? 0 : size / (relative * FABS(wj) + absolute);
    }
    for (int64_t i = 0; i < n; i++) {
        if (over[i] != over[i]) return over[i];
        if (over[i] > largest) {
            largest = over[i];
            *where = i0 + i;
        }
    }
    return largest;
}

static void NAME(adam_reduce_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, double *search,
                                    double *out) {
    const NAME(Adam) at = NAME(adam_at)(t, chunk * CHUNK, s), *a = &at;
    REAL worst = *search < LARGEST ? *search : LARGEST;
    if (s->grads || s->weights || s->updates) NAME(adam_norms)(a, n, out);
    int64_t where = -1;
    for (int64_t i = 0; s->overshoot && i < n; i += BLOCK) {
        const int64_t size = n - i < BLOCK ? n - i : BLOCK;
        if (!NAME(adam_may_exceed)(a, i, size, s, worst)) continue;
        int64_t place = i;
        const REAL over = NAME(adam_largest_overshoot)(a, i, size, s, &place);
        if (over > worst || over != over) {
            out[OVERSHOOT] = worst = over;
            where = place;
        }
        if (over != over) return;
    }
    *search = worst;
    if (where < 0) return;
    out[INDEX] = chunk * CHUNK + where;
    out[WEIGHT] = a->w[where];
    out[GRAD] = a->sign * a->g[where] + a->decay * a->w[where];
    out[TOTAL] = a->v[where];
    out[MOMENT] = a->m[where];
}

INLINE void NAME(adam_step)(const NAME(Adam) *a, int64_t n, const Factors *f, double *out, int measure) {
    REAL *restrict w = a->w, *restrict m = a->m, *restrict v = a->v;
    const REAL *restrict g = a->g;
    const REAL keep = f->keep, rate = f->rate;
    REAL square[LANES] = {0}, largest[LANES] = {0};
#define AT(k)                                                               \
    {                                                                       \
        ADAM(i + k);                                                        \
        const REAL move = rate * (top / root + a->joined * wj);             \
        w[i + k] = keep * wj - move;                                        \
        m[i + k] = mj;                                                      \
        v[i + k] = vj;                                                      \
        if (measure) {                                                      \
            square[k] += move * move;                                       \
            largest[k] = FABS(move) > largest[k] ? FABS(move) : largest[k]; \
        }                                                                   \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    for (int k = 0; measure && k < LANES; k++) {
        out[MOVED_SQ] += square[k];
        if (largest[k] > out[MOVED_MAX]) out[MOVED_MAX] = largest[k];
    }
    if (measure && out[MOVED_SQ] != out[MOVED_SQ]) out[MOVED_MAX] = NAN;
}

static void NAME(adam_step_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, const Factors *f,
                                  double *size) {
    const NAME(Adam) at = NAME(adam_at)(t, chunk * CHUNK, s);
    if (size) NAME(adam_step)(&at, n, f, size, 1);
    else NAME(adam_step)(&at, n, f, 0, 0);
}

#undef ADAM
#undef ADAM_MOMENTS
#undef ADAM_POINTERS
