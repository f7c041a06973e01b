/* The operations on a CPU: the same results as reference.py's, bit for bit, each in one pass.

Compiled by native.py when first needed. Products and sums must not be contracted into one rounding, nor anything be
reordered: -ffp-contract=off, no -ffast-math. Long tensors are shared among threads, which see all of a group. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16 };     /* of the dense tensor */
enum { INFINITE = 0x7F800000 }; /* its bits */
enum { NOT_A_NUMBER = 0x7FC0 }; /* in bfloat16 */
enum { GROUP = 32, LEVELS_GROUP = 64, LLOYD = 2, TOGETHER = 8, CHUNK = 64 };
enum { PART = 1 << 15, WORD = 64, OFFSET_BLOCK = 256 }; /* PART: elements that a thread takes at a time */

static const float TINY = 1.1754943508222875e-38f, LARGEST = 3.3895313892515355e38f; /* of bfloat16 */

/* Elements start to end of what a job is about. */
typedef void work_on(const void *job, int64_t start, int64_t end);

/* Starts the threads that PyTorch computes by, if they were found: these hold the cores by spinning, as others' would. */
static void (*start_threads)(void (*)(void *), void *, unsigned, unsigned);

void dropit_share_threads(void *start) { memcpy(&start_threads, &start, sizeof start); }

struct shared {
    work_on *work;
    const void *job;
    int64_t n, part, next;
};

/* Part by part, as a thread whose core is taken by others for a while comes by fewer of them. */
static void work_on_parts(void *given)
{
    struct shared *shared = given;
    int64_t start;
    while ((start = __atomic_fetch_add(&shared->next, shared->part, __ATOMIC_RELAXED)) < shared->n)
        shared->work(shared->job, start, shared->n - start < shared->part ? shared->n : start + shared->part);
}

static void share(work_on *work, const void *job, int64_t n, int64_t part, int threads)
{
    struct shared shared = {work, job, n, part, 0};
    if (start_threads && threads > 1 && n > part)
        start_threads(work_on_parts, &shared, (unsigned)threads, 0);
    else if (n > 0)
        work(job, 0, n);
}

INLINE float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint32_t to_bits(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float widened(uint16_t x) { return from_bits((uint32_t)x << 16); }

/* To bfloat16, of two equally near to the even one; not of NaN. */
INLINE uint16_t narrowed(float x)
{
    uint32_t bits = to_bits(x);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

INLINE float at_least(float x, float least) { return x < least ? least : x; }
INLINE float at_most(float x, float most) { return x > most ? most : x; }

/* To the nearest whole number, of two equally near to the even one: what this adds leaves no bits for a fraction. */
INLINE float rounded(float x) { return (x + 12582912.0f) - 12582912.0f; }

/* What the elements are normalized by: element i by those at place i / inner % sections. No rstd: they are not. */
struct statistics {
    const float *mean, *rstd;
    int64_t inner, sections;
};

INLINE void load(float *to, const void *from, int64_t start, int count, int kind, const struct statistics *by)
{
    if (kind == FLOAT32)
        memcpy(to, (const float *)from + start, (size_t)count * sizeof *to);
    else
        for (int i = 0; i < count; i++)
            to[i] = widened(((const uint16_t *)from)[start + i]);
    if (!by->rstd)
        return;
    int64_t place = start / by->inner % by->sections, left = by->inner - start % by->inner;
    for (int i = 0; i < count;) {
        int end = left < count - i ? i + (int)left : count;
        float mean = by->mean ? by->mean[place] : 0, rstd = by->rstd[place];
        if (by->mean)
            for (; i < end; i++)
                to[i] = (to[i] - mean) * rstd;
        else
            for (; i < end; i++)
                to[i] = to[i] * rstd;
        place = place + 1 == by->sections ? 0 : place + 1;
        left = by->inner;
    }
}

/* One group, of so many elements. top: the code of its largest; most: the largest code. The next below the least is of
what is not finite. */
INLINE void quantize_group(const void *x, int kind, int64_t start, int count, const struct statistics *by, int bits,
                           float top, float most, void *codes, uint16_t *scales)
{
    float group[GROUP] = {0};
    int32_t magnitude[GROUP], largest = 0;
    int16_t code[GROUP];
    load(group, x, start, count, kind, by);
    memcpy(magnitude, group, sizeof magnitude); /* bits without the sign, as whole numbers, are in the floats' order */
    for (int i = 0; i < GROUP; i++) {
        magnitude[i] &= 0x7FFFFFFF;
        int32_t finite = magnitude[i] < INFINITE ? magnitude[i] : 0;
        largest = finite > largest ? finite : largest;
    }
    uint16_t scale = narrowed(at_least(from_bits((uint32_t)largest) / top, TINY));
    float reciprocal = 1.0f / widened(scale);
    for (int i = 0; i < GROUP; i++) {
        float c = rounded(at_most(at_least(group[i] * reciprocal, -most), most));
        code[i] = (int16_t)(magnitude[i] < INFINITE ? (int32_t)c : -(int32_t)most - 1);
    }
    scales[start / GROUP] = scale;
    if (bits == 16)
        for (int i = 0; i < count; i++)
            ((int16_t *)codes)[start + i] = (int16_t)code[i];
    else if (bits == 8)
        for (int i = 0; i < count; i++)
            ((int8_t *)codes)[start + i] = (int8_t)code[i];
    else {
        uint16_t pairs[GROUP / 2];
        uint8_t bytes[GROUP];
        for (int i = 0; i < GROUP; i++)
            bytes[i] = i < count ? (uint8_t)(code[i] + 8) : 0;
        memcpy(pairs, bytes, sizeof pairs); /* as a little-endian processor has them */
        for (int i = 0; i < (count + 1) / 2; i++)
            ((uint8_t *)codes)[start / 2 + i] = (uint8_t)(pairs[i] | pairs[i] >> 4);
    }
}

INLINE void quantize_groups(const void *x, int kind, int64_t start, int64_t end, const struct statistics *by, int bits,
                            float top, float most, void *codes, uint16_t *scales)
{
    for (; start + GROUP <= end; start += GROUP)
        quantize_group(x, kind, start, GROUP, by, bits, top, most, codes, scales);
    if (start < end)
        quantize_group(x, kind, start, (int)(end - start), by, bits, top, most, codes, scales);
}

/* What restored elements go through: times weight, plus bias, of which element i has those at place
i / inner % sections; between bounds; in that kind. */
struct rescaling {
    const float *weight, *bias;
    int64_t inner, sections;
    float lower, upper;
    int kind;
    int64_t place, left; /* of the next element, and how many more have that; divisions take longer than all else */
};

/* Elements that follow each other, with factors that do so too, or with one for all. */
INLINE void rescale_run(float *x, int count, const float *weight, const float *bias, int each, float lower, float upper)
{
    float w = weight ? *weight : 1, b = bias ? *bias : 0;
    if (weight)
        for (int i = 0; i < count; i++)
            x[i] = x[i] * (each ? weight[i] : w);
    if (bias)
        for (int i = 0; i < count; i++)
            x[i] = x[i] + (each ? bias[i] : b);
    for (int i = 0; i < count; i++)
        x[i] = at_most(at_least(x[i], lower), upper);
}

INLINE void rescale_group(float *x, int count, struct rescaling *by)
{
    for (int i = 0; i < count;) {
        const float *weight = by->weight ? by->weight + by->place : 0, *bias = by->bias ? by->bias + by->place : 0;
        int64_t left = by->inner == 1 ? by->sections - by->place : by->left;
        int run = left < count - i ? (int)left : count - i;
        if (run == count && by->inner == 1) /* a count that the compiler knows, but for the last group */
            rescale_run(x, count, weight, bias, 1, by->lower, by->upper);
        else if (run == count)
            rescale_run(x, count, weight, bias, 0, by->lower, by->upper);
        else
            rescale_run(x + i, run, weight, bias, by->inner == 1, by->lower, by->upper);
        i += run;
        by->left -= run;
        by->place += by->inner == 1 ? run : by->left == 0;
        by->place = by->place == by->sections ? 0 : by->place;
        by->left = by->left == 0 ? by->inner : by->left;
    }
}

INLINE uint16_t to_bfloat16(float x) { return x == x ? narrowed(x) : NOT_A_NUMBER; }

/* A group, of so many elements, of that kind, or rescaled; by: none where there is no rescaling. */
INLINE void store(float *x, int64_t start, int count, int kind, struct rescaling *by, void *dense)
{
    int result = by ? by->kind : kind;
    if (by)
        rescale_group(x, count, by);
    if (result == FLOAT32)
        memcpy((float *)dense + start, x, (size_t)count * sizeof *x);
    else
        for (int i = 0; i < count; i++)
            ((uint16_t *)dense)[start + i] = to_bfloat16(x[i]);
}

/* How many steps x is from the origin, to the nearest, from 0 to so many. */
INLINE int32_t steps_from(float x, float half_origin, float reciprocal, float most)
{
    return (int32_t)rounded(at_most(at_least((x * 0.5f - half_origin) * reciprocal, 0), most));
}

/* How a group is stored in 2 bits, while it is worked out. */
struct leveled {
    float x[LEVELS_GROUP];
    int16_t step[LEVELS_GROUP], code[LEVELS_GROUP];
    float low, unit, level, apart;
    int finite;
} __attribute__((aligned(64))); /* a processor's line */

INLINE void choose_steps(struct leveled *group)
{
    int32_t ordered[LEVELS_GROUP], least = INT32_MAX, most = INT32_MIN, largest = 0;
    memcpy(ordered, group->x, sizeof ordered);
    for (int i = 0; i < LEVELS_GROUP; i++) { /* whole numbers in the floats' order */
        int32_t magnitude = ordered[i] & 0x7FFFFFFF, in_order = ordered[i] < 0 ? -magnitude : magnitude;
        largest = magnitude > largest ? magnitude : largest;
        least = in_order < least ? in_order : least;
        most = in_order > most ? in_order : most;
    }
    group->finite = largest < INFINITE;
    group->low = least < 0 ? -from_bits((uint32_t)-least) : from_bits((uint32_t)least);
    float high = most < 0 ? -from_bits((uint32_t)-most) : from_bits((uint32_t)most);
    group->unit = at_least(high / 255 - group->low / 255, TINY);
    if (!group->finite) {
        memset(group->x, 0, sizeof group->x);
        group->low = 0, group->unit = 1;
    }
    float half_origin = group->low * 0.5f, reciprocal = 1 / (group->unit * 0.5f);
    for (int i = 0; i < LEVELS_GROUP; i++)
        group->step[i] = (int16_t)steps_from(group->x[i], half_origin, reciprocal, 255);
    for (int i = 0; i < LEVELS_GROUP; i++)
        group->code[i] = (int16_t)rounded((float)group->step[i] * (1 / 85.0f));
}

/* The level of code 0 and the distance to the next: a line through (code, step), of the least squared error. */
INLINE void fit_levels(struct leveled *group)
{
    int32_t c = 0, u = 0, cc = 0, cu = 0;
    for (int i = 0; i < LEVELS_GROUP; i++) {
        c += group->code[i];
        u += group->step[i];
        cc += group->code[i] * group->code[i];
        cu += group->code[i] * group->step[i];
    }
    float spread = at_least((float)(LEVELS_GROUP * cc - c * c), 1);
    group->level = (float)(u * cc - cu * c) / spread;
    group->apart = at_least((float)(LEVELS_GROUP * cu - c * u) / spread, 1);
}

INLINE void choose_codes(struct leveled *group)
{
    float half_origin = group->level * 0.5f, reciprocal = 1 / (group->apart * 0.5f);
    for (int i = 0; i < LEVELS_GROUP; i++)
        group->code[i] = (int16_t)steps_from((float)group->step[i], half_origin, reciprocal, 3);
}

/* By the levels as they are stored. */
INLINE void choose_last_codes(struct leveled *group, uint16_t *levels)
{
    float offset = at_most(at_least(group->low + group->level * group->unit, -LARGEST), LARGEST);
    levels[0] = narrowed(fabsf(offset) >= TINY ? offset : 0);
    levels[1] = narrowed(at_most(at_least(group->apart * group->unit, TINY), LARGEST));
    float half_origin = widened(levels[0]) * 0.5f, reciprocal = 1 / (widened(levels[1]) * 0.5f);
    for (int i = 0; i < LEVELS_GROUP; i++)
        group->code[i] = (int16_t)steps_from(group->x[i], half_origin, reciprocal, 3);
    if (!group->finite)
        levels[0] = NOT_A_NUMBER;
}

INLINE void store_codes(const struct leveled *group, int count, uint8_t *codes)
{
    uint8_t bytes[LEVELS_GROUP];
    uint32_t fours[LEVELS_GROUP / 4];
    for (int i = 0; i < LEVELS_GROUP; i++)
        bytes[i] = (uint8_t)group->code[i];
    memcpy(fours, bytes, sizeof fours); /* as a little-endian processor has them */
    for (int i = 0; i < (count + 3) / 4; i++)
        codes[i] = (uint8_t)(fours[i] | fours[i] >> 6 | fours[i] >> 12 | fours[i] >> 18);
}

/* Groups that follow each other, whose last one has so many elements. Each step is taken for all of them: a group's own
steps wait for each other. */
INLINE void quantize_some_to_levels(const void *x, int kind, int64_t start, int groups, int last,
                                    const struct statistics *by, uint8_t *codes, uint16_t *levels)
{
    struct leveled each[TOGETHER];
    for (int g = 0; g < groups; g++) {
        int count = g == groups - 1 ? last : LEVELS_GROUP;
        load(each[g].x, x, start + g * LEVELS_GROUP, count, kind, by);
        for (int i = count; i < LEVELS_GROUP; i++)
            each[g].x[i] = each[g].x[count - 1];
    }
    for (int g = 0; g < groups; g++)
        choose_steps(each + g);
    for (int turn = 0; turn < LLOYD; turn++) {
        for (int g = 0; g < groups; g++)
            fit_levels(each + g);
        for (int g = 0; g < groups; g++)
            choose_codes(each + g);
    }
    for (int g = 0; g < groups; g++)
        fit_levels(each + g);
    for (int g = 0; g < groups; g++)
        choose_last_codes(each + g, levels + (start / LEVELS_GROUP + g) * 2);
    for (int g = 0; g < groups; g++)
        store_codes(each + g, g == groups - 1 ? last : LEVELS_GROUP, codes + start / 4 + g * LEVELS_GROUP / 4);
}

INLINE void quantize_to_levels(const void *x, int kind, int64_t start, int64_t end, const struct statistics *by,
                               uint8_t *codes, uint16_t *levels)
{
    const int64_t many = TOGETHER * LEVELS_GROUP;
    for (; start + many <= end; start += many)
        quantize_some_to_levels(x, kind, start, TOGETHER, LEVELS_GROUP, by, codes, levels);
    for (; start < end; start += LEVELS_GROUP)
        quantize_some_to_levels(x, kind, start, 1, end - start < LEVELS_GROUP ? (int)(end - start) : LEVELS_GROUP, by,
                                codes, levels);
}

/* In eighths, whose products and sums are finite. */
INLINE void levels_group(const uint8_t *codes, const uint16_t *levels, int64_t start, int count, int kind, float limit,
                         struct rescaling *by, void *dense)
{
    float x[LEVELS_GROUP], offset = widened(levels[0]) * 0.125f, scale = widened(levels[1]) * 0.125f;
    uint32_t fours[LEVELS_GROUP / 4] = {0};
    uint8_t code[LEVELS_GROUP];
    for (int i = 0; i < (count + 3) / 4; i++) {
        uint32_t byte = codes[start / 4 + i];
        fours[i] = (byte | byte << 6 | byte << 12 | byte << 18) & 0x03030303;
    }
    memcpy(code, fours, sizeof code);
    for (int i = 0; i < LEVELS_GROUP; i++)
        x[i] = at_most(at_least(offset + (float)code[i] * scale, -limit * 0.125f), limit * 0.125f) * 8;
    store(x, start, count, kind, by, dense);
}

INLINE void dequantize_levels(const uint8_t *codes, const uint16_t *levels, int64_t start, int64_t end, int kind,
                              float limit, struct rescaling *by, void *dense)
{
    for (; start + LEVELS_GROUP <= end; start += LEVELS_GROUP)
        levels_group(codes, levels + start / LEVELS_GROUP * 2, start, LEVELS_GROUP, kind, limit, by, dense);
    if (start < end)
        levels_group(codes, levels + start / LEVELS_GROUP * 2, start, (int)(end - start), kind, limit, by, dense);
}

INLINE void dequantize_group(const void *codes, float scale, int bits, int64_t start, int count, float limit, float *x)
{
    const int32_t lowest = -(1 << (bits - 1));
    int32_t code[GROUP] = {0};
    if (bits == 16)
        for (int i = 0; i < count; i++)
            code[i] = ((const int16_t *)codes)[start + i];
    else if (bits == 8)
        for (int i = 0; i < count; i++)
            code[i] = ((const int8_t *)codes)[start + i];
    else {
        uint16_t pairs[GROUP / 2] = {0};
        uint8_t bytes[GROUP];
        for (int i = 0; i < (count + 1) / 2; i++) {
            uint16_t pair = ((const uint8_t *)codes)[start / 2 + i];
            pairs[i] = (pair | pair << 4) & 0x0F0F;
        }
        memcpy(bytes, pairs, sizeof bytes);
        for (int i = 0; i < GROUP; i++)
            code[i] = bytes[i] - 8;
    }
    for (int i = 0; i < GROUP; i++) {
        float product = at_most(at_least((float)code[i] * scale, -limit), limit);
        x[i] = code[i] == lowest ? NAN : product;
    }
}

INLINE void dequantize_groups(const void *codes, const uint16_t *scales, int bits, int64_t start, int64_t end, int kind,
                              float limit, struct rescaling *by, void *dense)
{
    const int chunk = by ? CHUNK : GROUP; /* for several groups what is to be known of factors is found out once */
    float x[CHUNK];
    for (; start + chunk <= end; start += chunk) {
        for (int i = 0; i < chunk; i += GROUP)
            dequantize_group(codes, widened(scales[(start + i) / GROUP]), bits, start + i, GROUP, limit, x + i);
        store(x, start, chunk, kind, by, dense);
    }
    for (; start < end; start += GROUP) {
        int count = end - start < GROUP ? (int)(end - start) : GROUP;
        dequantize_group(codes, widened(scales[start / GROUP]), bits, start, count, limit, x);
        store(x, start, count, kind, by, dense);
    }
}

/* Eight bytes of 0 or 1 as the bits of one. */
INLINE uint64_t gathered(const uint8_t *bytes)
{
    uint64_t eight;
    memcpy(&eight, bytes, sizeof eight);
    return (eight * 0x0102040810204080u) >> 56; /* this product's highest byte has the lowest bit of each */
}

struct marking {
    const void *x;
    int kind;
    float lower, upper;
    uint8_t *bits;
};

/* A bit for each element that is neither at or below lower nor at or above upper. */
INLINE void mark(const struct marking *job, int kind, int64_t start, int64_t end)
{
    const struct statistics none = {0, 0, 1, 1};
    for (; start < end; start += GROUP) {
        int count = end - start < GROUP ? (int)(end - start) : GROUP;
        float group[GROUP] = {0};
        uint8_t inside[GROUP], bytes[GROUP / 8];
        if (count == GROUP)
            load(group, job->x, start, GROUP, kind, &none);
        else
            load(group, job->x, start, count, kind, &none);
        for (int i = 0; i < GROUP; i++)
            inside[i] = !(group[i] <= job->lower) & !(group[i] >= job->upper) & (i < count);
        for (int i = 0; i < GROUP / 8; i++)
            bytes[i] = (uint8_t)gathered(inside + 8 * i);
        memcpy(job->bits + start / 8, bytes, (size_t)(count + 7) / 8);
    }
}

static void mark_part(const void *given, int64_t start, int64_t end)
{
    const struct marking *job = given;
    if (job->kind == FLOAT32)
        mark(job, FLOAT32, start, end);
    else
        mark(job, BFLOAT16, start, end);
}

/* Infinity, which is no bound, must be handed as NaN. */
void dropit_mark(const void *x, int kind, int64_t n, float lower, float upper, uint8_t *bits, int threads)
{
    const struct marking job = {x, kind, lower, upper, bits};
    share(mark_part, &job, n, PART, threads);
}

struct keeping {
    const void *x;
    int size;
    const uint8_t *bits;
    void *kept;
};

/* The elements that are marked, zeros elsewhere. */
#define KEEP(TYPE, SIGNED, COUNT)                                                                                      \
    for (int i = 0; i < (COUNT); i++)                                                                                  \
        ((TYPE *)job->kept)[start + i] = ((const TYPE *)job->x)[start + i] & (TYPE)-(SIGNED)((word >> i) & 1);

INLINE void keep(const struct keeping *job, int size, int64_t start, int64_t end)
{
    for (; start < end; start += GROUP) {
        int count = end - start < GROUP ? (int)(end - start) : GROUP;
        uint32_t word = 0;
        memcpy(&word, job->bits + start / 8, (size_t)(count + 7) / 8);
        if (size == 2 && count == GROUP)
            KEEP(uint16_t, int16_t, GROUP)
        else if (size == 2)
            KEEP(uint16_t, int16_t, count)
        else if (count == GROUP)
            KEEP(uint32_t, int32_t, GROUP)
        else
            KEEP(uint32_t, int32_t, count)
    }
}

static void keep_part(const void *given, int64_t start, int64_t end)
{
    const struct keeping *job = given;
    if (job->size == 2)
        keep(job, 2, start, end);
    else
        keep(job, 4, start, end);
}

void dropit_keep(const void *x, int size, int64_t n, const uint8_t *bits, void *kept, int threads)
{
    const struct keeping job = {x, size, bits, kept};
    share(keep_part, &job, n, PART, threads);
}

/* What is selected: so many of each block by magnitude, the first of equal ones. A block is of whole words of bits. */
struct selecting {
    const void *x;
    int size; /* of an element, in bytes */
    int64_t block, count, rest_count;
    void *values;
    int16_t *counts;        /* of each 256 elements; or none */
    uint8_t *offsets, *bits; /* one of them */
};

#define MOST(SIZE) ((SIZE) == 2 ? INT16_MAX : INT32_MAX)

/* Bits without the sign, as whole numbers, are in the magnitudes' order. */
INLINE int32_t magnitude_at(const void *x, int size, int64_t i)
{
    return size == 2 ? ((const int16_t *)x)[i] & INT16_MAX : ((const int32_t *)x)[i] & INT32_MAX;
}

INLINE int64_t count_run(const void *x, int size, int64_t start, int count, int32_t least)
{
    int16_t short_sum = 0;
    int32_t sum = 0;
    if (size == 2)
        for (int i = 0; i < count; i++)
            short_sum = (int16_t)(short_sum + ((((const int16_t *)x)[start + i] & INT16_MAX) >= (int16_t)least));
    else
        for (int i = 0; i < count; i++)
            sum += magnitude_at(x, 4, start + i) >= least;
    return short_sum + sum;
}

INLINE int64_t count_from(const void *x, int size, int64_t start, int64_t end, int32_t least)
{
    int64_t sum = 0;
    for (; start + OFFSET_BLOCK <= end; start += OFFSET_BLOCK) /* a count that the compiler knows */
        sum += count_run(x, size, start, OFFSET_BLOCK, least);
    return sum + count_run(x, size, start, (int)(end - start), least);
}

/* Which of up to 64 elements are at least that large. */
INLINE uint64_t word_from(const void *x, int size, int64_t start, int count, int32_t least)
{
    uint8_t found[WORD];
    uint64_t word = 0;
    if (count == WORD)
        for (int i = 0; i < WORD; i++)
            found[i] = magnitude_at(x, size, start + i) >= least;
    else
        for (int i = 0; i < WORD; i++)
            found[i] = i < count && magnitude_at(x, size, start + i) >= least;
    for (int i = 0; i < WORD / 8; i++)
        word |= gathered(found + 8 * i) << (8 * i);
    return word;
}

/* The least magnitude that is kept; equal: how many of those equal to it are, or -1 for all. Looks around guess first. */
INLINE int32_t threshold_of(const void *x, int size, int64_t start, int64_t end, int64_t k, int32_t guess,
                            int64_t *equal)
{
    /* At least as large as low are reached, no fewer than k; as high are above, fewer than k. */
    int64_t low = 0, high = (int64_t)MOST(size) + 1, reached = end - start, above = 0;
    int64_t step = 1 << (size == 2 ? 4 : 20); /* an eighth */
    for (int64_t next = guess; high - low > 1 && reached != k;) {
        int64_t count = count_from(x, size, start, end, (int32_t)next);
        if (count >= k)
            low = next, reached = count;
        else
            high = next, above = count;
        next = count >= k ? low + step : high - step;
        step *= 4;
        if (next <= low || next >= high)
            next = low + (high - low) / 2;
    }
    *equal = reached == k ? -1 : k - above;
    return (int32_t)low;
}

/* The k of elements start to end; the first of them is to be in that place. Returns the least magnitude of them. */
INLINE int32_t select_block(const struct selecting *job, int size, int64_t start, int64_t end, int64_t k, int64_t place,
                            int32_t guess)
{
    int64_t equal;
    int32_t threshold = threshold_of(job->x, size, start, end, k, guess, &equal);
    for (; start < end; start += WORD) {
        int count = end - start < WORD ? (int)(end - start) : WORD;
        uint64_t word = word_from(job->x, size, start, count, threshold);
        if (equal >= 0) {
            uint64_t above = threshold == MOST(size) ? 0 : word_from(job->x, size, start, count, threshold + 1);
            uint64_t at = word & ~above;
            for (word = above; at && equal > 0; at &= at - 1, equal--)
                word |= at & -at;
        }
        if (job->bits)
            memcpy(job->bits + start / 8, &word, (size_t)(count + 7) / 8);
        if (job->counts)
            job->counts[start / OFFSET_BLOCK] += (int16_t)__builtin_popcountll(word);
        for (; word; word &= word - 1, place++) {
            int i = __builtin_ctzll(word);
            if (size == 2)
                ((uint16_t *)job->values)[place] = ((const uint16_t *)job->x)[start + i];
            else
                ((uint32_t *)job->values)[place] = ((const uint32_t *)job->x)[start + i];
            if (job->offsets)
                job->offsets[place] = (uint8_t)(start + i);
        }
    }
    return threshold;
}

INLINE void select_blocks(const struct selecting *job, int size, int64_t start, int64_t end)
{
    int64_t place = start / job->block * job->count;
    int32_t guess = MOST(size) / 2; /* blocks that follow each other are much alike */
    for (; start + job->block <= end; start += job->block, place += job->count)
        guess = select_block(job, size, start, start + job->block, job->count, place, guess);
    if (start < end)
        select_block(job, size, start, end, job->rest_count, place, guess);
}

static void select_part(const void *given, int64_t start, int64_t end)
{
    const struct selecting *job = given;
    if (job->size == 2)
        select_blocks(job, 2, start, end);
    else
        select_blocks(job, 4, start, end);
}

/* A part is of whole blocks, and of whole 256 elements. */
void dropit_select(const void *x, int size, int64_t n, int64_t block, int64_t count, int64_t rest_count, void *values,
                   int16_t *counts, uint8_t *offsets, uint8_t *bits, int64_t part, int threads)
{
    const struct selecting job = {x, size, block, count, rest_count, values, counts, offsets, bits};
    share(select_part, &job, n, part, threads);
}

struct placing {
    const void *values;
    int size;
    const uint8_t *bits;
    int64_t *firsts; /* how many values there are before each PART */
    void *dense;
};

INLINE uint64_t word_of(const uint8_t *bits, int64_t start, int count)
{
    uint64_t word = 0;
    memcpy(&word, bits + start / 8, (size_t)(count + 7) / 8);
    return word;
}

/* The values where the bits are set, zeros elsewhere. */
INLINE void place(const struct placing *job, int size, int64_t start, int64_t end)
{
    int64_t next = job->firsts[start / PART];
    for (; start < end; start += WORD) {
        int count = end - start < WORD ? (int)(end - start) : WORD;
        uint64_t word = word_of(job->bits, start, count);
        if (count == WORD)
            memset((char *)job->dense + start * size, 0, (size_t)(WORD * size));
        else
            memset((char *)job->dense + start * size, 0, (size_t)(count * size));
        for (; word; word &= word - 1, next++) {
            int i = __builtin_ctzll(word);
            if (size == 2)
                ((uint16_t *)job->dense)[start + i] = ((const uint16_t *)job->values)[next];
            else
                ((uint32_t *)job->dense)[start + i] = ((const uint32_t *)job->values)[next];
        }
    }
}

static void place_part(const void *given, int64_t start, int64_t end)
{
    const struct placing *job = given;
    if (job->size == 2)
        place(job, 2, start, end);
    else
        place(job, 4, start, end);
}

/* firsts: (ceil(n / PART),), to be written here. */
void dropit_place(const void *values, int size, int64_t n, const uint8_t *bits, int64_t *firsts, void *dense,
                  int threads)
{
    int64_t found = 0;
    for (int64_t start = 0; start < n; start += WORD) {
        if (start % PART == 0)
            firsts[start / PART] = found;
        found += __builtin_popcountll(word_of(bits, start, n - start < WORD ? (int)(n - start) : WORD));
    }
    const struct placing job = {values, size, bits, firsts, dense};
    share(place_part, &job, n, PART, threads);
}

INLINE uint64_t mixed(uint64_t x)
{
    x = (x + 1) * 0x9E3779B97F4A7C15u; /* which carries what changed upwards, and what follows downwards */
    return x ^ x >> 32;
}

/* A number that another content of the memory would hardly have: eight chains, each of every eighth word. */
uint64_t dropit_digest(const void *x, int64_t nbytes)
{
    enum { CHAINS = 8 };
    uint64_t chains[CHAINS], words[CHAINS] = {0}, digest = (uint64_t)nbytes;
    int64_t start = 0, whole = nbytes - nbytes % (int64_t)sizeof words;
    for (int i = 0; i < CHAINS; i++)
        chains[i] = (uint64_t)i;
    for (; start < whole; start += sizeof words) {
        memcpy(words, (const char *)x + start, sizeof words);
        for (int i = 0; i < CHAINS; i++)
            chains[i] = mixed(chains[i] ^ words[i]);
    }
    memset(words, 0, sizeof words);
    memcpy(words, (const char *)x + whole, (size_t)(nbytes - whole));
    for (int i = 0; i < CHAINS; i++)
        digest = mixed(digest ^ mixed(chains[i] ^ words[i]));
    return digest;
}

struct quantizing {
    const void *x;
    int kind, bits;
    struct statistics by;
    float top, most;
    void *codes;
    uint16_t *scales;
};

/* Each call has its own constants, so that the compiler makes a loop of each kind. */
#define QUANTIZE(KIND, BY, BITS, TOP, MOST)                                                                            \
    quantize_groups(job->x, KIND, start, end, BY, BITS, TOP, MOST, job->codes, job->scales)

static void quantize_part(const void *given, int64_t start, int64_t end)
{
    const struct quantizing *job = given;
    const struct statistics *by = &job->by, none = {0, 0, 1, 1};
    if (job->kind == FLOAT32 && job->bits == 2)
        quantize_to_levels(job->x, FLOAT32, start, end, by, job->codes, job->scales);
    else if (job->bits == 2)
        quantize_to_levels(job->x, BFLOAT16, start, end, by, job->codes, job->scales);
    else if (job->kind == FLOAT32 && job->bits == 8 && !by->rstd)
        QUANTIZE(FLOAT32, &none, 8, 127, 127);
    else if (job->kind == FLOAT32 && job->bits == 8)
        QUANTIZE(FLOAT32, by, 8, 127, 127);
    else if (job->kind == FLOAT32 && job->bits == 4)
        QUANTIZE(FLOAT32, by, 4, 7, 7);
    else if (job->kind == FLOAT32)
        QUANTIZE(FLOAT32, by, 16, job->top, job->most);
    else if (job->bits == 8)
        QUANTIZE(BFLOAT16, by, 8, 127, 127);
    else if (job->bits == 4)
        QUANTIZE(BFLOAT16, by, 4, 7, 7);
    else
        QUANTIZE(BFLOAT16, by, 16, job->top, job->most);
}

void dropit_quantize(const void *x, int kind, int64_t n, const float *mean, const float *rstd, int64_t inner,
                     int64_t sections, int bits, float top, float most, void *codes, uint16_t *scales, int threads)
{
    const struct quantizing job = {x, kind, bits, {mean, rstd, inner, sections}, top, most, codes, scales};
    share(quantize_part, &job, n, PART, threads);
}

struct dequantizing {
    const void *codes;
    const uint16_t *scales;
    int bits, kind;
    float limit;
    struct rescaling by;
    void *dense;
};

/* The codes of each kind, as elements of KIND. */
#define DEQUANTIZE(KIND, BY)                                                                                           \
    if (job->bits == 2)                                                                                                \
        dequantize_levels(job->codes, job->scales, start, end, KIND, job->limit, BY, job->dense);                      \
    else if (job->bits == 4)                                                                                           \
        dequantize_groups(job->codes, job->scales, 4, start, end, KIND, job->limit, BY, job->dense);                   \
    else if (job->bits == 8)                                                                                           \
        dequantize_groups(job->codes, job->scales, 8, start, end, KIND, job->limit, BY, job->dense);                   \
    else                                                                                                               \
        dequantize_groups(job->codes, job->scales, 16, start, end, KIND, job->limit, BY, job->dense);

static void dequantize_part(const void *given, int64_t start, int64_t end)
{
    const struct dequantizing *job = given;
    struct rescaling by = job->by;
    by.place = start / by.inner % by.sections;
    by.left = by.inner - start % by.inner;
    if (by.weight || by.bias)
        DEQUANTIZE(FLOAT32, &by)
    else if (job->kind == FLOAT32)
        DEQUANTIZE(FLOAT32, 0)
    else
        DEQUANTIZE(BFLOAT16, 0)
}

void dropit_dequantize(const void *codes, const uint16_t *scales, int bits, int64_t n, int kind, float limit,
                       const float *weight, const float *bias, int64_t inner, int64_t sections, float lower,
                       float upper, int result, void *dense, int threads)
{
    const struct dequantizing job = {
        codes, scales, bits, kind, limit, {weight, bias, inner, sections, lower, upper, result, 0, 0}, dense};
    share(dequantize_part, &job, n, PART, threads);
}
