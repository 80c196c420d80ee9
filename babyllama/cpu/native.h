/* What the C files share. */

#pragma once

#include <stdint.h>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define HAS_AVX2
#endif

/* e to the power of x: 2 to a whole and a broken power, the latter by its series, to 4e-6. Unlike
   the library's, it becomes vector instructions. */
static inline float power_of_e(float x) {
    const float clipped = x < -87 ? -87 : x > 87 ? 87 : x;
    const float exponent = clipped * 1.44269504f;
    const int32_t whole = (int32_t)(exponent + 128.5f) - 128; /* rounded: it is above -128 */
    const float rest = (exponent - whole) * 0.693147181f;     /* at most 0.35 */
    const float s3 = 1 + rest * (1 / 4.0f) * (1 + rest * (1 / 5.0f) * (1 + rest * (1 / 6.0f)));
    const float series = 1 + rest * (1 + rest * (1 / 2.0f) * (1 + rest * (1 / 3.0f) * s3));
    union {
        int32_t bits;
        float number;
    } power = {(whole + 127) << 23};
    return power.number * series;
}
