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

QC_INLINE void qc_copy(void *to, const void *from, int32_t bytes) { memcpy(to, from, (size_t)bytes); }

QC_INLINE void qc_fill(void *to, int32_t code, int32_t bytes) { memset(to, code & 0xFF, (size_t)bytes); }

/* (sum * multiplier + half) >> shift in 64 bits: a product with multiplier / 2^shift, rounded half up. */
QC_INLINE int32_t qc_requantize(int32_t sum, int32_t multiplier, int32_t shift) {
  int64_t product = (int64_t)sum * multiplier;
  if (shift > 32) { /* the lower word is below what is rounded away: only the upper one counts */
    return (((int32_t)(product >> 32) >> (shift - 33)) + 1) >> 1;
  }
  return (int32_t)((product + ((int64_t)1 << (shift - 1))) >> shift);
}

/* Bytes 0 and 2, or 1 and 3, of a word as two 16-bit numbers. */
#if QC_DSP
QC_INLINE uint32_t qc_sxtb16(uint32_t word) { return (uint32_t)__sxtb16(word); }
QC_INLINE uint32_t qc_sxtb16_ror8(uint32_t word) { return (uint32_t)__sxtb16((word >> 8) | (word << 24)); }
QC_INLINE uint32_t qc_uxtb16(uint32_t word) { return (uint32_t)__uxtb16(word); }
QC_INLINE uint32_t qc_uxtb16_ror8(uint32_t word) { return (uint32_t)__uxtb16((word >> 8) | (word << 24)); }
QC_INLINE int32_t qc_smlad(uint32_t a, uint32_t b, int32_t sum) { return __smlad((int16x2_t)a, (int16x2_t)b, sum); }
QC_INLINE int32_t qc_smlabb(uint32_t a, uint32_t b, int32_t sum) { return __smlabb((int32_t)a, (int32_t)b, sum); }
QC_INLINE int32_t qc_smlatt(uint32_t a, uint32_t b, int32_t sum) { return __smlatt((int32_t)a, (int32_t)b, sum); }
#else
QC_INLINE uint32_t qc_sxtb16(uint32_t word) {
  return (uint16_t)(int8_t)(word & 0xFF) | (uint32_t)(uint16_t)(int8_t)((word >> 16) & 0xFF) << 16;
}
QC_INLINE uint32_t qc_sxtb16_ror8(uint32_t word) { return qc_sxtb16((word >> 8) | (word << 24)); }
QC_INLINE uint32_t qc_uxtb16(uint32_t word) { return word & 0x00FF00FFu; }
QC_INLINE uint32_t qc_uxtb16_ror8(uint32_t word) { return (word >> 8) & 0x00FF00FFu; }
QC_INLINE int32_t qc_smlad(uint32_t a, uint32_t b, int32_t sum) {
  return sum + (int16_t)(a & 0xFFFF) * (int16_t)(b & 0xFFFF) + (int16_t)(a >> 16) * (int16_t)(b >> 16);
}
QC_INLINE int32_t qc_smlabb(uint32_t a, uint32_t b, int32_t sum) { return sum + (int16_t)(a & 0xFFFF) * (int16_t)(b & 0xFFFF); }
QC_INLINE int32_t qc_smlatt(uint32_t a, uint32_t b, int32_t sum) { return sum + (int16_t)(a >> 16) * (int16_t)(b >> 16); }
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

/* A field of a byte as if it stood at the byte's top: the field times a power of two, with its sign. */
QC_INLINE int32_t qc_top_bits(int32_t byte, int32_t from_top, int32_t bits) {
  return (int8_t)(((uint32_t)byte << from_top) & (0xFF00u >> bits) & 0xFFu);
}

#endif
