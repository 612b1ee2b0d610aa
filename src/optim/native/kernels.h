/* The two passes over one chunk of a tensor, for one floating-point type: included with REAL float and with double.
 *
 * A coordinate's direction, as in updates/adagrad.py:
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

/* One number of 32 lanes in few steps that wait for one another: halving over and over takes twice as long. */
#define BEST_LANE(BEST, lanes)                                                                                    \
    for (int k = 0; k < 8; k++) eight[k] = BEST(BEST(lanes[k], lanes[k + 8]), BEST(lanes[k + 16], lanes[k + 24])); \
    for (int k = 0; k < 2; k++)                                                                                   \
        eight[k] = BEST(BEST(eight[k], eight[k + 2]), BEST(eight[k + 4], eight[k + 6]));
#define LESS(a, b) ((a) < (b) ? (a) : (b))
#define MORE(a, b) ((a) > (b) ? (a) : (b))

INLINE REAL NAME(smallest_lane)(const REAL *lanes) {
    REAL eight[8];
    BEST_LANE(LESS, lanes)
    return LESS(eight[0], eight[1]);
}

INLINE WORD NAME(largest_lane)(const WORD *lanes) {
    WORD eight[8];
    BEST_LANE(MORE, lanes)
    return MORE(eight[0], eight[1]);
}
#undef BEST_LANE
#undef LESS
#undef MORE

INLINE REAL NAME(smallest)(const REAL *values, int64_t n) {
    REAL least[LANES];
    for (int k = 0; k < LANES; k++) least[k] = INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int k = 0; k < LANES; k++) least[k] = values[i + k] < least[k] ? values[i + k] : least[k];
    for (int k = 0; i + k < n; k++) least[k] = values[i + k] < least[k] ? values[i + k] : least[k];
    return NAME(smallest_lane)(least);
}

/* out: the smallest value of every PIECE; see step. */
static void NAME(minima)(const REAL *values, int64_t n, REAL *out) {
    for (int64_t i = 0; i < n; i += PIECE) out[i / PIECE] = NAME(smallest)(values + i, n - i < PIECE ? n - i : PIECE);
}

/* From WAYS places of the chunk at once: one core reads several streams faster than one.
 * rootless: r^2 = g'^2 / G', where eps vanishes beside the root; square roots would take as long as reading does. */
INLINE void NAME(norms)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                        const Settings *s, double *out, int delayed, int inside, int weights, int updates,
                        int rootless) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    REAL grad_sq[LANES] = {0}, weight_sq[LANES] = {0}, update_sq[LANES] = {0}, largest[LANES] = {0};
#define AT(k)                                                                                \
    {                                                                                        \
        const REAL wi = weights ? w[i + k] : (REAL)0, gi = sign * g[i + k] + decay * wi;     \
        grad_sq[k] += gi * gi;                                                               \
        if (weights) weight_sq[k] += wi * wi;                                                \
        if (updates) {                                                                       \
            const REAL base = delayed ? total[i + k] : total[i + k] + gi * gi;               \
            const REAL size = rootless ? 0 : gi / NAME(root)(total[i + k], gi, eps, delayed, inside); \
            const REAL square = rootless ? gi * gi / base : size * size;                     \
            update_sq[k] += square;                                                          \
            if (!rootless) largest[k] = square > largest[k] ? square : largest[k];           \
        }                                                                                    \
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
    for (int k = 0; k < LANES; k++) {
        out[GRAD_SQ] += grad_sq[k];
        out[WEIGHT_SQ] += weight_sq[k];
        out[UPDATE_SQ] += update_sq[k];
        const double size = sqrt((double)largest[k]);
        if (size > out[UPDATE_MAX]) out[UPDATE_MAX] = size;
    }
    if (out[UPDATE_SQ] != out[UPDATE_SQ]) out[UPDATE_MAX] = NAN;
}

/* A block for the search of the maximum is n coordinates at each of `ways` places, `apart` from one another; n is a
 * multiple of LANES but where ways is 1. */

/* max |g'| of a block; NaN becomes infinity, which no limit lets through. Read as integers, magnitudes keep their order
 * and NaN comes after infinity: half the operations, and none that waits for the one before. */
INLINE REAL NAME(largest_gradient)(const REAL *restrict g, int ways, int64_t apart, int n) {
    typedef WORD __attribute__((may_alias)) Bits;
    const Bits *bits = (const Bits *)g;
    WORD largest[LANES] = {0};
#define AT(at, k)                                    \
    {                                                \
        const WORD size = bits[(at) + k] & MAGNITUDE; \
        largest[k] = size > largest[k] ? size : largest[k]; \
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int way = 0; way < ways; way++)
            for (int k = 0; k < LANES; k++) AT(way * apart + i, k)
    for (int k = 0; i + k < n; k++) AT(i, k)
#undef AT
    const WORD most = NAME(largest_lane)(largest);
    REAL result;
    memcpy(&result, &most, sizeof result);
    return result != result ? (REAL)INFINITY : result;
}

/* Whether any coordinate of a block may overshoot by `worst` or more: the comparison of squares, without root or
 * division. The margin keeps the rounding of the dozen operations on the safe side. NaN compares as "may".
 * Not weights: as if every weight were 0, whose bound is the least; only without weight decay. */
INLINE int NAME(may_exceed)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int ways,
                            int64_t apart, int n, const Settings *s, REAL worst, int delayed, int weights) {
    const REAL sign = s->sign, decay = s->decay, relative = s->lambda_rel, absolute = s->lambda_abs;
    const REAL limit = worst * worst * (1 - 16 * EPSILON);
    WORD hit[LANES] = {0};
#define AT(at, k)                                                                                \
    {                                                                                            \
        const REAL wi = weights ? w[(at) + k] : (REAL)0, gi = sign * g[(at) + k] + decay * wi;   \
        const REAL bound = relative * FABS(wi) + absolute;                                       \
        const REAL square = gi * gi, base = delayed ? total[(at) + k] : total[(at) + k] + square; \
        hit[k] |= !(square < limit * (bound * bound * base));                                    \
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int way = 0; way < ways; way++)
            for (int k = 0; k < LANES; k++) AT(way * apart + i, k)
    for (int k = 0; i + k < n; k++) AT(i, k)
#undef AT
    WORD any = 0;
    for (int k = 0; k < LANES; k++) any |= hit[k];
    return any != 0;
}

/* max |r| / bound of a block, exactly; NaN where a gradient is not finite. */
INLINE REAL NAME(block_overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int ways,
                                  int64_t apart, int n, const Settings *s, int delayed, int inside) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    const REAL relative = s->lambda_rel, absolute = s->lambda_abs, accumulator = s->lambda_acc;
    REAL largest[LANES] = {0}, poison[LANES] = {0};
#define AT(at, k)                                                                                        \
    {                                                                                                    \
        const REAL wi = w[(at) + k], gi = sign * g[(at) + k] + decay * wi;                               \
        const REAL bound = relative * FABS(wi) + absolute;                                               \
        const REAL base = NAME(root)(total[(at) + k], gi, eps, delayed, inside);                         \
        /* |r| / (bound + accumulator / root) with one division; 0 / 0 fails every comparison. */        \
        const REAL over = FABS(gi) / (bound * base + accumulator);                                       \
        largest[k] = over > largest[k] ? over : largest[k];                                              \
        poison[k] += gi - gi;                                                                            \
    }
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int way = 0; way < ways; way++)
            for (int k = 0; k < LANES; k++) AT(way * apart + i, k)
    for (int k = 0; i + k < n; k++) AT(i, k)
#undef AT
    REAL result = 0, nan = 0;
    for (int k = 0; k < LANES; k++) {
        result = largest[k] > result ? largest[k] : result;
        nan += poison[k];
    }
    return result + nan;
}

/* Whether gradients of at most `top` cannot overshoot by `worst`, since G >= floor and bound >= lambda_abs. */
INLINE int NAME(within)(double top, REAL floor, const Settings *s, REAL worst, int delayed) {
    const double root = sqrt(delayed ? (double)floor : floor + top * top);
    return top * 1.0001 < worst * s->lambda_abs * root;
}

/* max |g'| of a chunk, as largest_gradient: infinity where one is not finite. */
INLINE REAL NAME(largest_of_chunk)(const REAL *restrict g, int64_t n) {
    const int64_t apart = n / BLOCK * PIECE, rest = WAYS * apart;
    const REAL most = NAME(largest_gradient)(g, WAYS, apart, (int)apart);
    const REAL last = NAME(largest_gradient)(g + rest, 1, 0, (int)(n - rest));
    return most > last ? most : last;
}

/* Whether the gradients alone say that nothing in the chunk overshoots by `worst`: one look at as little memory as can
 * be, which is all that a chunk far from clipping needs. */
INLINE int NAME(chunk_within)(const REAL *restrict g, int64_t n, const Settings *s, const REAL *floors, REAL worst,
                              int delayed) {
    const REAL floor = NAME(smallest)(floors, (n + PIECE - 1) / PIECE);
    return NAME(within)(NAME(largest_of_chunk)(g, n), floor, s, worst, delayed);
}

/* The chunk's maximum overshoot where it raises `worst`, else 0. What reads least settles most blocks: first the
 * gradients alone, then those and G. A question that did not settle several of its kind in a row is asked only now and
 * then. As norms does, a block is read from WAYS places at once; what is left over, from one. */
INLINE REAL NAME(overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                            const Settings *s, const REAL *floors, REAL *worst, int delayed, int inside) {
    const int64_t apart = n / BLOCK * PIECE;
    REAL raised = 0;
    int grads = 0, totals = 0; /* blocks in a row that were not settled by either */
#define BLOCK_AT(i, ways, width)                                                                             \
    {                                                                                                        \
        const int again = s->decay == 0 && (i) % (PAUSE * PIECE) == 0;                                       \
        if (again || (s->decay == 0 && grads < PATIENCE)) {                                                  \
            const double top = NAME(largest_gradient)(g + (i), ways, apart, width);                          \
            REAL floor = floors ? (REAL)INFINITY : 0;                                                        \
            for (int64_t at = (i) / PIECE; floors && at <= ((i) + width - 1) / PIECE; at++)                  \
                for (int way = 0; way < ways; way++) {                                                       \
                    const REAL least = floors[at + way * (apart / PIECE)];                                   \
                    floor = least < floor ? least : floor;                                                   \
                }                                                                                            \
            if (NAME(within)(top, floor, s, *worst, delayed)) {                                              \
                grads = 0;                                                                                   \
                continue;                                                                                    \
            }                                                                                                \
            grads++;                                                                                         \
        }                                                                                                    \
        if (again || (s->decay == 0 && totals < PATIENCE)) {                                                 \
            if (!NAME(may_exceed)(w + (i), g + (i), total + (i), ways, apart, width, s, *worst, delayed, 0)) { \
                totals = 0;                                                                                  \
                continue;                                                                                    \
            }                                                                                                \
            totals++;                                                                                        \
        }                                                                                                    \
        if (!NAME(may_exceed)(w + (i), g + (i), total + (i), ways, apart, width, s, *worst, delayed, 1)) continue; \
        const REAL over =                                                                                    \
            NAME(block_overshoot)(w + (i), g + (i), total + (i), ways, apart, width, s, delayed, inside);    \
        if (over != over) return over;                                                                       \
        if (over > *worst) raised = *worst = over;                                                           \
    }
    for (int64_t i = 0; i < apart; i += PIECE) BLOCK_AT(i, WAYS, PIECE)
    for (int64_t i = WAYS * apart; i < n; i += BLOCK) BLOCK_AT(i, 1, (int)(n - i))
#undef BLOCK_AT
    return raised;
}

/* size: null, or [MOVED_SQ, MOVED_MAX] of the step taken: the memory is read anyway, so measuring here is free.
 * floors: null, or where the smallest new G of every PIECE goes, for the same reason. */
INLINE void NAME(step)(REAL *restrict w, const REAL *restrict g, REAL *restrict total, int64_t n, const Settings *s,
                       const Factors *f, double *size, REAL *restrict floors, int delayed, int inside, int measure,
                       int keep_floors) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    const REAL keep = f->keep, rate = f->rate, fed = f->fed, seen = f->seen;
    REAL square[LANES] = {0}, largest[LANES] = {0};
#define AT(k)                                                                                                   \
    {                                                                                                           \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi, used = seen * gi, feed = fed * gi;         \
        const REAL before = total[i + k], after = before + feed * feed;                                         \
        /* rate * used first: the order of torch's fused Adagrad, with which this then agrees to the bit. */    \
        const REAL move = rate * used / NAME(root)(before, used, eps, delayed, inside);                         \
        w[i + k] = keep * wi - move;                                                                            \
        total[i + k] = after;                                                                                   \
        if (keep_floors) least[k] = after < least[k] ? after : least[k];                                        \
        if (measure) {                                                                                          \
            square[k] += move * move;                                                                           \
            largest[k] = FABS(move) > largest[k] ? FABS(move) : largest[k];                                     \
        }                                                                                                       \
    }
    for (int64_t begin = 0; begin < n; begin += PIECE) {
        const int64_t end = n - begin < PIECE ? n : begin + PIECE;
        REAL least[LANES];
        for (int k = 0; k < LANES; k++) least[k] = INFINITY;
        int64_t i = begin;
        for (; i + LANES <= end; i += LANES) {
            for (int k = 0; k < LANES; k++) AT(k)
        }
        for (int k = 0; i + k < end; k++) AT(k)
        if (keep_floors) floors[begin / PIECE] = NAME(smallest_lane)(least);
    }
#undef AT
    if (!measure) return;
    for (int k = 0; k < LANES; k++) {
        size[MOVED_SQ] += square[k];
        if (largest[k] > size[MOVED_MAX]) size[MOVED_MAX] = largest[k];
    }
    if (size[MOVED_SQ] != size[MOVED_SQ]) size[MOVED_MAX] = NAN;
}

#define DISPATCH(CALL)                                         \
    if (s->delayed) {                                          \
        if (s->inside) CALL(1, 1) else CALL(1, 0)              \
    } else {                                                   \
        if (s->inside) CALL(0, 1) else CALL(0, 0)              \
    }

static void NAME(reduce_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, Search *search,
                               double *out) {
    const int64_t begin = chunk * CHUNK;
    REAL *floors = t->floors ? (REAL *)t->floors + begin / PIECE : 0;
    const REAL *w = (const REAL *)t->weight + begin, *g = (const REAL *)t->grad + begin;
    const REAL *total = (const REAL *)t->total + begin;
    /* Somebody has made G smaller, in a way that does not count as a version (`.data`). */
    if (floors && total[0] < floors[0]) NAME(minima)(total, n, floors);
    REAL worst = search->worst;
    /* Where eps is below the rounding of the smallest root; so is the floor then above 0. */
    const double floor = s->updates && floors ? NAME(smallest)(floors, (n + PIECE - 1) / PIECE) : 0;
    const int rootless = s->updates && !s->largest && s->eps < (s->inside ? floor : sqrt(floor)) * EPSILON / 4;
    int far = 0; /* from clipping */
    if (s->overshoot && s->decay == 0 && floors && (search->unsettled < PATIENCE || chunk % PAUSE == 0)) {
        far = NAME(chunk_within)(g, n, s, floors, worst, s->delayed != 0);
        search->unsettled = far ? 0 : search->unsettled + 1;
    }
    if (floors) t->stale[chunk] = s->overshoot ? !far : s->updates && !rootless;
#define CALL(d, i)                                                                               \
    {                                                                                            \
        if (rootless) NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 1);                        \
        const int again = out[UPDATE_SQ] != out[UPDATE_SQ]; /* NaN, or a square that overflowed */ \
        if (again) memset(out, 0, COLUMNS * sizeof(double));                                     \
        if (rootless && !again) {                                                                \
        } else if (s->updates) NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 0);                 \
        else if (s->weights || s->decay != 0) NAME(norms)(w, g, total, n, s, out, d, i, 1, 0, 0); \
        else if (s->grads) NAME(norms)(w, g, total, n, s, out, d, i, 0, 0, 0);                   \
        if (s->overshoot && !far) out[OVERSHOOT] = NAME(overshoot)(w, g, total, n, s, floors, &worst, d, i); \
    }
    DISPATCH(CALL)
#undef CALL
    search->worst = worst;
}

static int NAME(chunk_finite)(const Tensor *t, int64_t chunk, int64_t n) {
    return NAME(largest_of_chunk)((const REAL *)t->grad + chunk * CHUNK, n) < INFINITY;
}

static void NAME(step_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, const Factors *f,
                             double *size) {
    const int64_t begin = chunk * CHUNK;
    REAL *w = (REAL *)t->weight + begin, *total = (REAL *)t->total + begin;
    REAL *floors = t->floors && t->stale[chunk] ? (REAL *)t->floors + begin / PIECE : 0;
    const REAL *g = (const REAL *)t->grad + begin;
#define CALL(d, i)                                                                \
    {                                                                             \
        if (size && floors) NAME(step)(w, g, total, n, s, f, size, floors, d, i, 1, 1); \
        else if (size) NAME(step)(w, g, total, n, s, f, size, 0, d, i, 1, 0);     \
        else if (floors) NAME(step)(w, g, total, n, s, f, 0, floors, d, i, 0, 1); \
        else NAME(step)(w, g, total, n, s, f, 0, 0, d, i, 0, 0);                  \
    }
    DISPATCH(CALL)
#undef CALL
}

#undef DISPATCH
