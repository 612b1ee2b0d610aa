/* The two passes over one chunk of a tensor, for one floating-point type: included with REAL float and with double.
 *
 * A coordinate's direction, as in updates.py:
 *     g' = sign * g + decay * w
 *     G' = G + g'^2                   (delayed: G)
 *     r  = g' / (sqrt(G') + eps)      (inside: g' / sqrt(G' + eps))
 *
 * `delayed`, `inside` and the like are constants where these functions are inlined. Loops over LANES write to separate
 * accumulators, so that the compiler may use vectors without reordering a sum.
 */

INLINE REAL NAME(root)(REAL total, REAL grad, REAL eps, int delayed, int inside) {
    const REAL base = delayed ? total : total + grad * grad;
    return inside ? SQRT(base + eps) : SQRT(base) + eps;
}

/* Sums of squares, and the largest r^2. Reads WAYS places of the chunk at once: one core reads several streams faster
 * than one. rootless: r^2 = g'^2 / G', which is exact to rounding where eps vanishes beside the root. Returns the
 * smallest G if rootless. */
INLINE REAL NAME(norms)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                        const Settings *s, double *out, int delayed, int inside, int weights, int updates,
                        int rootless) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    REAL grad_sq[LANES] = {0}, weight_sq[LANES] = {0}, update_sq[LANES] = {0}, largest[LANES] = {0}, least[LANES];
    for (int k = 0; k < LANES; k++) least[k] = INFINITY;
#define AT(k)                                                                                         \
    {                                                                                                 \
        const REAL wi = weights ? w[i + k] : (REAL)0, gi = sign * g[i + k] + decay * wi;              \
        grad_sq[k] += gi * gi;                                                                        \
        if (weights) weight_sq[k] += wi * wi;                                                         \
        if (updates) {                                                                                \
            const REAL base = delayed ? total[i + k] : total[i + k] + gi * gi;                        \
            const REAL size = rootless ? 0 : gi / NAME(root)(total[i + k], gi, eps, delayed, inside); \
            const REAL square = rootless ? gi * gi / base : size * size;                              \
            update_sq[k] += square;                                                                   \
            if (!rootless) largest[k] = square > largest[k] ? square : largest[k];                    \
            if (rootless) least[k] = total[i + k] < least[k] ? total[i + k] : least[k];               \
        }                                                                                             \
    }
    const int64_t part = n / WAYS / LANES * LANES;
    int64_t i = 0;
    for (int64_t j = 0; j < part; j += LANES)
        for (int way = 0; way < WAYS; way++) {
            i = way * part + j;
            for (int k = 0; k < LANES; k++) AT(k)
        }
    for (i = WAYS * part; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    REAL smallest = INFINITY;
    for (int k = 0; k < LANES; k++) {
        out[GRAD_SQ] += grad_sq[k];
        out[WEIGHT_SQ] += weight_sq[k];
        out[UPDATE_SQ] += update_sq[k];
        const double size = sqrt((double)largest[k]);
        if (size > out[UPDATE_MAX]) out[UPDATE_MAX] = size;
        if (least[k] < smallest) smallest = least[k];
    }
    if (out[UPDATE_SQ] != out[UPDATE_SQ]) out[UPDATE_MAX] = NAN;
    return smallest;
}

/* Whether a sum of squares lost nothing to an overflow or an underflow. Says no to 0, which may be one. */
INLINE int NAME(in_range)(double sum) { return sum >= SMALLEST / EPSILON && sum <= LARGEST; }

/* The same numbers as `norms`, accumulated in double: for squares that leave the range of REAL. */
static void NAME(wide_norms)(const REAL *w, const REAL *g, const REAL *total, int64_t n, const Settings *s,
                             double *out) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    memset(out, 0, COLUMNS * sizeof(double));
    for (int64_t i = 0; i < n; i++) {
        const REAL wi = s->weights || s->decay != 0 || s->updates ? w[i] : (REAL)0, gi = sign * g[i] + decay * wi;
        out[GRAD_SQ] += (double)gi * gi;
        out[WEIGHT_SQ] += (double)wi * wi;
        if (!s->updates) continue;
        const double size = fabs((double)(gi / NAME(root)(total[i], gi, eps, s->delayed, s->inside)));
        out[UPDATE_SQ] += size * size;
        if (size > out[UPDATE_MAX]) out[UPDATE_MAX] = size;
    }
    if (out[UPDATE_SQ] != out[UPDATE_SQ]) out[UPDATE_MAX] = NAN;
}

/* The largest g^2 / G that cannot overshoot by `worst` even where the weight is 0, whose bound is the smallest:
 * g^2 < L (G + g^2), solved for G. The margin keeps the rounding here and in the exact computation on the safe side. */
INLINE REAL NAME(allowed)(const Settings *s, double worst, int delayed) {
    const double square = worst * worst * s->bound_abs * s->bound_abs * (1 - 16 * EPSILON);
    const double limit = delayed ? square : square < 1 ? square / (1 - square) : LARGEST;
    return limit < LARGEST ? limit : LARGEST; /* an infinite one would allow everything, also where G is 0 */
}

/* Whether g^2 / G is allowed at every one of n coordinates. Where it is, the weights need not be read. NaN, and 0 < 0,
 * say no. Only without weight decay. */
INLINE int NAME(totals_allow)(const REAL *restrict g, const REAL *restrict total, int64_t n, REAL allowed) {
    REAL beyond[LANES] = {0};
#define AT(k)                                                                                  \
    {                                                                                          \
        /* kept finite, because g^2 inside a fused multiply-add does not overflow */           \
        const REAL product = allowed * total[i + k], most = product > LARGEST ? LARGEST : product; \
        const REAL by = g[i + k] * g[i + k] + (SMALLEST - most);                               \
        beyond[k] += (REAL)0 > by ? (REAL)0 : by; /* this way round the processor keeps NaN */ \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    REAL sum = 0;
    for (int k = 0; k < LANES; k++) sum += beyond[k];
    return sum == 0;
}

/* Whether any of n coordinates may overshoot by `worst` or more: the comparison of squares, without root or division.
 * The margin keeps the rounding of the dozen operations on the safe side. "May" is also the answer for NaN, for a
 * (worst * bound)^2 outside the range of normal numbers, and where SMALLEST, the error of an underflow, makes it. */
INLINE int NAME(may_exceed)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                            const Settings *s, REAL worst, int delayed) {
    const REAL sign = s->sign, decay = s->decay;
    const REAL limit = worst * (1 - 8 * EPSILON), relative = limit * (REAL)s->bound_rel;
    const REAL absolute = limit * (REAL)s->bound_abs;
    WORD hit[LANES] = {0};
#define AT(k)                                                                               \
    {                                                                                       \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi;                        \
        const REAL bound = relative * FABS(wi) + absolute, limit_sq = bound * bound;        \
        const REAL square = gi * gi, base = delayed ? total[i + k] : total[i + k] + square; \
        hit[k] |= !(square + SMALLEST < limit_sq * base);                                   \
        hit[k] |= !(limit_sq >= SMALLEST) | !(limit_sq <= LARGEST);                         \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    WORD any = 0;
    for (int k = 0; k < LANES; k++) any |= hit[k];
    return any != 0;
}

/* |r| / bound of one coordinate. With one division, |r| / (bound + accumulator / root), where the product of bound and
 * root stays in the range of normal numbers. 0 / 0 fails every comparison. */
INLINE REAL NAME(overshoot_at)(REAL w, REAL gi, REAL total, const Settings *s, int delayed, int inside) {
    const REAL relative = s->bound_rel, absolute = s->bound_abs, accumulator = s->bound_acc, eps = s->eps;
    const REAL bound = relative * FABS(w) + absolute, root = NAME(root)(total, gi, eps, delayed, inside);
    const REAL product = bound * root + accumulator;
    return product >= SMALLEST && product <= LARGEST
               ? FABS(gi) / product
               : FABS(gi) / root / (accumulator == 0 ? bound : bound + accumulator / root);
}

/* max |r| / bound of n coordinates, exactly; NaN where a gradient is not finite. */
INLINE REAL NAME(largest_overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total,
                                    int64_t n, const Settings *s, int delayed, int inside) {
    const REAL sign = s->sign, decay = s->decay;
    REAL largest[LANES] = {0}, poison[LANES] = {0};
#define AT(k)                                                                                   \
    {                                                                                           \
        const REAL gi = sign * g[i + k] + decay * w[i + k];                                     \
        const REAL over = NAME(overshoot_at)(w[i + k], gi, total[i + k], s, delayed, inside);   \
        largest[k] = over > largest[k] ? over : largest[k];                                     \
        poison[k] += gi - gi;                                                                   \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    REAL result = 0, nan = 0;
    for (int k = 0; k < LANES; k++) {
        result = largest[k] > result ? largest[k] : result;
        nan += poison[k];
    }
    return result + nan;
}

/* out: the index of the largest overshoot of a block, and w, g', G there. Reports only: sigma does not depend on it. */
static void NAME(locate)(const REAL *w, const REAL *g, const REAL *total, int64_t begin, int64_t n, const Settings *s,
                         int delayed, int inside, double *out) {
    REAL largest = -1;
    for (int64_t i = begin; i < begin + n; i++) {
        const REAL gi = (REAL)s->sign * g[i] + (REAL)s->decay * w[i];
        const REAL over = NAME(overshoot_at)(w[i], gi, total[i], s, delayed, inside);
        if (!(over > largest)) continue;
        largest = over;
        out[INDEX] = i;
        out[WEIGHT] = w[i];
        out[GRAD] = gi;
        out[TOTAL] = total[i];
    }
}

/* The chunk's maximum overshoot where it raises `worst`, else 0; and where it is. What reads least comes first: g and G
 * alone, then the comparison of squares, then the exact computation where neither rules the block out. */
INLINE void NAME(overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                            const Settings *s, REAL *worst, int delayed, int inside, double *out) {
    int64_t where = -1;
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t size = n - i < BLOCK ? n - i : BLOCK;
        if (s->decay == 0 && NAME(totals_allow)(g + i, total + i, size, NAME(allowed)(s, *worst, delayed))) continue;
        if (!NAME(may_exceed)(w + i, g + i, total + i, size, s, *worst, delayed)) continue;
        const REAL over = NAME(largest_overshoot)(w + i, g + i, total + i, size, s, delayed, inside);
        if (over != over) {
            out[OVERSHOOT] = over;
            return;
        }
        if (over > *worst) {
            out[OVERSHOOT] = *worst = over;
            where = i;
        }
    }
    if (where >= 0) NAME(locate)(w, g, total, where, n - where < BLOCK ? n - where : BLOCK, s, delayed, inside, out);
}

/* size: null, or [MOVED_SQ, MOVED_MAX] of the step taken. The memory is read anyway, so measuring here is free. */
INLINE void NAME(step)(REAL *restrict w, const REAL *restrict g, REAL *restrict total, int64_t n, const Settings *s,
                       const Factors *f, double *size, int delayed, int inside, int measure) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    const REAL keep = f->keep, rate = f->rate, fed = f->fed, seen = f->seen;
    REAL square[LANES] = {0}, largest[LANES] = {0};
#define AT(k)                                                                                                \
    {                                                                                                        \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi, used = seen * gi, feed = fed * gi;      \
        const REAL before = total[i + k];                                                                    \
        /* rate * used first: the order of torch's fused Adagrad, with which this then agrees to the bit. */ \
        const REAL move = rate * used / NAME(root)(before, used, eps, delayed, inside);                      \
        w[i + k] = keep * wi - move;                                                                         \
        total[i + k] = before + feed * feed;                                                                 \
        if (measure) {                                                                                       \
            square[k] += move * move;                                                                        \
            largest[k] = FABS(move) > largest[k] ? FABS(move) : largest[k];                                  \
        }                                                                                                    \
    }
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) AT(k)
    for (int k = 0; i + k < n; k++) AT(k)
#undef AT
    if (!measure) return;
    for (int k = 0; k < LANES; k++) {
        size[MOVED_SQ] += square[k];
        if (largest[k] > size[MOVED_MAX]) size[MOVED_MAX] = largest[k];
    }
    if (size[MOVED_SQ] != size[MOVED_SQ]) size[MOVED_MAX] = NAN;
}

#define DISPATCH(CALL)                            \
    if (s->delayed) {                             \
        if (s->inside) CALL(1, 1) else CALL(1, 0) \
    } else {                                      \
        if (s->inside) CALL(0, 1) else CALL(0, 0) \
    }

static void NAME(reduce_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, double *search,
                               double *out) {
    const int64_t begin = chunk * CHUNK;
    const REAL *w = (const REAL *)t->weight + begin, *g = (const REAL *)t->grad + begin;
    const REAL *total = (const REAL *)t->total + begin;
    REAL worst = *search < LARGEST ? *search : LARGEST;
#define CALL(d, i)                                                                                                \
    {                                                                                                             \
        int done = 0;                                                                                             \
        if (s->updates && !s->largest && t->size >= CHUNK) {                                                      \
            const double least = NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 1);                              \
            /* eps below the rounding of the smallest root; and no NaN or square that overflowed */               \
            done = s->eps < (s->inside ? least : sqrt(least)) * EPSILON / 4 && out[UPDATE_SQ] == out[UPDATE_SQ];  \
            if (!done) memset(out, 0, COLUMNS * sizeof(double));                                                  \
        }                                                                                                         \
        if (done) {                                                                                               \
        } else if (s->updates) NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 0);                                \
        else if (s->weights || (s->grads && s->decay != 0)) NAME(norms)(w, g, total, n, s, out, d, i, 1, 0, 0);   \
        else if (s->grads) NAME(norms)(w, g, total, n, s, out, d, i, 0, 0, 0);                                    \
        if (sizeof(REAL) < sizeof(double) &&                                                                      \
            ((s->grads && !NAME(in_range)(out[GRAD_SQ])) || (s->weights && !NAME(in_range)(out[WEIGHT_SQ])) ||    \
             (s->updates && !NAME(in_range)(out[UPDATE_SQ]))))                                                    \
            NAME(wide_norms)(w, g, total, n, s, out);                                                             \
        if (s->overshoot) NAME(overshoot)(w, g, total, n, s, &worst, d, i, out);                                  \
    }
    DISPATCH(CALL)
#undef CALL
    out[INDEX] += begin;
    *search = worst;
}

/* Whether all gradients and their squares are finite: x * 0 is 0 for a finite x and NaN otherwise. */
static int NAME(chunk_finite)(const Tensor *t, int64_t chunk, int64_t n) {
    const REAL *g = (const REAL *)t->grad + chunk * CHUNK;
    REAL sum[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) sum[k] += g[i + k] * g[i + k] * 0;
    for (int k = 0; i + k < n; k++) sum[k] += g[i + k] * g[i + k] * 0;
    REAL all = 0;
    for (int k = 0; k < LANES; k++) all += sum[k];
    return all == 0;
}

static void NAME(step_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, const Factors *f,
                             double *size) {
    const int64_t begin = chunk * CHUNK;
    REAL *w = (REAL *)t->weight + begin, *total = (REAL *)t->total + begin;
    const REAL *g = (const REAL *)t->grad + begin;
#define CALL(d, i)                                           \
    {                                                        \
        if (size) NAME(step)(w, g, total, n, s, f, size, d, i, 1); \
        else NAME(step)(w, g, total, n, s, f, 0, d, i, 0);   \
    }
    DISPATCH(CALL)
#undef CALL
}

#undef DISPATCH
