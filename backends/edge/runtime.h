/* What the kernels of a compiled model are written with. C99; needs memcpy and memset, nothing else: no heap, no global state. */
#ifndef QCOMPILE_RUNTIME_H
#define QCOMPILE_RUNTIME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP
#include <arm_acle.h>
#define QC_DSP 1
#else
#define QC_DSP 0
#endif

#if defined(__GNUC__)
#define QC_INLINE static inline __attribute__((always_inline, unused))
#else
#define QC_INLINE static inline
#endif

/* Four bytes from or to any address. */
QC_INLINE uint32_t qc_load_word(const void *from) {
  uint32_t word;
  memcpy(&word, from, sizeof word);
  return word;
}

QC_INLINE int32_t qc_store_word(void *to, uint32_t word) {
  memcpy(to, &word, sizeof word);
  return 0;
}

/* Few bytes, or many. The memcpy of small C libraries goes byte by byte; the empty statement keeps compilers from calling it. */
#if defined(__GNUC__) && defined(__ARM_FEATURE_UNALIGNED) && __ARM_ARCH_PROFILE == 'M'
QC_INLINE void qc_copy(void *to, const void *from, int32_t bytes) {
  uint8_t *a = (uint8_t *)to;
  const uint8_t *b = (const uint8_t *)from;
  for (; bytes >= 4; bytes -= 4, a += 4, b += 4) {
    (void)qc_store_word(a, qc_load_word(b));
    __asm__ volatile("");
  }
  if (bytes & 2) {
    memcpy(a, b, 2);
    a += 2;
    b += 2;
  }
  if (bytes & 1) {
    *a = *b;
  }
}
#else
QC_INLINE void qc_copy(void *to, const void *from, int32_t bytes) { memcpy(to, from, (size_t)bytes); }
#endif

QC_INLINE void qc_fill(void *to, int32_t code, int32_t bytes) { memset(to, code & 0xFF, (size_t)bytes); }

/* The upper word of a product. Small cores multiply 32 bits alone; the factors' halves then take four products. */
#if defined(__ARM_ARCH_6M__) || defined(__ARM_ARCH_8M_BASE__)
QC_INLINE int32_t qc_upper(int32_t a, int32_t b) {
  const uint32_t a0 = (uint32_t)a & 0xFFFF, b0 = (uint32_t)b & 0xFFFF;
  const int32_t a1 = a >> 16, b1 = b >> 16, middle = a1 * (int32_t)b0 + (int32_t)(a0 * b0 >> 16), other = (int32_t)a0 * b1 + (middle & 0xFFFF);
  return a1 * b1 + (middle >> 16) + (other >> 16);
}
#else
QC_INLINE int32_t qc_upper(int32_t a, int32_t b) { return (int32_t)(((int64_t)a * b) >> 32); }
#endif

/* (sum * multiplier + half) >> shift in 64 bits: a product with multiplier / 2^shift, rounded half up. */
QC_INLINE int32_t qc_requantize(int32_t sum, int32_t multiplier, int32_t shift) {
  if (shift > 32) { /* the lower word is below what is rounded away: only the upper one counts */
    return ((qc_upper(sum, multiplier) >> (shift - 33)) + 1) >> 1;
  }
  return (int32_t)(((int64_t)sum * multiplier + ((int64_t)1 << (shift - 1))) >> shift);
}

/* The same where shift is over 32 and given less 33, with the zero point of the codes: rest is twice that, plus one. */
QC_INLINE int32_t qc_scale(int32_t sum, int32_t multiplier, int32_t shift, int32_t rest) {
  return ((qc_upper(sum, multiplier) >> shift) + rest) >> 1;
}

/* The nearest code of 8 bits. */
#if QC_DSP
QC_INLINE int32_t qc_saturate_s8(int32_t value) { return __ssat(value, 8); }
QC_INLINE int32_t qc_saturate_u8(int32_t value) { return (int32_t)__usat(value, 8); }
#else
QC_INLINE int32_t qc_saturate_s8(int32_t value) { return value < -128 ? -128 : value > 127 ? 127 : value; }
QC_INLINE int32_t qc_saturate_u8(int32_t value) { return value < 0 ? 0 : value > 255 ? 255 : value; }
#endif

/* Bytes 0 and 2, or 1 and 3, of a word as two 16-bit numbers. */
#if QC_DSP
QC_INLINE uint32_t qc_sxtb16(uint32_t word) { return (uint32_t)__sxtb16(word); }
QC_INLINE uint32_t qc_uxtb16(uint32_t word) { return (uint32_t)__uxtb16(word); }
#if defined(__GNUC__) /* compilers do not see that the rotation is free */
QC_INLINE uint32_t qc_sxtb16_ror8(uint32_t word) {
  __asm__("sxtb16 %0, %0, ror #8" : "+r"(word));
  return word;
}
QC_INLINE uint32_t qc_uxtb16_ror8(uint32_t word) {
  __asm__("uxtb16 %0, %0, ror #8" : "+r"(word));
  return word;
}
#else
QC_INLINE uint32_t qc_sxtb16_ror8(uint32_t word) { return (uint32_t)__sxtb16((word >> 8) | (word << 24)); }
QC_INLINE uint32_t qc_uxtb16_ror8(uint32_t word) { return (uint32_t)__uxtb16((word >> 8) | (word << 24)); }
#endif
QC_INLINE int32_t qc_smlad(uint32_t a, uint32_t b, int32_t sum) { return __smlad((int16x2_t)a, (int16x2_t)b, sum); }
#else
QC_INLINE uint32_t qc_sxtb16(uint32_t word) {
  return (uint16_t)(int8_t)(word & 0xFF) | (uint32_t)(uint16_t)(int8_t)((word >> 16) & 0xFF) << 16;
}
QC_INLINE uint32_t qc_sxtb16_ror8(uint32_t word) { return qc_sxtb16((word >> 8) | (word << 24)); }
QC_INLINE uint32_t qc_uxtb16(uint32_t word) { return word & 0x00FF00FFu; }
QC_INLINE uint32_t qc_uxtb16_ror8(uint32_t word) { return (word >> 8) & 0x00FF00FFu; }
QC_INLINE int32_t qc_smlad(uint32_t a, uint32_t b, int32_t sum) {
  uint32_t low = (uint32_t)((int16_t)(a & 0xFFFF) * (int16_t)(b & 0xFFFF)), high = (uint32_t)((int16_t)(a >> 16) * (int16_t)(b >> 16));
  return (int32_t)((uint32_t)sum + low + high); /* wraps, as the instruction does */
}
#endif

/* The nearest integer, halves to even, for magnitudes below 2^22. */
QC_INLINE int32_t qc_round(float x) {
  volatile float shifted = x + 12582912.0f; /* volatile: no wider type may keep more bits */
  return (int32_t)(shifted - 12582912.0f);
}

/* e^x within two units of the last place: 2^n by the exponent's bits, the rest by a polynomial on [-1/2, 1/2]. */
QC_INLINE float qc_expf(float x) {
  float power = x * 1.44269504f;
  if (power < -126.0f) {
    return 0.0f;
  }
  power = power > 127.0f ? 127.0f : power;
  int32_t whole = qc_round(power);
  float rest = power - (float)whole;
  float value = 1.32647273e-3f;
  value = value * rest + 9.67151179e-3f;
  value = value * rest + 5.55073374e-2f;
  value = value * rest + 2.40222421e-1f;
  value = value * rest + 6.93146898e-1f;
  value = value * rest + 1.0f;
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits += (uint32_t)whole << 23;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* 1 / sqrt(x) for positive x: a first guess by its bits, then Newton's steps. */
QC_INLINE float qc_rsqrt(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits = 0x5F375A86u - (bits >> 1);
  float root;
  memcpy(&root, &bits, sizeof root);
  for (int step = 0; step < 4; ++step) {
    root = root * (1.5f - 0.5f * x * root * root);
  }
  return root;
}

/* Two numbers of 16 bits, the first below. */
QC_INLINE uint32_t qc_pair(int32_t low, int32_t high) { return (uint32_t)(uint16_t)low | (uint32_t)high << 16; }

/* Sums of products of one or two rows of inputs with two of weights: sums[row of inputs][row of weights] += ..
   weights: words [turn][row], of codes of 8 bits, or of 4 or 2 bits plus 8 or 2, so that none is negative; a word holds pairs that lie 16 bits
   apart. inputs: pairs of 16 bits [turn][pair][row]. */
#if QC_DSP && defined(__GNUC__) && defined(__OPTIMIZE__) /* without, there are too few registers */
#define QC_FIELD_8(word, shift) "sxtb16 %[pair], %[" word "], ror #" shift "\n"
#define QC_FIELD(word, shift) "and %[pair], %[mask], %[" word "], lsr #" shift "\n"
#define QC_STEP_1(field, shift)                              \
  "ldr %[x0], [%[inputs]], #4\n" field("w0", shift)          \
  "smlad %[s0], %[x0], %[pair], %[s0]\n" field("w1", shift)  \
  "smlad %[s1], %[x0], %[pair], %[s1]\n"
#define QC_STEP_2(field, shift)                              \
  "ldrd %[x0], %[x1], [%[inputs]], #8\n" field("w0", shift)  \
  "smlad %[s0], %[x0], %[pair], %[s0]\n"                     \
  "smlad %[s2], %[x1], %[pair], %[s2]\n" field("w1", shift)  \
  "smlad %[s1], %[x0], %[pair], %[s1]\n"                     \
  "smlad %[s3], %[x1], %[pair], %[s3]\n"
#define QC_TURN_8(step) step(QC_FIELD_8, "0") step(QC_FIELD_8, "8")
#define QC_TURN_4(step) step(QC_FIELD, "0") step(QC_FIELD, "4") step(QC_FIELD, "8") step(QC_FIELD, "12")
#define QC_TURN_2(step)                                                                          \
  step(QC_FIELD, "0") step(QC_FIELD, "2") step(QC_FIELD, "4") step(QC_FIELD, "6")                \
  step(QC_FIELD, "8") step(QC_FIELD, "10") step(QC_FIELD, "12") step(QC_FIELD, "14")
#define QC_ALL(bits, step) "ldrd %[w0], %[w1], [%[weights]], #8\n" QC_TURN_##bits(step)
#define QC_LOOP(turn) "0: " turn "subs %[turns], #1\n bne 0b\n"
/* Two turns for a branch; of an odd number, the first begins in the middle. */
#define QC_LOOP_8(step) "lsrs %[turns], %[turns], #1\n bcc 0f\n adds %[turns], #1\n b 1f\n 0: " QC_ALL(8, step) "1: " QC_ALL(8, step) "subs %[turns], #1\n bne 0b\n"
#define QC_LOOP_4(step) QC_LOOP(QC_ALL(4, step))
#define QC_LOOP_2(step) QC_LOOP(QC_ALL(2, step))
#define QC_MOVED [weights] "+r"(weights), [inputs] "+r"(inputs), [turns] "+r"(turns), [w0] "=&r"(w0), [w1] "=&r"(w1), [pair] "=&r"(pair)

#define QC_PRODUCTS(bits, fields, kind)                                                                                              \
  QC_INLINE void qc_products_w##bits##_2(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    uint32_t w0, w1, pair, x0, x1;                                                                                              \
    __asm__ volatile(QC_LOOP_##bits(QC_STEP_2)                                                                        \
                     : QC_MOVED, [x0] "=&r"(x0), [x1] "=&r"(x1), [s0] "+r"(sums[0]), [s1] "+r"(sums[1]), [s2] "+r"(sums[2]),    \
                       [s3] "+r"(sums[3])                                                                                       \
                     : [mask] kind(fields)                                                                                       \
                     : "cc", "memory");                                                                                         \
  }                                                                                                                             \
  QC_INLINE void qc_products_w##bits##_1(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    uint32_t w0, w1, pair, x0;                                                                                                  \
    __asm__ volatile(QC_LOOP_##bits(QC_STEP_1)                                                                        \
                     : QC_MOVED, [x0] "=&r"(x0), [s0] "+r"(sums[0]), [s1] "+r"(sums[1])                                         \
                     : [mask] kind(fields)                                                                                       \
                     : "cc", "memory");                                                                                         \
  }
#else
#define QC_PRODUCTS(bits, fields, kind)                                                                                              \
  QC_INLINE void qc_products_w##bits##_2(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    qc_products(bits, fields, 2, weights, inputs, turns, sums);                                                                 \
  }                                                                                                                             \
  QC_INLINE void qc_products_w##bits##_1(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    qc_products(bits, fields, 1, weights, inputs, turns, sums);                                                                 \
  }
QC_INLINE void qc_products(int32_t bits, uint32_t fields, int32_t rows, const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {
  for (int32_t turn = 0; turn < turns; ++turn) {
    for (int32_t shift = 0; shift < 16; shift += bits) {
      for (int32_t row = 0; row < rows; ++row, ++inputs) {
        for (int32_t i = 0; i < 2; ++i) {
          uint32_t word = (uint32_t)weights[2 * turn + i] >> shift;
          sums[2 * row + i] = qc_smlad((uint32_t)*inputs, bits == 8 ? qc_sxtb16(word) : word & fields, sums[2 * row + i]);
        }
      }
    }
  }
}
#endif
QC_PRODUCTS(8, 0, "i")
QC_PRODUCTS(4, 0x000F000Fu, "r")
QC_PRODUCTS(2, 0x00030003u, "r")

/* The same sums over codes as they lie: two rows of weights of `part` bytes, one after the other, rows 1 or 2. A byte holds 8 / bits weights, the
   first at its top; they belong to inputs that are `part` apart. A field at the top of a byte is the weight times a power of two, taken off at the
   end. `part` is a multiple of 4; where it is seen to be one of 16, compilers with vectors use them. */
#define QC_ROWS(input, qc_inner)                                                                                                       \
  QC_INLINE void qc_rows_##input(int32_t bits, int32_t rows, const int8_t *weights, const input##_t *x0, const input##_t *x1,          \
                                 int32_t part, int32_t *sums) {                                                                        \
    int32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                                                            \
    for (int32_t at = 0; at < 8; at += bits, x0 += part, x1 += part) {                                                                 \
      const int32_t scale = 1 << at, mask = -(256 >> bits);                                                                            \
      qc_inner                                                                                                                         \
    }                                                                                                                                  \
    sums[0] += s0 >> (8 - bits);                                                                                                       \
    sums[1] += s1 >> (8 - bits);                                                                                                       \
    if (rows == 2) {                                                                                                                   \
      sums[2] += s2 >> (8 - bits);                                                                                                     \
      sums[3] += s3 >> (8 - bits);                                                                                                     \
    }                                                                                                                                  \
  }
#define QC_ONE(i)                                                                                                                      \
  {                                                                                                                                    \
    const int8_t a = (int8_t)((weights[i] * scale) & mask), b = (int8_t)((weights[part + (i)] * scale) & mask);                        \
    s0 += x0[i] * a;                                                                                                                   \
    s1 += x0[i] * b;                                                                                                                   \
    if (rows == 2) {                                                                                                                   \
      s2 += x1[i] * a;                                                                                                                 \
      s3 += x1[i] * b;                                                                                                                 \
    }                                                                                                                                  \
  }
#if defined(__ARM_NEON) || defined(__SSE2__) || defined(__ARM_ARCH_6M__) /* the last has too few registers for more */
#define QC_INNER                                                                                                                       \
  for (int32_t i = 0; i < part; ++i) {                                                                                                 \
    QC_ONE(i)                                                                                                                          \
  }
#else
#define QC_INNER                                                                                                                       \
  for (int32_t i = 0; i < part; i += 4) {                                                                                              \
    QC_ONE(i) QC_ONE(i + 1) QC_ONE(i + 2) QC_ONE(i + 3)                                                                                \
  }
#endif
#if defined(__ARM_FEATURE_MVE) && (__ARM_FEATURE_MVE & 1)
#include <arm_mve.h>
#define QC_INNER_MVE                                                                                                                   \
  const int8x16_t masks = vdupq_n_s8((int8_t)mask);                                                                                    \
  for (int32_t i = 0; i < part; i += 16) {                                                                                             \
    int8x16_t a = vldrbq_s8(weights + i), b = vldrbq_s8(weights + part + i);                                                           \
    if (bits < 8) {                                                                                                                    \
      a = vandq_s8(vmulq_n_s8(a, (int8_t)scale), masks);                                                                               \
      b = vandq_s8(vmulq_n_s8(b, (int8_t)scale), masks);                                                                               \
    }                                                                                                                                  \
    const int8x16_t p = vldrbq_s8(x0 + i);                                                                                             \
    s0 = vmladavaq_s8(s0, p, a);                                                                                                       \
    s1 = vmladavaq_s8(s1, p, b);                                                                                                       \
    if (rows == 2) {                                                                                                                   \
      const int8x16_t q = vldrbq_s8(x1 + i);                                                                                           \
      s2 = vmladavaq_s8(s2, q, a);                                                                                                     \
      s3 = vmladavaq_s8(s3, q, b);                                                                                                     \
    }                                                                                                                                  \
  }
QC_ROWS(int8, QC_INNER_MVE)
#else
QC_ROWS(int8, QC_INNER)
#endif
QC_ROWS(uint8, QC_INNER)

/* sums[0..15] += the products of 16 channels of `count` codes that lie `step` apart with weights that lie `channels` apart; and their codes as by
   qc_scale. Loops of 16 turns become vectors. */
#define QC_TAPS(input)                                                                                                                 \
  QC_INLINE void qc_taps_##input(const input##_t *x, int32_t step, const int8_t *weights, int32_t channels, int32_t count,             \
                                 int32_t *sums) {                                                                                      \
    int32_t own[16];                                                                                                                   \
    memcpy(own, sums, sizeof own);                                                                                                     \
    for (int32_t tap = 0; tap < count; ++tap, x += step, weights += channels) {                                                        \
      for (int32_t i = 0; i < 16; ++i) {                                                                                               \
        own[i] += x[i] * weights[i];                                                                                                   \
      }                                                                                                                                \
    }                                                                                                                                  \
    memcpy(sums, own, sizeof own);                                                                                                     \
  }
QC_TAPS(int8)
QC_TAPS(uint8)

QC_INLINE void qc_scale_16(const int32_t *sums, const int32_t *multiplier, const int8_t *shift, int32_t rest, int32_t low, int32_t high, void *y) {
  int32_t upper[16];
  uint8_t codes[16];
  for (int32_t i = 0; i < 16; ++i) {
    upper[i] = (int32_t)(((int64_t)sums[i] * multiplier[i]) >> 32);
  }
  for (int32_t i = 0; i < 16; ++i) {
    upper[i] = ((upper[i] >> shift[i]) + rest) >> 1;
  }
  for (int32_t i = 0; i < 16; ++i) {
    const int32_t bounded = upper[i] < high ? upper[i] : high;
    codes[i] = (uint8_t)(bounded > low ? bounded : low);
  }
  memcpy(y, codes, sizeof codes);
}

/* A field of a byte as if it stood at the byte's top: the field times a power of two, with its sign. */
QC_INLINE int32_t qc_top_bits(int32_t byte, int32_t from_top, int32_t bits) {
  return (int8_t)(((uint32_t)byte << from_top) & (0xFF00u >> bits) & 0xFFu);
}

#endif
