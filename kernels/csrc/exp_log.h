/* exp, log, sine and cosine as fixed sequences of IEEE operations (docs/numerics.md, "Elementary functions"). */
#pragma once
#include "simd.h"

#define LS_EXP_LOWEST -87.33f  /* below it exp is +0, so no result is subnormal */
#define LS_EXP_HIGHEST 89.0f   /* from 88.73 on the result is infinite */
#define LS_ROUND_MAGIC 12582912.0f /* 1.5 * 2^23: adding it rounds to the nearest integer, ties to even */

static inline v16 v16_exp_reduced(v16 r) { /* of |r| <= ln(2) / 2 */
    v16 p = v16_set1(1.9875691500e-4f);
    p = v16_fma(p, r, v16_set1(1.3981999507e-3f));
    p = v16_fma(p, r, v16_set1(8.3334519073e-3f));
    p = v16_fma(p, r, v16_set1(4.1665795894e-2f));
    p = v16_fma(p, r, v16_set1(1.6666665459e-1f));
    p = v16_fma(p, r, v16_set1(5.0000001201e-1f));
    return v16_add(v16_fma(p, v16_mul(r, r), r), v16_set1(1.0f));
}

/* Cody-Waite reduction and a polynomial of degree 7 (Cephes expf's coefficients); error below 1 ulp. */
static inline v16 v16_exp(v16 x) {
    v16 y = v16_max(v16_min(x, v16_set1(LS_EXP_HIGHEST)), v16_set1(LS_EXP_LOWEST));
    v16 n = v16_sub(v16_fma(y, v16_set1(1.44269504088896341f), v16_set1(LS_ROUND_MAGIC)), v16_set1(LS_ROUND_MAGIC));
    v16 r = v16_fma(n, v16_set1(-0.693359375f), y);
    r = v16_fma(n, v16_set1(2.12194440e-4f), r);
    return v16_zero_below(v16_scale2(v16_exp_reduced(r), n), x, LS_EXP_LOWEST);
}

/* The same bits for x <= 0, -infinity included, with less work: nothing overflows, what lies below LOWEST becomes +0
 * whatever was computed for it, and above it the result is normal, so 2^n may be added to the exponent. */
static inline v16 v16_exp_falling(v16 x) {
    v16 magic = v16_fma(x, v16_set1(1.44269504088896341f), v16_set1(LS_ROUND_MAGIC));
    v16 n = v16_sub(magic, v16_set1(LS_ROUND_MAGIC));
    v16 r = v16_fma(n, v16_set1(-0.693359375f), x);
    r = v16_fma(n, v16_set1(2.12194440e-4f), r);
    return v16_zero_below(v16_add_exponent(v16_exp_reduced(r), magic), x, LS_EXP_LOWEST);
}

static inline float exp1(float x) {
    float f[16];
    v16_store(f, v16_exp(v16_set1(x)));
    return f[0];
}

/* Natural logarithm of a positive, finite, normal double (the formula and coefficients of fdlibm's e_log.c). */
static inline double log1(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    int k = (int)(bits >> 52) - 1023;
    bits = (bits & 0x000fffffffffffffull) | 0x3ff0000000000000ull;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > 1.4142135623730951) { m = m * 0.5; k += 1; }
    double f = m - 1.0, s = f / (2.0 + f), z = s * s, w = z * z;
    double t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    double t2 = z * (6.666666666666735130e-01
                     + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    double half = (0.5 * f) * f, rest = s * (half + (t2 + t1)) + (double)k * 1.90821492927058770002e-10;
    return (double)k * 6.93147180369123816490e-01 - ((half - rest) - f);
}

/* Sine and cosine of x in [0, 2^20]: x less the nearest multiple n of pi / 2, kept as y + tail (pi / 2 in three parts, of
 * which two have 33 bits, so that n times them is exact), then fdlibm's k_sin.c and k_cos.c polynomials. */
static inline void sine_cosine1(double x, double *sine, double *cosine) {
    double n = (x * 6.36619772367581382433e-01 + 6755399441055744.0) - 6755399441055744.0;
    double t = x - n * 1.57079632673412561417e+00, w = n * 6.07710050630396597660e-11, r = t - w;
    w = n * 2.02226624879595063154e-21 - ((t - r) - w);
    double y = r - w, tail = (r - y) - w, z = y * y;
    double p = 8.33333333332248946124e-03
               + z * (-1.98412698298579493134e-04
                      + z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)));
    double s = y - ((z * (0.5 * tail - (z * y) * p) - tail) - (z * y) * -1.66666666666666324348e-01);
    double q = z * (4.16666666666666019037e-02
                    + z * (-1.38888888888741095749e-03
                           + z * (2.48015872894767294178e-05
                                  + z * (-2.75573143513906633035e-07
                                         + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    double half = 0.5 * z, u = 1.0 - half;
    double c = u + (((1.0 - u) - half) + (z * q - y * tail));
    int64_t quarter = (int64_t)n & 3;
    *sine = quarter == 0 ? s : quarter == 1 ? c : quarter == 2 ? -s : -c;
    *cosine = quarter == 0 ? c : quarter == 1 ? -s : quarter == 2 ? -c : s;
}
