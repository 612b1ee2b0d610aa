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

/* In few steps that wait for one another: halving over and over takes twice as long. */
INLINE REAL NAME(smallest_lane)(const REAL *lanes) {
    REAL eight[8];
#define LESS(a, b) ((a) < (b) ? (a) : (b))
    for (int k = 0; k < 8; k++) eight[k] = LESS(LESS(lanes[k], lanes[k + 8]), LESS(lanes[k + 16], lanes[k + 24]));
    for (int k = 0; k < 2; k++) eight[k] = LESS(LESS(eight[k], eight[k + 2]), LESS(eight[k + 4], eight[k + 6]));
    return LESS(eight[0], eight[1]);
#undef LESS
}

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
    for (int k = 0; k < LANES; k++) {
        out[GRAD_SQ] += grad_sq[k];
        out[WEIGHT_SQ] += weight_sq[k];
        out[UPDATE_SQ] += update_sq[k];
        const double size = sqrt((double)largest[k]);
        if (size > out[UPDATE_MAX]) out[UPDATE_MAX] = size;
    }
    if (out[UPDATE_SQ] != out[UPDATE_SQ]) out[UPDATE_MAX] = NAN;
}

/* max |g'|. Read as integers, magnitudes keep their order, and the compiler may use vectors. NaN comes after infinity,
 * and out as NaN. */
INLINE REAL NAME(largest_gradient)(const REAL *g, int64_t n) {
    typedef WORD __attribute__((may_alias)) Bits;
    const Bits *bits = (const Bits *)g;
    WORD most = 0;
    for (int64_t i = 0; i < n; i++) {
        const WORD size = bits[i] & MAGNITUDE;
        most = size > most ? size : most;
    }
    REAL result;
    memcpy(&result, &most, sizeof result);
    return result;
}

/* out: of WAYS pieces, `apart` from one another, read at once as norms does. Not inlined, and a variable each: of an
 * array of them, the compiler would make one great shuffle. */
static __attribute__((noinline)) void NAME(largest_of_pieces)(const REAL *g, int64_t apart, REAL *out) {
    typedef WORD __attribute__((may_alias)) Bits;
    const Bits *a = (const Bits *)g, *b = a + apart, *c = b + apart, *d = c + apart;
    WORD most_a = 0, most_b = 0, most_c = 0, most_d = 0;
#define AT(way)                                             \
    {                                                       \
        const WORD size = way[i] & MAGNITUDE;               \
        most_##way = size > most_##way ? size : most_##way; \
    }
    for (int i = 0; i < PIECE; i++) {
        AT(a) AT(b) AT(c) AT(d)
    }
#undef AT
    const WORD most[WAYS] = {most_a, most_b, most_c, most_d};
    memcpy(out, most, sizeof most);
}

/* The largest g^2 / G that cannot overshoot by `worst` even where the weight is 0, whose bound is the least:
 * g^2 < L (G + g^2), solved for G. The margin keeps the rounding here and in the exact look on the safe side; it is one
 * of L, since near r = 1 none of g^2 / G would be enough. */
INLINE REAL NAME(allowed)(const Settings *s, double worst, int delayed) {
    const double limit = worst * worst * s->lambda_abs * s->lambda_abs * (1 - 16 * EPSILON);
    return delayed ? limit : limit < 1 ? limit / (1 - limit) : INFINITY;
}

/* open: the pieces of a chunk of which the gradients alone, and lower bounds of G, do not say that g^2 / G is allowed;
 * returns how many. Only without weight decay. NaN, and 0 < 0, say nothing. */
INLINE int NAME(open_pieces)(const REAL *restrict g, int64_t n, const REAL *restrict floors, REAL allowed,
                             int16_t *restrict open) {
    const int64_t apart = n / BLOCK;
    int count = 0;
#define OPEN(p, top)                                   \
    {                                                  \
        const REAL most = top;                         \
        open[count] = (int16_t)(p);                    \
        count += !(most * most < allowed * floors[p]); \
    }
    for (int64_t p = 0; p < apart; p++) {
        REAL tops[WAYS];
        NAME(largest_of_pieces)(g + p * PIECE, apart * PIECE, tops);
        for (int way = 0; way < WAYS; way++) OPEN(p + way * apart, tops[way])
    }
    for (int64_t p = WAYS * apart; p * PIECE < n; p++)
        OPEN(p, NAME(largest_gradient)(g + p * PIECE, n - p * PIECE < PIECE ? n - p * PIECE : PIECE))
#undef OPEN
    return count;
}

/* Whether g^2 / G is allowed at every one of n coordinates: two operations a coordinate. NaN, and 0 < 0, say no. */
INLINE int NAME(totals_allow)(const REAL *restrict g, const REAL *restrict total, int64_t n, REAL allowed) {
    REAL beyond[LANES] = {0};
#define AT(k)                                                                                  \
    {                                                                                          \
        const REAL by = g[i + k] * g[i + k] + (SMALLEST - allowed * total[i + k]);             \
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
 * The margin keeps the rounding of the dozen operations on the safe side. NaN compares as "may". */
INLINE int NAME(may_exceed)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                            const Settings *s, REAL worst, int delayed) {
    const REAL sign = s->sign, decay = s->decay, relative = s->lambda_rel, absolute = s->lambda_abs;
    const REAL limit = worst * worst * (1 - 16 * EPSILON);
    WORD hit[LANES] = {0};
#define AT(k)                                                                               \
    {                                                                                       \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi;                        \
        const REAL bound = relative * FABS(wi) + absolute;                                  \
        const REAL square = gi * gi, base = delayed ? total[i + k] : total[i + k] + square; \
        hit[k] |= !(square < limit * (bound * bound * base));                               \
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

/* max |r| / bound of n coordinates, exactly; NaN where a gradient is not finite. */
INLINE REAL NAME(largest_overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total,
                                    int64_t n, const Settings *s, int delayed, int inside) {
    const REAL sign = s->sign, decay = s->decay, eps = s->eps;
    const REAL relative = s->lambda_rel, absolute = s->lambda_abs, accumulator = s->lambda_acc;
    REAL largest[LANES] = {0}, poison[LANES] = {0};
#define AT(k)                                                                                     \
    {                                                                                             \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi;                              \
        const REAL bound = relative * FABS(wi) + absolute;                                        \
        const REAL base = NAME(root)(total[i + k], gi, eps, delayed, inside);                     \
        /* |r| / (bound + accumulator / root) with one division; 0 / 0 fails every comparison. */ \
        const REAL over = FABS(gi) / (bound * base + accumulator);                                \
        largest[k] = over > largest[k] ? over : largest[k];                                       \
        poison[k] += gi - gi;                                                                     \
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

INLINE void NAME(ask_for)(const REAL *from) {
    for (int64_t i = 0; i < PIECE; i += 64 / sizeof(REAL)) __builtin_prefetch(from + i, 0, 3);
}

/* The chunk's maximum overshoot where it raises `worst`, else 0. What reads least settles most pieces: first the
 * gradients alone, which leave some open, then those and G, then all three. What is open lies here and there, and is
 * asked for ahead; the weights where the piece before had needed its own. */
INLINE REAL NAME(overshoot)(const REAL *restrict w, const REAL *restrict g, const REAL *restrict total, int64_t n,
                            const Settings *s, const int16_t *open, int count, REAL *worst, int delayed, int inside) {
    REAL raised = 0, allowed = NAME(allowed)(s, *worst, delayed);
    int weights = s->decay != 0;
    for (int k = 0; k < count; k++) {
        if (k + AHEAD < count) {
            const int64_t soon = (int64_t)open[k + AHEAD] * PIECE;
            NAME(ask_for)(total + soon);
            NAME(ask_for)(g + soon);
            if (weights) NAME(ask_for)(w + soon);
        }
        const int64_t i = (int64_t)open[k] * PIECE, size = n - i < PIECE ? n - i : PIECE;
        weights = s->decay != 0 || !NAME(totals_allow)(g + i, total + i, size, allowed);
        if (!weights || !NAME(may_exceed)(w + i, g + i, total + i, size, s, *worst, delayed)) continue;
        const REAL over = NAME(largest_overshoot)(w + i, g + i, total + i, size, s, delayed, inside);
        if (over != over) return over;
        if (over > *worst) {
            raised = *worst = over;
            allowed = NAME(allowed)(s, over, delayed);
        }
    }
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
#define AT(k)                                                                                                \
    {                                                                                                        \
        const REAL wi = w[i + k], gi = sign * g[i + k] + decay * wi, used = seen * gi, feed = fed * gi;      \
        const REAL before = total[i + k], after = before + feed * feed;                                      \
        /* rate * used first: the order of torch's fused Adagrad, with which this then agrees to the bit. */ \
        const REAL move = rate * used / NAME(root)(before, used, eps, delayed, inside);                      \
        w[i + k] = keep * wi - move;                                                                         \
        total[i + k] = after;                                                                                \
        if (keep_floors) least[k] = after < least[k] ? after : least[k];                                     \
        if (measure) {                                                                                       \
            square[k] += move * move;                                                                        \
            largest[k] = FABS(move) > largest[k] ? FABS(move) : largest[k];                                  \
        }                                                                                                    \
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

#define DISPATCH(CALL)                            \
    if (s->delayed) {                             \
        if (s->inside) CALL(1, 1) else CALL(1, 0) \
    } else {                                      \
        if (s->inside) CALL(0, 1) else CALL(0, 0) \
    }

static void NAME(reduce_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, double *search,
                               double *out) {
    const int64_t begin = chunk * CHUNK;
    REAL *floors = t->floors ? (REAL *)t->floors + begin / PIECE : 0;
    const REAL *w = (const REAL *)t->weight + begin, *g = (const REAL *)t->grad + begin;
    const REAL *total = (const REAL *)t->total + begin;
    /* Somebody has made G smaller, in a way that does not count as a version (`.data`). */
    if (floors && total[0] < floors[0]) NAME(minima)(total, n, floors);
    REAL worst = *search;
    /* Where eps is below the rounding of the smallest root; so is the floor then above 0. */
    const double floor = s->updates && floors ? NAME(smallest)(floors, (n + PIECE - 1) / PIECE) : 0;
    const int rootless = s->updates && !s->largest && s->eps < (s->inside ? floor : sqrt(floor)) * EPSILON / 4;
    int16_t open[PIECES + 1]; /* without bounds, or with weight decay: all */
    int count = 0;
    if (s->overshoot && s->decay == 0 && floors)
        count = NAME(open_pieces)(g, n, floors, NAME(allowed)(s, worst, s->delayed != 0), open);
    else if (s->overshoot)
        for (; count * PIECE < n; count++) open[count] = (int16_t)count;
    if (floors) t->stale[chunk] = s->overshoot ? count > 0 : s->updates && !rootless;
#define CALL(d, i)                                                                                              \
    {                                                                                                           \
        if (rootless) NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 1);                                       \
        const int again = out[UPDATE_SQ] != out[UPDATE_SQ]; /* NaN, or a square that overflowed */              \
        if (again) memset(out, 0, COLUMNS * sizeof(double));                                                    \
        if (rootless && !again) {                                                                               \
        } else if (s->updates) NAME(norms)(w, g, total, n, s, out, d, i, 1, 1, 0);                              \
        else if (s->weights || (s->grads && s->decay != 0)) NAME(norms)(w, g, total, n, s, out, d, i, 1, 0, 0); \
        else if (s->grads) NAME(norms)(w, g, total, n, s, out, d, i, 0, 0, 0);                                  \
        if (s->overshoot) out[OVERSHOOT] = NAME(overshoot)(w, g, total, n, s, open, count, &worst, d, i);       \
    }
    DISPATCH(CALL)
#undef CALL
    *search = worst;
}

static int NAME(chunk_finite)(const Tensor *t, int64_t chunk, int64_t n) {
    const REAL *g = (const REAL *)t->grad + chunk * CHUNK;
    const int64_t apart = n / BLOCK * PIECE;
    REAL tops[WAYS];
    for (int64_t i = 0; i < apart; i += PIECE) {
        NAME(largest_of_pieces)(g + i, apart, tops);
        for (int way = 0; way < WAYS; way++)
            if (!(tops[way] < INFINITY)) return 0;
    }
    return NAME(largest_gradient)(g + WAYS * apart, n - WAYS * apart) < INFINITY;
}

static void NAME(step_chunk)(const Tensor *t, int64_t chunk, int64_t n, const Settings *s, const Factors *f,
                             double *size) {
    const int64_t begin = chunk * CHUNK;
    REAL *w = (REAL *)t->weight + begin, *total = (REAL *)t->total + begin;
    REAL *floors = t->floors && t->stale[chunk] ? (REAL *)t->floors + begin / PIECE : 0;
    const REAL *g = (const REAL *)t->grad + begin;
#define CALL(d, i)                                                                      \
    {                                                                                   \
        if (size && floors) NAME(step)(w, g, total, n, s, f, size, floors, d, i, 1, 1); \
        else if (size) NAME(step)(w, g, total, n, s, f, size, 0, d, i, 1, 0);           \
        else if (floors) NAME(step)(w, g, total, n, s, f, 0, floors, d, i, 0, 1);       \
        else NAME(step)(w, g, total, n, s, f, 0, 0, d, i, 0, 0);                        \
    }
    DISPATCH(CALL)
#undef CALL
}

#undef DISPATCH
