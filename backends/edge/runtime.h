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

/* (sum * multiplier + half) >> shift in 64 bits: a product with multiplier / 2^shift, rounded half up. */
QC_INLINE int32_t qc_requantize(int32_t sum, int32_t multiplier, int32_t shift) {
  int64_t product = (int64_t)sum * multiplier;
  if (shift > 32) { /* the lower word is below what is rounded away: only the upper one counts */
    return (((int32_t)(product >> 32) >> (shift - 33)) + 1) >> 1;
  }
  return (int32_t)((product + ((int64_t)1 << (shift - 1))) >> shift);
}

/* The same where shift is over 32 and given less 33, with the zero point of the codes: rest is twice that, plus one. */
QC_INLINE int32_t qc_scale(int32_t sum, int32_t multiplier, int32_t shift, int32_t rest) {
  return (((int32_t)(((int64_t)sum * multiplier) >> 32) >> shift) + rest) >> 1;
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
#define QC_LOOP(turn) "0: ldrd %[w0], %[w1], [%[weights]], #8\n" turn "subs %[turns], #1\n bne 0b\n"
#define QC_MOVED [weights] "+r"(weights), [inputs] "+r"(inputs), [turns] "+r"(turns), [w0] "=&r"(w0), [w1] "=&r"(w1), [pair] "=&r"(pair)

#define QC_PRODUCTS(bits, fields, kind)                                                                                              \
  QC_INLINE void qc_products_w##bits##_2(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    uint32_t w0, w1, pair, x0, x1;                                                                                              \
    __asm__ volatile(QC_LOOP(QC_TURN_##bits(QC_STEP_2))                                                                         \
                     : QC_MOVED, [x0] "=&r"(x0), [x1] "=&r"(x1), [s0] "+r"(sums[0]), [s1] "+r"(sums[1]), [s2] "+r"(sums[2]),    \
                       [s3] "+r"(sums[3])                                                                                       \
                     : [mask] kind(fields)                                                                                       \
                     : "cc", "memory");                                                                                         \
  }                                                                                                                             \
  QC_INLINE void qc_products_w##bits##_1(const int32_t *weights, const int32_t *inputs, int32_t turns, int32_t *sums) {         \
    uint32_t w0, w1, pair, x0;                                                                                                  \
    __asm__ volatile(QC_LOOP(QC_TURN_##bits(QC_STEP_1))                                                                         \
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

/* A field of a byte as if it stood at the byte's top: the field times a power of two, with its sign. */
QC_INLINE int32_t qc_top_bits(int32_t byte, int32_t from_top, int32_t bits) {
  return (int8_t)(((uint32_t)byte << from_top) & (0xFF00u >> bits) & 0xFFu);
}

#endif
